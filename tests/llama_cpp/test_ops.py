"""The operations of graphs on TQ1_25, TQ1_25_64 and STQ1_0, by the built ggml, against NumPy.

Upstream's test-backend-ops compares the CPU with itself: it shows that they run, not that they are right. Each instruction set
has a process of its own, since it is chosen once.
"""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sherry_gguf import gguf_type, kernels, stq1_0

pytestmark = pytest.mark.slow

KINDS = gguf_type.TYPES
HERE = Path(__file__).parent


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("isa", kernels.available())
@pytest.mark.parametrize("threads", [1, 3])
def test_operations(isa, threads, kind):
    result = subprocess.run([sys.executable, __file__, kind, str(threads)], capture_output=True, text=True,
                            env=os.environ | {"SHERRY_ISA": isa, "PYTHONPATH": str(HERE.parents[1])})  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.split() == ["mul_mat", "mul_mat_id", "get_rows", "cpy", "cpy_back", "set_rows"], result.stdout


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("isa", kernels.available_repacked())
def test_operations_on_repacked_weights(isa, kind):
    result = subprocess.run([sys.executable, __file__, kind, "repacked"], capture_output=True, text=True,
                            env=os.environ | {"SHERRY_ISA": isa, "PYTHONPATH": str(HERE.parents[1])})  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.split() == ["buffer", "memory", "mul_mat", "strided", "floats", "mul_mat_id"], result.stdout
    assert f"cannot read bytes 12 to 46 of , {kind} repacked: only TQ1_25," in result.stderr.replace(kind.lower(), kind), result.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_repacked_without_kernels_for_it(kind):
    result = subprocess.run([sys.executable, __file__, kind, "plain"], capture_output=True, text=True,
                            env=os.environ | {"SHERRY_ISA": "scalar", "PYTHONPATH": str(HERE.parents[1])})  # fmt: skip
    assert result.returncode == 0 and not result.stdout, result.stdout + result.stderr


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

void ggml_free(void * ctx);
void * ggml_new_tensor(void * ctx, int type, int n_dims, const int64_t * ne);
void * ggml_view_4d(void * ctx, void * a, int64_t ne0, int64_t ne1, int64_t ne2, int64_t ne3,
                    size_t nb1, size_t nb2, size_t nb3, size_t offset);
