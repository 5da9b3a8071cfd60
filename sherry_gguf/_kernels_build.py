"""Builds sherry_gguf._kernels from ggml_patch/src, the very files that llama.cpp's build compiles."""

import os
import sys
from pathlib import Path

import cffi

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "ggml_patch" / "src"
FLAGS = ["-std=c11", "-O3"]

ffibuilder = cffi.FFI()
ffibuilder.cdef("""
#define TQ1_25_TYPE_ID ...
#define QK_TQ1_25 ...
#define STQ1_0_TYPE_ID ...
#define QK_STQ1_0 ...
#define TQ1_25_GROUP ...
#define TQ1_25_QK8_0 ...
#define TQ1_25_TILE ...
#define TQ1_25_CODE_COLUMNS ...
#define TQ1_25_CODE_PAIRS ...
#define TQ1_25_COLUMNS ...
#define TQ1_25_DEPTH ...
typedef struct { ...; } block_tq1_25;
typedef struct { ...; } block_stq1_0;
typedef struct { ...; } tq1_25_q8_0;
typedef struct { ...; } tq1_25_tile;
typedef struct { ...; } stq1_0_tile;
enum tq1_25_kind { KIND_TQ1_25, KIND_STQ1_0, ... };
typedef struct { ...; } tq1_25_decoded;
struct tq1_25_code_scratch { ...; };
struct tq1_25_panel_scratch { ...; };
enum tq1_25_status { TQ1_25_OK, TQ1_25_NOT_FINITE, TQ1_25_OVERFLOW, ... };
enum tq1_25_status tq1_25_quantize(const float * x, block_tq1_25 * y, int64_t n, int64_t * bad);
enum tq1_25_status tq1_25_quantize_weighted(const float * x, const float * w, block_tq1_25 * y, int64_t n, int64_t * bad);
void tq1_25_dequantize(const block_tq1_25 * x, float * y, int64_t n);
bool tq1_25_validate(const void * x, size_t nb);
enum tq1_25_status stq1_0_quantize(const float * x, block_stq1_0 * y, int64_t n, int64_t * bad);
enum tq1_25_status stq1_0_quantize_weighted(const float * x, const float * w, block_stq1_0 * y, int64_t n, int64_t * bad);
void stq1_0_dequantize(const block_stq1_0 * x, float * y, int64_t n);
bool stq1_0_validate(const void * x, size_t nb);
size_t quantize_stq1_0(const float * x, void * y, int64_t nrows, int64_t n_per_row, const float * imatrix);
void tq1_25_release(const void * x, size_t size);
size_t quantize_tq1_25(const float * x, void * y, int64_t nrows, int64_t n_per_row, const float * imatrix);
void tq1_25_quantize_q8_0(const float * x, tq1_25_q8_0 * y, int64_t n);
struct tq1_25_isa {
    const char * name;
    void (*vec_dot)(int64_t n, float * s, const block_tq1_25 * x, const tq1_25_q8_0 * y);
    void (*vec_dot_stq1_0)(int64_t n, float * s, const block_stq1_0 * x, const tq1_25_q8_0 * y);
    int (*supported)(void);
    int max_tables, max_codes;
    void (*gemv[2])(int64_t n, float * s, const void * x, const int8_t * table, const float * d);
    void (*gemm)(int64_t nb, int nc, float * s, const tq1_25_decoded * w, const int8_t * panel);
    ...;
};
extern const struct tq1_25_isa tq1_25_isas[];
void tq1_25_repack(enum tq1_25_kind kind, int64_t rows, int64_t n, const void * x, void * y);
void stq1_0_order(const float * x, float * y, int64_t n);
int64_t tq1_25_table_size(const struct tq1_25_isa * isa, int64_t n);
void tq1_25_make_table(const struct tq1_25_isa * isa, int64_t n, int64_t begin, int64_t end, const tq1_25_q8_0 * y, void * table);
void tq1_25_mul_tables(const struct tq1_25_isa * isa, enum tq1_25_kind kind, int64_t rows, int64_t n, const void * x, int64_t begin, int64_t end,
                       int nc, const tq1_25_q8_0 * const * y, void * const * tables, float * const * s);
int64_t tq1_25_code_groups(int64_t nc);
int64_t tq1_25_first_of_group(int64_t nc, int64_t groups, int64_t group);
void tq1_25_mul_codes(const struct tq1_25_isa * isa, enum tq1_25_kind kind, int64_t rows, int64_t n, const void * x, int64_t begin, int64_t end,
                      int nc, const tq1_25_q8_0 * const * y, float * const * s, struct tq1_25_code_scratch * scratch);
int64_t tq1_25_panels(int64_t nc);
int64_t tq1_25_first_column(int64_t nc, int64_t panel);
int64_t tq1_25_panel_size(int64_t n, int64_t nc);
void tq1_25_make_panel(int64_t begin, int64_t end, int nc, const tq1_25_q8_0 * const * y, void * panel);
void tq1_25_mul_panels(const struct tq1_25_isa * isa, enum tq1_25_kind kind, int64_t rows, int64_t n, const void * x, int64_t begin, int64_t end,
                       int64_t nc, int64_t first, int64_t last, const void * panels, float * const * s, struct tq1_25_panel_scratch * scratch);
""")
ffibuilder.set_source(
    "sherry_gguf._kernels",
    '#include "tq1_25.h"',
    sources=[os.path.relpath(path) for path in sorted(SOURCES.glob("*.c"))],
    depends=[os.path.relpath(path) for path in sorted(SOURCES.glob("*.h"))],
    include_dirs=[os.path.relpath(SOURCES)],
    extra_compile_args=[] if sys.platform == "win32" else FLAGS,
)
