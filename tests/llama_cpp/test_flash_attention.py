"""ggml's FLASH_ATTN_EXT in the built library, and the text of models with it.

tests/native/test_attention.py tests the kernels. Here: that ggml calls them, with which operands, and what it leaves to upstream's code.
Each instruction set has a process of its own, since it is chosen once.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import small_models
from built_tools import run_for
from conftest import ATTENTION, LONG, greedy, run_backend_ops

from sherry_gguf import attention, llama_cpp

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
PATHS = os.pathsep.join(map(str, [HERE.parents[1], HERE, HERE.parent, HERE.parent / "native"]))
ISAS = attention.available()


def env(isa):
    return os.environ | {"SHERRY_ISA": isa, "PYTHONPATH": PATHS}


@pytest.mark.parametrize("isa", [*ISAS, "scalar"])
def test_operations(isa):
    """ggml gives float32's accuracy where our kernels must run. Upstream's code rounds queries to the keys' type, which shows: without our
    kernels, and with head sizes and types that are not theirs, the error is above the bound."""
    done = subprocess.run([sys.executable, __file__, isa], capture_output=True, text=True, env=env(isa))
    assert done.returncode == 0, done.stdout + done.stderr
    ours, upstreams = map(int, done.stdout.split())
    assert ours == (0 if isa == "scalar" else 51) and ours + upstreams == 72


@pytest.mark.parametrize("isa", sorted({ISAS[0], *({"avx2"} & {*ISAS})}))
def test_backend_ops(isa):
    text = run_backend_ops([llama_cpp.tool("test-backend-ops")], ["FLASH_ATTN_EXT"], ATTENTION, env=env(isa))
    cases = re.findall(r"^ *FLASH_ATTN_EXT\((.*)\).*OK", text, re.M)
    assert len(cases) > 800
    met = {option for case in cases for option in re.findall(r"\w+=(?:\[[^]]*\]|[^,]+)", case)}
    assert met >= {
        *(f"hsk={size}" for size in (64, 80, 96, 128, 192, 256)), *(f"type_K={kind}" for kind in ("f16", "bf16", "q8_0")),
        *("sinks=1", "max_bias=8.000000", "logit_softcap=10.000000", "nr23=[4,3]", "nr23=[12,1]", "nb=75", "permute=[0,2,1,3]"),
    }  # fmt: skip


# ---- models ----


def perplexity(model, text, *args, isa=ISAS[0]):
    command = "llama-perplexity", "-m", model, "-f", text, "-c", 256, "-b", 1024, "--chunks", 4, "-t", 2
    found = r"Mean +KLD: +([-0-9.e]+)" if "--kl-divergence" in args else r"Final estimate: PPL = ([0-9.]+)"
    return run_for(found, *command, *args, env=env(isa))[1][1]


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "gptoss"])  # heads of 128; of 64 with softcap; with sinks and a window of 64
def test_models_compute_the_same_with_and_without(zoo, name, tmp_path):
    """Four sequences, each with a cache of its own or all in one, on float weights.

    Without flash attention upstream rounds queries and probabilities to fp16. That changes logits by less than 2^-10 of their spread, and
    the KL divergence is half that squared; llama-perplexity stores them in 16 bits and prints 1e-6. Q8_0 rounds keys and values to 1/254
    of the greatest in a block: a KL divergence of up to 8e-6. A window that is a key too short changes gptoss by 3e-5.
    """
    model, text, base = zoo[0] / f"{name}.f32.gguf", tmp_path / "text.txt", tmp_path / "base"
    text.write_text(small_models.corpus()[:8000])
    without = perplexity(model, text, "-fa", "off", "--kl-divergence-base", base)
    assert perplexity(model, text, "-fa", "off", isa="scalar") == without  # our kernels have no part in it
    for args, most in [
        ("", 2e-6),
        ("-kvu -ub 40", 2e-6),  # prompts in parts that end within the chunks of keys
        ("-ctk bf16 -ctv bf16", 4e-6),
        ("-ctk q8_0 -ctv q8_0 -kvu", 1e-5),
    ]:
        found = float(perplexity(model, text, "-fa", "on", *args.split(), "--kl-divergence-base", base, "--kl-divergence"))
        assert abs(found) <= most, (args, found)


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_text_of_the_demo_model(demo, kind):
    """Decoding, at more keys than a chunk has."""
    assert greedy(demo[2], "-fa", "on", "-ctk", kind, "-ctv", kind, prompt=LONG) == greedy(demo[2], "-fa", "off", prompt=LONG)


# ---- in the process of its own ----

CDEF = """
void * ggml_permute(void * ctx, void * a, int axis0, int axis1, int axis2, int axis3);
void * ggml_flash_attn_ext(void * ctx, void * q, void * k, void * v, void * mask, float scale, float max_bias, float logit_softcap);
void ggml_flash_attn_ext_add_sinks(void * a, void * sinks);
"""
TYPE_IDS = {"f32": 0, "f16": 1, "q8_0": 8, "bf16": 30}
KEYS = 20  # more than attention sees, of a longer cache


# One function, since its helpers share the library, which each process loads once.
def main(isa):
    """Prints how many operations were within our bound, and how many were not."""
    import cffi
    import numpy as np
    from attention_reference import causal, operands, reference
    from test_ops import CDEF as OF_GGML

    ffi = cffi.FFI()
    ffi.cdef(OF_GGML + CDEF)
    base, cpu = (ffi.dlopen(str(llama_cpp.library(name))) for name in ("ggml-base", "ggml-cpu"))
    cpu.ggml_cpu_init()
    rng = np.random.default_rng(0)
    counts = {True: 0, False: 0}

    def data(tensor):
        return np.frombuffer(ffi.buffer(base.ggml_get_data(tensor), base.ggml_nbytes(tensor)), np.uint8)

    def attend(ctx, kinds, sizes, q, k, v, mask, sinks, threads, scale, max_bias, softcap):
        def tensor(kind, values, ne0):
            ne = [ne0, *values.shape[-2::-1]]
            t = base.ggml_new_tensor(ctx, TYPE_IDS[kind], len(ne), ne)
            data(t)[:] = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
            return t

        def cached(kind, x, size):
            """A view of a longer cache, whose other keys are not numbers; all heads of a key lie together."""
            rest = np.full((*x.shape[:2], KEYS, x.shape[3]), 0xFF, np.uint8).repeat(x.itemsize, 3).view(x.dtype)
            cache = np.concatenate([x, rest], axis=2).transpose(0, 2, 1, 3)
            t = tensor(kind, cache, size)
            row = x.shape[3] * x.itemsize
            token = cache.shape[2] * row
            view = base.ggml_view_4d(ctx, t, size, x.shape[1], x.shape[2], x.shape[0], row, token, cache.shape[1] * token, 0)
            return base.ggml_permute(ctx, view, 0, 2, 1, 3)

        q_ = base.ggml_permute(ctx, tensor("f32", q.transpose(0, 2, 1, 3), sizes[0]), 0, 2, 1, 3)
        if mask is not None:  # with rows that belong to no token
            mask = np.concatenate([mask, np.full((*mask.shape[:2], 5, mask.shape[3]), np.nan, np.float16)], axis=2)
        mask_ = ffi.NULL if mask is None else tensor("f16", mask, mask.shape[3])
        op = base.ggml_flash_attn_ext(
            ctx, q_, cached(kinds[0], k, sizes[0]), cached(kinds[1], v, sizes[1]), mask_, scale, max_bias, softcap
        )
        if sinks is not None:
            base.ggml_flash_attn_ext_add_sinks(op, tensor("f32", sinks, sinks.size))
        data(op)[:] = 0xFF
        graph = base.ggml_new_graph(ctx)
        base.ggml_build_forward_expand(graph, op)
        assert cpu.ggml_graph_compute_with_ctx(ctx, graph, threads) == 0
        return data(op).view(np.float32).reshape(q.shape[0], q.shape[2], q.shape[1], sizes[1]).copy()

    def check(ours, kinds, sizes, tokens, keys, heads, kv_heads, streams=1, own_masks=False, sinks=False, max_bias=0.0, softcap=0.0):
        q, k, v = operands(rng, *kinds, streams, heads, kv_heads, tokens, keys, *sizes)
        mask = causal(tokens, keys)
        if own_masks:
            mask = np.where(mask == 0, rng.standard_normal((streams, heads, tokens, keys)), -np.inf).astype(np.float16)
        sinks = rng.standard_normal(heads, np.float32) if sinks else None
        options = {"scale": sizes[0] ** -0.5, "max_bias": max_bias, "softcap": softcap}
        exact, bound = reference(q, k, v, mask, sinks, parts=8, **options)
        for threads in 1, 3, 8:
            ctx = base.ggml_init((64 << 20, ffi.NULL, False))
            found = attend(ctx, kinds, sizes, q, k, v, mask, sinks, threads, **options)
            base.ggml_free(ctx)
            error = ((found - exact) ** 2).sum() / (exact**2).sum()
            within = bool((abs(found - exact) <= bound).all())
            what = (kinds, sizes, tokens, keys, heads, kv_heads, threads, error)
            assert error < 5e-4, what  # upstream's tolerance
            assert kinds[0] == "f32" or within == (ours and isa != "scalar"), what
            counts[within and kinds[0] != "f32"] += 1

    for kinds in ("f16", "f16"), ("bf16", "bf16"), ("q8_0", "q8_0"), ("f16", "q8_0"), ("q8_0", "bf16"):
        check(True, kinds, (64, 64), 1, 300, 8, 2)  # few heads and many threads
        check(True, kinds, (128, 128), 5, 90, 6, 2, streams=3, own_masks=True)
        check(True, kinds, (96, 256), 40, 130, 4, 4, sinks=True)
    check(True, ("f16", "f16"), (80, 80), 1, 70, 12, 12, max_bias=8.0)
    check(True, ("f16", "f16"), (192, 128), 20, 70, 16, 1, softcap=20.0)
    for sizes in (72, 72), (40, 64), (576, 512), (64, 320):
        check(False, ("f16", "f16"), sizes, 2, 100, 4, 1)
    check(False, ("f32", "f32"), (64, 64), 2, 100, 4, 2)
    check(False, ("f32", "f32"), (64, 64), 70, 100, 4, 2)
    check(False, ("f32", "f32"), (64, 64), 1, 600, 4, 2)
    print(counts[True], counts[False])


if __name__ == "__main__":
    main(sys.argv[1])
