"""cffi's declarations are made from the headers: what is added there is seen, what can't be parsed is named."""

import shutil

import pytest

from sherry_gguf import _kernels_build


@pytest.fixture
def headers(tmp_path):
    for name in _kernels_build.HEADERS:
        shutil.copy(_kernels_build.SOURCES / name, tmp_path)
    return tmp_path


def emitted(headers):
    """The code of the bindings that cffi makes of these headers."""
    ffi, code = _kernels_build.builder(headers), headers / "code.c"
    ffi.set_source("code", "")
    ffi.emit_c_code(str(code))
    return code.read_text()


def edit(header, old, new):
    text = header.read_text()
    assert text.count(old) == 1
    header.write_text(text.replace(old, new))


@pytest.mark.parametrize("field, name", [("int number;", "number"), ("tq1_25_gemm_t * further[TQ1_25_KINDS]; // or NULL", "further")])
def test_a_new_field_is_seen(headers, field, name):
    edit(headers / "isas.h", "    int max_tables, max_codes;\n", f"    int max_tables, max_codes;\n    {field}\n")
    code = emitted(headers)
    assert f"offsetof(struct tq1_25_isa, {name})" in code and "offsetof(struct tq1_25_isa, gemm)" in code


def test_nothing_is_lost_between_types(headers):
    between = "struct more {\n    int x; };\nint between(void);\nstruct further {\n    int x;\n};\n\n"
    edit(headers / "isas.h", "struct tq1_25_isa {\n", f"{between}struct tq1_25_isa {{\n")
    assert "_cffi_f_between(" in emitted(headers)


@pytest.mark.parametrize("code", [
    "static inline int more(int x)\n{\n    return x;\n}",
    "static inline int more(int x) {\n    return x;\n    }\nint lost(void);\nstatic inline int further(int x) {\n    return x;\n}",
    "int more(int x) { return x; }",
    "int more(unknown_t x);",
])  # fmt: skip
def test_another_layout_is_refused(headers, code):
    edit(headers / "isas.h", "struct tq1_25_isa {\n", f"{code}\n\nstruct tq1_25_isa {{\n")
    with pytest.raises(ValueError, match=r"isas\.h: format it with clang-format, or extend declarations\(\) in .*_kernels_build\.py: \S"):
        _kernels_build.builder(headers)
