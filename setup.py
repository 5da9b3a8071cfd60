from setuptools import setup

setup(
    cffi_modules=["sherry_gguf/_kernels_build.py:ffibuilder"],
    options={"bdist_wheel": {"py_limited_api": "cp310"}},  # cffi's code uses Python's stable interface
)
