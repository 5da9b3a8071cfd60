"""The operations that graphs use TQ1_25 in, computed by the built ggml, against NumPy.

Upstream's test-backend-ops compares the CPU with itself, so it shows that they run, not that they are right. One process
for each instruction set: it is chosen once.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sherry_gguf import kernels

HERE = Path(__file__).parent


@pytest.mark.parametrize("isa", kernels.available())
@pytest.mark.parametrize("threads", [1, 3])
def test_operations(isa, threads):
    result = subprocess.run([sys.executable, __file__, str(threads)], capture_output=True, text=True,
                            env=os.environ | {"SHERRY_ISA": isa, "PYTHONPATH": str(HERE.parent)})  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.split() == ["mul_mat", "mul_mat_id", "get_rows", "cpy", "cpy_back", "set_rows"], result.stdout


# ---- in the process of its own ----

CDEF = """
struct ggml_init_params { size_t mem_size; void * mem_buffer; bool no_alloc; };
void * ggml_init(struct ggml_init_params params);
void * ggml_new_tensor_3d(void * ctx, int type, int64_t ne0, int64_t ne1, int64_t ne2);
void * ggml_get_data(const void * tensor);
size_t ggml_nbytes(const void * tensor);
void * ggml_mul_mat(void * ctx, void * a, void * b);
void * ggml_mul_mat_id(void * ctx, void * as, void * b, void * ids);
void * ggml_get_rows(void * ctx, void * a, void * b);
void * ggml_set_rows(void * ctx, void * a, void * b, void * c);
void * ggml_cpy(void * ctx, void * a, void * b);
void * ggml_new_graph(void * ctx);
void ggml_build_forward_expand(void * graph, void * tensor);
int ggml_graph_compute_with_ctx(void * ctx, void * graph, int n_threads);
void ggml_cpu_init(void);
"""
F32, I32, I64, TQ1_25 = 0, 26, 27, 125


def main(threads):
    import cffi
    import numpy as np

    from sherry_gguf import llama_cpp, tq1_25

    ffi = cffi.FFI()
    ffi.cdef(CDEF)
    base, cpu = (ffi.dlopen(str(llama_cpp.library(name))) for name in ("ggml-base", "ggml-cpu"))
    cpu.ggml_cpu_init()
    ctx = base.ggml_init((64 << 20, ffi.NULL, False))
    rng = np.random.default_rng(0)

    def data(tensor, dtype):
        return np.frombuffer(ffi.buffer(base.ggml_get_data(tensor), base.ggml_nbytes(tensor)), dtype)

    def tensor(type_id, ne, values=None):
        t = base.ggml_new_tensor_3d(ctx, type_id, *ne, *[1] * (3 - len(ne)))
        if values is not None:
            data(t, np.uint8)[:] = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        return t

    def compute(result):
        graph = base.ggml_new_graph(ctx)
        base.ggml_build_forward_expand(graph, result)
        assert cpu.ggml_graph_compute_with_ctx(ctx, graph, threads) == 0
        return result

    def weights(*shape):
        packed = tq1_25.quantize(rng.standard_normal(shape).astype(np.float32))
        return packed, tq1_25.dequantize(packed)

    def through_q8_0(y):
        """What the dot products see of the activations, float64."""
        from sherry_gguf import kernels

        q = kernels.quantize_q8_0(y.reshape(-1)).reshape(-1, 34)
        scales = np.ascontiguousarray(q[:, :2]).view("<f2").astype(np.float64)
        return (q[:, 2:].view(np.int8) * scales).reshape(y.shape)

    def close(found, y, w):
        """Within the rounding of float32 sums; activations a step of Q8_0 off where a value lies on its edge."""
        q = through_q8_0(y)
        step = np.abs(y).reshape(-1, 32).max(axis=1).repeat(32).reshape(y.shape) / 127
        edge = (np.abs(np.abs(y / step) % 1 - 0.5) < 1e-4) * step
        return (np.abs(found - q @ w.T) <= 2e-5 * (np.abs(q) @ np.abs(w).T) + edge @ np.abs(w).T).all()

    n, rows = 640, 45  # rows that no unrolling divides
    packed, w = weights(rows, n)
    a = tensor(TQ1_25, (n, rows), packed)
    for columns in 1, 2, 7, 33:
        y = rng.standard_normal((columns, n)).astype(np.float32)
        found = data(compute(base.ggml_mul_mat(ctx, a, tensor(F32, (n, columns), y))), np.float32).reshape(columns, rows)
        assert close(found, y, w), np.abs(found - y @ w.T).max()
    print("mul_mat")

    experts, used, tokens = 5, 2, 9
    packed, w = weights(experts, rows, n)
    y = rng.standard_normal((tokens, used, n)).astype(np.float32)
    ids = np.stack([rng.permutation(experts)[:used] for _ in range(tokens)]).astype(np.int32)
    result = compute(base.ggml_mul_mat_id(ctx, tensor(TQ1_25, (n, rows, experts), packed), tensor(F32, (n, used, tokens), y),
                                          tensor(I32, (used, tokens), ids)))  # fmt: skip
    found = data(result, np.float32).reshape(tokens, used, rows)
    for token in range(tokens):
        for i in range(used):
            assert close(found[token, i][None], y[token, i][None], w[ids[token, i]])
    print("mul_mat_id")

    packed, w = weights(rows, n)
    a = tensor(TQ1_25, (n, rows), packed)
    chosen = rng.integers(0, rows, 20).astype(np.int32)
    found = data(compute(base.ggml_get_rows(ctx, a, tensor(I32, (20,), chosen))), np.float32).reshape(20, n)
    assert (found == w[chosen]).all()
    print("get_rows")

    x = rng.standard_normal((rows, n)).astype(np.float32)
    source = tensor(F32, (n, rows), x)
    result = compute(base.ggml_cpy(ctx, source, tensor(TQ1_25, (n, rows))))
    assert (data(result, np.uint8).reshape(rows, -1) == tq1_25.quantize(x)).all()
    print("cpy")

    result = compute(base.ggml_cpy(ctx, a, tensor(F32, (n, rows))))
    assert (data(result, np.float32).reshape(rows, n) == w).all()
    print("cpy_back")

    target = tensor(TQ1_25, (n, rows), packed)
    where = rng.permutation(rows)[:4].astype(np.int64)
    compute(base.ggml_set_rows(ctx, target, tensor(F32, (n, 4), x[:4]), tensor(I64, (4,), where)))
    expected = packed.copy()
    expected[where] = tq1_25.quantize(x[:4])
    assert (data(target, np.uint8).reshape(rows, -1) == expected).all()
    print("set_rows")


if __name__ == "__main__":
    main(int(sys.argv[1]))
