from setuptools import setup

setup(cffi_modules=["sherry_gguf/_kernels_build.py:ffibuilder"])