void * ggml_backend_cpu_init(void);
void ggml_backend_cpu_set_n_threads(void * backend, int n_threads);
int ggml_backend_graph_compute(void * backend, void * graph);
void * ggml_backend_cpu_reg(void);
void * ggml_backend_reg_get_proc_address(void * reg, const char * name);
void * ggml_backend_reg_dev_get(void * reg, size_t index);
const char * ggml_backend_buft_name(void * buft);
void * ggml_backend_alloc_ctx_tensors_from_buft(void * ctx, void * buft);
void ggml_backend_buffer_free(void * buffer);
void ggml_backend_tensor_set(void * tensor, const void * data, size_t offset, size_t size);
void ggml_backend_tensor_get(const void * tensor, void * data, size_t offset, size_t size);
bool ggml_backend_dev_supports_op(void * device, const void * op);
"""
F32, I32, I64 = 0, 26, 27


# One function, since all steps share ggml's context and the helpers over it.
def main(kind, threads):
    import cffi
    import numpy as np

    from sherry_gguf import llama_cpp

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
        packed = kind.quantize(rng.standard_normal(shape).astype(np.float32))
        return packed, kind.dequantize(packed)

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

    n, rows = 7 * kind.size, 45  # rows that no unrolling divides
    packed, w = weights(rows, n)
    a = tensor(kind.type_id, (n, rows), packed)
    for columns in 1, 2, 7, 33:
        y = rng.standard_normal((columns, n)).astype(np.float32)
        found = data(compute(base.ggml_mul_mat(ctx, a, tensor(F32, (n, columns), y))), np.float32).reshape(columns, rows)
        assert close(found, y, w), np.abs(found - y @ w.T).max()
    print("mul_mat")

    experts, used, tokens = 5, 2, 9
    packed, w = weights(experts, rows, n)
    y = rng.standard_normal((tokens, used, n)).astype(np.float32)
    ids = np.stack([rng.permutation(experts)[:used] for _ in range(tokens)]).astype(np.int32)
    result = compute(base.ggml_mul_mat_id(ctx, tensor(kind.type_id, (n, rows, experts), packed), tensor(F32, (n, used, tokens), y),
                                          tensor(I32, (used, tokens), ids)))  # fmt: skip
    found = data(result, np.float32).reshape(tokens, used, rows)
    for token in range(tokens):
        for i in range(used):
            assert close(found[token, i][None], y[token, i][None], w[ids[token, i]])
    print("mul_mat_id")

    packed, w = weights(rows, n)
    a = tensor(kind.type_id, (n, rows), packed)
    chosen = rng.integers(0, rows, 20).astype(np.int32)
    found = data(compute(base.ggml_get_rows(ctx, a, tensor(I32, (20,), chosen))), np.float32).reshape(20, n)
    assert (found == w[chosen]).all()
    print("get_rows")

    x = rng.standard_normal((rows, n)).astype(np.float32)
    source = tensor(F32, (n, rows), x)
    result = compute(base.ggml_cpy(ctx, source, tensor(kind.type_id, (n, rows))))
    assert (data(result, np.uint8).reshape(rows, -1) == kind.quantize(x)).all()
    print("cpy")

    result = compute(base.ggml_cpy(ctx, a, tensor(F32, (n, rows))))
    assert (data(result, np.float32).reshape(rows, n) == w).all()
    print("cpy_back")

    target = tensor(kind.type_id, (n, rows), packed)
    where = rng.permutation(rows)[:4].astype(np.int64)
    compute(base.ggml_set_rows(ctx, target, tensor(F32, (n, 4), x[:4]), tensor(I64, (4,), where)))
    expected = packed.copy()
    expected[where] = kind.quantize(x[:4])
    assert (data(target, np.uint8).reshape(rows, -1) == expected).all()
    print("set_rows")


# One function, for the same reason; its steps are listed by what it prints.
def main_repacked(kind, expected):
    """Weights in the CPU_REPACK buffer; the inputs' sums are exact, so results equal NumPy's to the last bit."""
    import cffi
    import numpy as np

    from sherry_gguf import llama_cpp

    ffi = cffi.FFI()
    ffi.cdef(CDEF)
    base, cpu = (ffi.dlopen(str(llama_cpp.library(name))) for name in ("ggml-base", "ggml-cpu"))
    backend, reg = cpu.ggml_backend_cpu_init(), cpu.ggml_backend_cpu_reg()
    device = base.ggml_backend_reg_dev_get(reg, 0)
    get_bufts = ffi.cast("void ** (*)(void *)", base.ggml_backend_reg_get_proc_address(reg, b"ggml_backend_dev_get_extra_bufts"))
    bufts, names = get_bufts(device), {}
    while bufts[len(names)]:
        buft = bufts[len(names)]
        names[ffi.string(base.ggml_backend_buft_name(buft)).decode()] = buft
    repack_buft = names["CPU_REPACK"]
    rng = np.random.default_rng(0)
    emulated = sys.argv[-1] == "emulated"
    counts = (1, 3) if emulated else (1, 3, 8)  # of threads; the emulator is slow

    def data(tensor, dtype):
        return np.frombuffer(ffi.buffer(base.ggml_get_data(tensor), base.ggml_nbytes(tensor)), dtype)

    class Context:
        """Tensors of one case, and weights in a buffer of their own."""

        def __init__(self):
            self.ctx = base.ggml_init((256 << 20, ffi.NULL, False))
            self.freed = []

        def __enter__(self):
            return self

        def __exit__(self, *_):
            base.ggml_free(self.ctx)
            for free, what in self.freed:
                free(what)

        def tensor(self, type_id, values, ne=None):
            values = np.ascontiguousarray(values)
            ne = list(values.shape[::-1]) if ne is None else ne
            t = base.ggml_new_tensor(self.ctx, type_id, len(ne), ne)
            data(t, np.uint8)[:] = values.reshape(-1).view(np.uint8)
            return t

        def repacked(self, packed, ne, fill=True):
            ctx = base.ggml_init((1 << 20, ffi.NULL, True))
            t = base.ggml_new_tensor(ctx, kind.type_id, len(ne), ne)
            buffer = base.ggml_backend_alloc_ctx_tensors_from_buft(ctx, repack_buft)
            self.freed += [(base.ggml_backend_buffer_free, buffer), (base.ggml_free, ctx)]
            if fill:
                base.ggml_backend_tensor_set(t, ffi.from_buffer(packed), 0, packed.nbytes)
                bytes_ = np.concatenate(
                    [kernels.repack(matrix, kind) for matrix in packed.reshape(-1, ne[1], ne[0] // kind.size * kind.bytes)]
                )
                assert (data(t, np.uint8) == bytes_).all()  # it is repacked indeed
            return t

        def compute(self, result, threads):
            data(result, np.uint8)[:] = 0xFF  # NaN
            graph = base.ggml_new_graph(self.ctx)
            base.ggml_build_forward_expand(graph, result)
            cpu.ggml_backend_cpu_set_n_threads(backend, threads)
            assert base.ggml_backend_graph_compute(backend, graph) == 0
            return data(result, np.float32)

    def weights(*shape):
        """Packed and dense; scales are powers of two."""
        codes = rng.integers(0, 256, (*shape[:-1], shape[-1] // kind.size, kind.bytes), dtype=np.uint8)
        codes[..., -2:] = np.ascontiguousarray(rng.choice([0.5, 1, 2], codes.shape[:-1]).astype("<f2"))[..., None].view(np.uint8)
        packed = codes.reshape(*shape[:-1], -1)
        return packed, kind.dequantize(packed).astype(np.float64)

    def activations(*shape):
        """What Q8_0 holds exactly: whole numbers up to 127, which is in each 32, in the order of the groups too, times powers
        of two, one of 64."""
        y = rng.integers(-127, 128, (*shape[:-1], shape[-1] // 64, 64)).astype(np.float32)
        y[..., rng.integers(0, 8)] = y[..., 40 + rng.integers(0, 8)] = 127
        return (y * rng.choice([0.5, 1, 2], (*y.shape[:-1], 1))).astype(np.float32).reshape(shape)

    with Context() as c:
        for rows, wanted in (63, False), (64, expected), (65, expected):
            a = c.repacked(None, (256, rows), fill=False)
            op = base.ggml_mul_mat(c.ctx, a, c.tensor(F32, activations(3, 256)))
            assert base.ggml_backend_dev_supports_op(device, op) == wanted, rows
            experts = c.repacked(None, (256, rows, 4), fill=False)
            ids = c.tensor(I32, np.zeros((3, 2), np.int32))
            op = base.ggml_mul_mat_id(c.ctx, experts, c.tensor(F32, activations(3, 2, 256)), ids)
            assert base.ggml_backend_dev_supports_op(device, op) == wanted, rows
    if not expected:
        return
    with Context() as c:
        packed, _ = weights(70, 256)
        t, back = c.repacked(packed, (256, 70)), np.empty_like(packed)
        base.ggml_backend_tensor_get(t, ffi.from_buffer(back), 0, back.nbytes)
        assert (back == packed).all()
        if not (child := os.fork()):  # it aborts
            os.environ["GGML_NO_BACKTRACE"] = "1"
            base.ggml_backend_tensor_get(t, ffi.from_buffer(back), 12, 34)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGABRT
    print("buffer")

    # All of the buffer asks for large pages, if the system has them; "hg" in its part of the file says so.
    with Context() as c:
        packed, _ = weights(4096, 4096)
        address = int(ffi.cast("uintptr_t", base.ggml_get_data(c.repacked(packed, (4096, 4096)))))
        if not emulated and os.path.exists("/sys/kernel/mm/transparent_hugepage/enabled"):  # qemu passes no flags on
            areas = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) .*?^VmFlags:(.*?)$", open("/proc/self/smaps").read(), re.M | re.S)
            for at in address, address + packed.nbytes - 1:
                (flags,) = [flags for begin, end, flags in areas if int(begin, 16) <= at < int(end, 16)]
                assert "hg" in flags.split(), flags
    print("memory")

    isa = kernels._compiled()[os.environ["SHERRY_ISA"]]
    tables, codes = isa.max_tables, min(isa.max_codes, kernels.lib.TQ1_25_CODE_COLUMNS)  # where another kernel, or a group, begins
    around = sorted({1, 2, 3, 5, 6, 7, 12, 13, tables, tables + 1, 2 * tables + 1, codes - 1, codes, codes + 1, 3 * codes + 1})
    cases = [(n, rows, columns) for n, rows in [(kind.size, 64), (3 * kind.size, 130), (2048 + kind.size, 65)] for columns in around]
    cases += [(256, 200, 2048), (640, 1030, 1), (640, 1030, tables + 1), (640, 1030, codes + 1), (128, 127, 257), (4864, 191, 48)]
    cases += [(4864, 2750, 3)]  # repacked by several threads
    for n, rows, columns in cases:
        n = -(-n // kind.size) * kind.size
        with Context() as c:
            packed, w = weights(rows, n)
            y = activations(columns, n)
            op = base.ggml_mul_mat(c.ctx, c.repacked(packed, (n, rows)), c.tensor(F32, y))
            plain = base.ggml_mul_mat(c.ctx, c.tensor(kind.type_id, packed, (n, rows)), c.tensor(F32, y))
            wanted = y.astype(np.float64) @ w.T
            assert (c.compute(plain, 2).reshape(columns, rows) == wanted).all()
            for threads in counts:
                found = c.compute(op, threads).reshape(columns, rows)
                assert (found == wanted).all(), (n, rows, columns, threads)
    print("mul_mat")

    n, rows = 3 * kind.size, 130
    packed, w = weights(rows, n)
    for batch in (2, 3, 1), (1, 3, 2), (3, 5, 7):  # ne3, ne2, ne1: columns that lie apart, and batches in another order
        with Context() as c:
            a = c.repacked(packed, (n, rows))
            y = activations(*batch, n)
            wide = np.concatenate([y, np.full((*batch, 128), np.nan, np.float32)], axis=-1).swapaxes(1, 2)
            b = c.tensor(F32, wide)
            size = 4 * (n + 128)
            view = base.ggml_view_4d(c.ctx, b, n, batch[2], batch[1], batch[0], size * batch[1], size, size * batch[1] * batch[2], 0)
            op = base.ggml_mul_mat(c.ctx, a, view)
            assert base.ggml_backend_dev_supports_op(device, op)
            for threads in counts:
                assert (c.compute(op, threads).reshape(*batch, rows) == y.astype(np.float64) @ w.T).all()
    print("strided")

    for columns in 1, tables + 1, codes + 1, 50:  # any floats
        with Context() as c:
            packed = kind.quantize(rng.standard_normal((rows, n)).astype(np.float32))
            y = rng.standard_normal((columns, n)).astype(np.float32)
            plain = c.compute(base.ggml_mul_mat(c.ctx, c.tensor(kind.type_id, packed, (n, rows)), c.tensor(F32, y)), 1)
            found = c.compute(base.ggml_mul_mat(c.ctx, c.repacked(packed, (n, rows)), c.tensor(F32, y)), 3)
            terms = np.abs(y.astype(np.float64)) @ np.abs(kind.dequantize(packed)).T
            # STQ1_0's activations are rounded in other blocks of 32: half a step of each, at most, and here and there
            assert (np.abs(found - plain).reshape(columns, rows) <= (1e-2 if kind is stq1_0.TYPE else 1e-5) * terms).all()
    print("floats")

    experts = 6
    for n, rows in (256, 130), (17 * kind.size, 64):
        packed, w = weights(experts, rows, n)
        for tokens, used in [(1, 1), (1, 4), (3, 2), (tables + 1, 3), (codes, 2), (codes + 1, 2), (60, 2), (150, 6)]:
            for choice in "distinct", "repeated", "skewed", "one":
                weight = {"skewed": [0.75, 0.2, 0.04, 0.01, 0, 0], "one": [0, 0, 0, 1, 0, 0]}.get(choice, [1 / experts] * experts)
                ids = rng.choice(experts, (tokens, used), p=weight)
                if choice == "distinct":
                    ids = np.stack([rng.permutation(experts)[:used] for _ in range(tokens)])
                for per_token in {1, used}:  # src1 of all the experts of a token, or one for each
                    with Context() as c:
                        y = activations(tokens, per_token, n)
                        # ids as llama.cpp has them: a view of the first few of all experts in order
                        wide = np.concatenate([ids, np.full((tokens, experts), -1)], axis=1).astype(np.int32)
                        view = base.ggml_view_4d(c.ctx, c.tensor(I32, wide), used, tokens, 1, 1,
                                                 wide.strides[0], wide.nbytes, wide.nbytes, 0)  # fmt: skip
                        b = c.tensor(F32, y)
                        op = base.ggml_mul_mat_id(c.ctx, c.repacked(packed, (n, rows, experts)), b, view)
                        assert base.ggml_backend_dev_supports_op(device, op)
                        plain = base.ggml_mul_mat_id(c.ctx, c.tensor(kind.type_id, packed, (n, rows, experts)), b, view)
                        each = np.broadcast_to(y, (tokens, used, n))
                        wanted = np.zeros((tokens, used, rows))
                        for e in range(experts):
                            wanted[ids == e] = each[ids == e].astype(np.float64) @ w[e].T
                        assert (c.compute(plain, 2).reshape(tokens, used, rows) == wanted).all()
                        for threads in counts:
                            found = c.compute(op, threads).reshape(tokens, used, rows)
                            assert (found == wanted).all(), (n, rows, tokens, used, choice, per_token, threads)
    print("mul_mat_id")


if __name__ == "__main__":
    if sys.argv[2].isdigit():
        main(KINDS[sys.argv[1]], int(sys.argv[2]))
    else:
        main_repacked(KINDS[sys.argv[1]], sys.argv[2] == "repacked")
