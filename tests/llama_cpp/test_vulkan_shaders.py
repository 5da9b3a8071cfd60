"""Each Vulkan shader of TQ1_25, TQ1_25_64 and STQ1_0 against NumPy, on the device that GGML_VK_VISIBLE_DEVICES names.

Small whole numbers times scales that are powers of two have exact sums even in float16: what a shader computes of them is NumPy's result to
the last bit. Other numbers are within what the roundings on the way allow.
"""

from concurrent.futures.process import BrokenProcessPool

import gguf
import numpy as np
import pytest
import vulkan_graphs
from vectors import VECTORS
from vulkan_graphs import F32, Operand, numbers

from sherry_gguf import gguf_type

pytestmark = pytest.mark.slow

gguf_type.register()
KINDS = list(gguf_type.TYPES)
SCALE_FIRST = {"Q8_0"}  # of the types that the harness was tried on: blocks that begin with the scale

# The shaders that the device gets: without float16, with it, and with activations rounded to q8_1 (8 bits and a scale for each 32).
SETTINGS = {
    "float32": ["GGML_VK_DISABLE_F16", "GGML_VK_DISABLE_INTEGER_DOT_PRODUCT", "GGML_VK_DISABLE_COOPMAT", "GGML_VK_DISABLE_COOPMAT2"],
    "float16": ["GGML_VK_DISABLE_INTEGER_DOT_PRODUCT"],
    "q8_1": ["GGML_VK_FORCE_MMVQ", "SHERRY_VULKAN_INTEGERS"],  # also on devices that have no fast integers (pipelines.hpp)
}
FLOAT32 = 1e-5  # of the sum of absolute terms: what docs/format.md allows for the order of float32 sums
HALF = 2.0**-10  # float16's step; Vulkan lets a device round to either neighbour
COLUMNS = 8  # up to which matrix x vector shaders multiply


class Vulkan:
    """`vulkan(op, *operands)`: runs an operation in the device's process; after an abort the next one gets a new process."""

    def __init__(self, build, setting):
        self.build, self.setting, self.worker = build, setting, None

    def __call__(self, *args, **kwargs):
        try:
            found = self.compute(*args, **kwargs)
        except BrokenProcessPool:
            if "llvmpipe" not in self.build.description:
                raise
            found = self.compute(*args, **kwargs)  # Mesa 22.3's lavapipe crashes at random, in its own code; a fault of ours would again
        assert found is not None, "the device does not support this operation"
        return found

    def compute(self, *args, **kwargs):
        if not self.worker:
            env = self.build.env | dict.fromkeys(SETTINGS[self.setting], "1")
            self.worker = vulkan_graphs.worker(self.build.directory, env)
        try:
            return self.worker.submit(vulkan_graphs.compute, *args, **kwargs).result(timeout=300)
        except BrokenProcessPool:
            self.worker = None
            raise

    def stop(self):
        """The next operation gets a new process."""
        if self.worker:
            self.worker.shutdown()
        self.worker = None


@pytest.fixture(scope="module")
def devices(vulkan_build):
    """Setting to its device."""
    made = {setting: Vulkan(vulkan_build, setting) for setting in SETTINGS}
    yield made
    for vulkan in made.values():
        vulkan.stop()


def device(devices, build, setting):
    if setting == "q8_1" and "GL_EXT_integer_dot_product supported" not in (build.directory / "configure.log").read_text():
        pytest.skip("the glslc of this build does not know integer dot products")
    if setting == "q8_1":
        devices[setting].stop()  # lavapipe 22.3 crashes at random after many shapes of integer products, upstream's Q4_0 too
    return devices[setting]


@pytest.fixture(params=SETTINGS)
def vulkan(request, devices, vulkan_build):
    return device(devices, vulkan_build, request.param)


@pytest.fixture(params=["float16", "q8_1"])
def vectors(request, devices, vulkan_build):
    """For matrix x vector, which has no other shaders without float16."""
    return device(devices, vulkan_build, request.param)


# ---- operands ----


class Weights:
    """Blocks of a type, and what they stand for.

    Attributes:
        packed: uint8 (..., rows, bytes of a row).
        values: float64 (..., rows, n).
        scales: float64 (..., rows, n), the block's absolute scale at each weight.
    """

    def __init__(self, name, packed):
        self.qtype = gguf.GGMLQuantizationType[name]
        self.size, self.bytes = gguf.GGML_QUANT_SIZES[self.qtype]
        self.packed = packed
        self.values = gguf.quants.dequantize(packed, self.qtype).astype(np.float64)
        blocks = packed.reshape(-1, self.bytes)
        d = np.ascontiguousarray(blocks[:, scale_place(name)]).view("<f2").astype(np.float64)
        self.scales = np.abs(d).repeat(self.size).reshape(self.values.shape)

    def operand(self, **kwargs):
        return Operand(int(self.qtype), self.packed, self.values.shape[::-1], **kwargs)


def scale_place(name):
    return slice(0, 2) if name in SCALE_FIRST else slice(-2, None)


def size_of(name):
    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]][0]


def random_weights(rng, name, *shape, scales):
    """Random bytes under scales that `scales` draws: a function of a shape. Every fourth block or so is zero."""
    size, bytes_ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // size, bytes_), dtype=np.uint8)
    d = scales(blocks.shape[:-1]).astype("<f2")
    d[rng.random(d.shape) < 0.25] = 0
    blocks[..., scale_place(name)] = d[..., None].view(np.uint8)
    return Weights(name, blocks.reshape(*shape[:-1], -1))


def powers_of_two(rng):
    return lambda shape: rng.choice([0.5, 1, 2], shape)


def any_scale(rng):
    """Any finite float16 but negative ones, subnormals too."""
    return lambda shape: rng.integers(0, 0x7C00, shape, dtype=np.uint16).view(np.float16)


def moderate(rng):
    """Scales of models, with all bits of float16; sums stay within its range."""
    return lambda shape: rng.uniform(0.01, 2, shape)


def whole(rng, *shape):
    """Activations whose sums are exact. `check_exact` looks whether float16 holds the partial ones."""
    return rng.integers(-2, 3, shape).astype(np.float32)


def lengths(name, *wanted):
    """One block, and those of the wanted row lengths that are whole blocks."""
    return [n for n in (size_of(name), *wanted) if n % size_of(name) == 0]


CASES = [(name, n) for name in KINDS for n in lengths(name, 576, 896, 2560, 4864)]


# ---- bounds ----


def terms(values, y):
    """Sums of absolute terms, float64 (columns, rows)."""
    return np.abs(y).astype(np.float64) @ np.abs(values).T


def partial_sums(values, y):
    """The sum of all absolute partial sums of each product, (columns, rows)."""
    return np.stack([np.abs(np.cumsum(values * column, axis=1)).sum(axis=1) for column in y.astype(np.float64)])


def bound(setting, matrix, w, y, precise):
    """How far a product with columns y, float (columns, n), may be from the exact one, float64 (columns, rows).

    matrix: by the shaders for matrices, not those for a vector. precise: sums in float32.
    """
    of_sums = FLOAT32 * terms(w.values, y)
    if setting == "q8_1" and y.dtype == np.float32:
        # half a step of the greatest of 32; the scale and the sum of 32 are float16
        steps = np.abs(y).reshape(len(y), -1, 32).max(axis=2).repeat(32, axis=1) / 127
        return of_sums + terms(w.values, steps / 2 * 1.01 + HALF * np.abs(y)) + HALF * terms(w.scales, y)
    if not matrix or setting == "float32":
        return of_sums
    if y.dtype == np.float32:
        of_sums += HALF * terms(w.values, y)  # activations become float16; weights are, exactly
    if not precise:  # products and each partial sum become float16; 5 % for the roundings of rounded ones
        of_sums += 1.05 * HALF * (2 * terms(w.values, y) + partial_sums(w.values, y))
    return of_sums


def check(vulkan, found, w, y, matrix, precise=False):
    """A product of random numbers: float32 found (columns, rows)."""
    exact = y.astype(np.float64) @ w.values.T
    off = np.abs(found - exact)
    wrong = ~(off <= bound(vulkan.setting, matrix, w, y, precise))
    assert not wrong.any(), f"{wrong.sum()} of {off.size} results are off, by up to {np.nanmax(off)}"
    if vulkan.setting == "q8_1" and off.size > 100:
        assert (off > FLOAT32 * terms(w.values, y)).any(), "activations were not rounded to q8_1"


def check_exact(vulkan, found, values, y):
    """A product of whole numbers, unless they are rounded to q8_1."""
    exact = y.astype(np.float64) @ values.T
    if vulkan.setting == "q8_1":
        return
    assert np.abs(exact).max() < 1024  # multiples of 0.5 up to there are float16
    assert (found == exact).all(), f"{(found != exact).sum()} of {exact.size} results differ, by up to {np.nanmax(np.abs(found - exact))}"


def multiplied(vulkan, w, y, **kwargs):
    result = vulkan("mul_mat", w.operand(), numbers(y), **kwargs)
    return result.view(np.float32).reshape(*y.shape[:-1], w.values.shape[-2])


# ---- dequantization ----


def golden(name):
    """Rows of golden blocks; of STQ1_0, which has none, rows with each code in each place."""
    if name in VECTORS:
        return np.stack([block for _, block, *_ in VECTORS[name].blocks.values()])
    kind = gguf_type.TYPES[name]
    blocks = np.arange(32)[:, None] + np.arange(kind.groups)
    slots, signs = blocks & 15, blocks >> 4 & 1
    packed = np.zeros((32, kind.bytes), np.uint8)
    packed[:, : kind.groups // 2] = slots[:, ::2] | slots[:, 1::2] << 4
    packed[:, kind.groups // 2 : -2] = np.packbits(signs, axis=1, bitorder="little")
    packed[:, -2:] = np.frombuffer(np.float16(0.75).tobytes(), np.uint8)
    return packed


@pytest.mark.parametrize("name", KINDS)
def test_get_rows_of_golden_blocks(devices, name):
    w = Weights(name, golden(name))
    rows = np.arange(len(w.values), dtype=np.int32)
    found = devices["float16"]("get_rows", w.operand(), numbers(rows)).view(np.float32).reshape(w.values.shape)
    assert (found == w.values).all()


@pytest.mark.parametrize("name, n", CASES)
def test_get_rows(devices, name, n):
    """Weights are exact, so float32 holds them."""
    rng = np.random.default_rng(n)
    w = random_weights(rng, name, 3, 37, n, scales=any_scale(rng))
    ids = rng.integers(0, 37, (3, 50), dtype=np.int32)
    ids[:, 0], ids[:, 1] = 0, 36
    found = devices["float16"]("get_rows", w.operand(), numbers(ids)).view(np.float32).reshape(3, 50, n)
    assert (found == np.stack([matrix[rows] for matrix, rows in zip(w.values, ids)])).all()


@pytest.mark.parametrize("name", KINDS)
def test_get_rows_of_a_view(devices, name):
    """Rows from the fifth on, of matrices from the second on: at offsets that nothing aligns."""
    rng = np.random.default_rng(0)
    n = 3 * size_of(name)
    w = random_weights(rng, name, 4, 11, n, scales=any_scale(rng))
    row, matrix = w.packed.strides[1], w.packed.strides[0]
    view = w.operand(view=((n, 7, 3), row, matrix, 4 * matrix, matrix + 4 * row))
    ids = np.stack([rng.permutation(7) for _ in range(3)]).astype(np.int32)
    found = devices["float16"]("get_rows", view, numbers(ids)).view(np.float32).reshape(3, 7, n)
    assert (found == np.stack([w.values[1 + i, 4 + ids[i]] for i in range(3)])).all()


@pytest.mark.parametrize("name, n", CASES)
def test_copy_to_float32(devices, name, n):
    rng = np.random.default_rng(n)
    w = random_weights(rng, name, 3, 5, n, scales=any_scale(rng))
    found = devices["float16"]("cpy", w.operand(), to=F32).view(np.float32).reshape(w.values.shape)
    assert (found == w.values).all()


@pytest.mark.parametrize("name", KINDS)
def test_copy_of_a_view_to_float32(devices, name):
    """Its axes in another order, and at an offset that nothing aligns."""
    rng = np.random.default_rng(0)
    n = 2 * size_of(name)
    w = random_weights(rng, name, 5, 7, n, scales=any_scale(rng))
    row, matrix = w.packed.strides[1], w.packed.strides[0]
    view = w.operand(view=((n, 6, 3), row, matrix, 3 * matrix, matrix + row), permute=(0, 2, 1, 3))
    found = devices["float16"]("cpy", view, to=F32).view(np.float32).reshape(6, 3, n)
    assert (found == w.values[1:4, 1:].swapaxes(0, 1)).all()


@pytest.mark.parametrize("name", KINDS)
def test_copy_of_blocks(devices, name):
    rng = np.random.default_rng(0)
    w = random_weights(rng, name, 3, 5, 3 * size_of(name), scales=any_scale(rng))
    assert (devices["float16"]("cpy", w.operand(), to=int(w.qtype)) == w.packed.reshape(-1)).all()


# ---- matrix x vector ----


def few_columns(name, setting, dtype):
    """Numbers of columns, each of which is a shader that software compiles for seconds."""
    if setting == "q8_1":
        return [1, 2]  # for minutes
    return [1, 3] if dtype == np.float16 else range(1, COLUMNS + 1) if name == "TQ1_25" else [1, 2, COLUMNS]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("name, n", CASES)
def test_few_columns(vectors, name, n, dtype):
    """With rows that no number of rows a workgroup divides."""
    if vectors.setting == "q8_1" and dtype == np.float16:
        pytest.skip("float16 activations stay as they are")
    rng = np.random.default_rng(n)
    for columns in few_columns(name, vectors.setting, dtype):
        rows = 2 * columns + 19
        w, y = random_weights(rng, name, rows, n, scales=powers_of_two(rng)), whole(rng, columns, n).astype(dtype)
        check_exact(vectors, multiplied(vectors, w, y), w.values, y)
        w, y = random_weights(rng, name, rows, n, scales=any_scale(rng)), rng.standard_normal((columns, n)).astype(dtype)
        check(vectors, multiplied(vectors, w, y), w, y, matrix=False)


@pytest.mark.parametrize("name", KINDS)
def test_one_row(vectors, name):
    rng = np.random.default_rng(0)
    w = next(w for w in iter(lambda: random_weights(rng, name, 1, size_of(name), scales=moderate(rng)), None) if w.scales.any())
    y = rng.standard_normal((1, size_of(name)), np.float32)
    check(vectors, multiplied(vectors, w, y), w, y, matrix=False)


@pytest.mark.parametrize("name", [name for name in KINDS if name in VECTORS])
def test_golden_products(vectors, name):
    """The golden dot products round activations to Q8_0. Whole numbers up to 127, one of them 127, are the same before and after."""
    for packed, _, q8_0, wanted in VECTORS[name].dots:
        w = Weights(name, packed[None])
        y = np.concatenate([np.float64(d) * np.array(qs) for d, qs in q8_0]).astype(np.float32)[None]
        check(vectors, multiplied(vectors, w, y), w, y, matrix=False)
        assert abs((y @ w.values.T).item() - wanted) <= FLOAT32 * terms(w.values, y).item()


# ---- matrix x matrix ----

# Rows and columns that no tile divides, for each of a device's up to three tiles; the first also for rows that are not aligned.
SHAPES = [(7, 9), (33, 20), (65, 40), (70, 130)]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("name, n", CASES)
def test_many_columns(vulkan, name, n, dtype):
    """Float32 activations meet the type's own shader, float16 ones the dequantized matrix."""
    if vulkan.setting == "q8_1" and dtype == np.float16:
        pytest.skip("float16 activations stay as they are")
    rng = np.random.default_rng(n)
    every = name == "TQ1_25" and vulkan.setting == "float16" and dtype == np.float32  # other types' tiles have the same sizes
    for rows, columns in SHAPES if every else SHAPES[1:2]:
        w, y = random_weights(rng, name, rows, n, scales=powers_of_two(rng)), whole(rng, columns, n).astype(dtype)
        check_exact(vulkan, multiplied(vulkan, w, y), w.values, y)
        w, y = random_weights(rng, name, rows, n, scales=moderate(rng)), rng.standard_normal((columns, n)).astype(dtype)
        check(vulkan, multiplied(vulkan, w, y), w, y, matrix=True)
    if every:
        check(vulkan, multiplied(vulkan, w, y, precise=True), w, y, matrix=True, precise=True)


@pytest.mark.parametrize("columns", [1, 12])
@pytest.mark.parametrize("name", KINDS)
def test_batches_share_matrices(vulkan, name, columns):
    """Two by three matrices, each for two batches. They are views of their first rows, and lie further apart than they are long."""
    rng = np.random.default_rng(0)
    n, rows = 3 * size_of(name), 21
    w = random_weights(rng, name, 3, 2, rows + 3, n, scales=moderate(rng))
    outer, matrix, row = w.packed.strides[:3]
    view = w.operand(view=((n, rows, 2, 3), row, matrix, outer, 0))
    y = rng.standard_normal((3, 4, columns, n), np.float32)
    found = vulkan("mul_mat", view, numbers(y)).view(np.float32).reshape(3, 4, columns, rows)
    for i, j in np.ndindex(3, 4):
        one = Weights(name, w.packed[i, j // 2, :rows])
        check(vulkan, found[i, j], one, y[i, j], matrix=columns > 1)


@pytest.mark.parametrize("columns", [1, 40])
@pytest.mark.parametrize("name", KINDS)
def test_rows_of_a_view(vulkan, name, columns):
    """From where a device may begin to read. Elsewhere upstream aborts, whatever the type."""
    rng = np.random.default_rng(0)
    n = 3 * size_of(name)
    w = random_weights(rng, name, 256 + 50, n, scales=moderate(rng))
    row = w.packed.strides[0]
    view = w.operand(view=((n, 43), row, 43 * row, 43 * row, 256 * row))
    y = rng.standard_normal((columns, n), np.float32)
    found = vulkan("mul_mat", view, numbers(y)).view(np.float32).reshape(columns, 43)
    check(vulkan, found, Weights(name, w.packed[256:299]), y, columns > COLUMNS)


# ---- experts ----


def routed(rng, experts, used, tokens):
    """The last experts first, so that every one of these is met; others at random."""
    ids = np.stack([rng.permutation(experts)[:used] for _ in range(tokens)]).astype(np.int32)
    ids[0] = experts - 1 - np.arange(used)
    return ids


def check_experts(vulkan, found, w, y, ids, matrix):
    """found (tokens, used, rows); y (tokens, used or 1, n); ids (tokens, used)."""
    for e in np.unique(ids):
        tokens, places = np.nonzero(ids == e)
        columns = y[tokens, places % y.shape[1]]
        check(vulkan, found[tokens, places], Weights(w.qtype.name, w.packed[e]), columns, matrix)


@pytest.mark.parametrize("tokens, used", [(1, 8), (1, 1), (3, 4), (8, 2), (9, 3), (40, 2), (130, 4)])
@pytest.mark.parametrize("name", KINDS)
def test_hundreds_of_experts(vulkan, name, tokens, used):
    """Up to eight tokens by matrix x vector. Activations are each expert's own, or all experts' of a token."""
    rng = np.random.default_rng(tokens)
    n, rows, experts = 3 * size_of(name), 21, 300
    w = random_weights(rng, name, experts, rows, n, scales=moderate(rng))
    ids = routed(rng, experts, used, tokens)
    for shared in sorted({1, used}):
        y = rng.standard_normal((tokens, shared, n), np.float32)
        found = vulkan("mul_mat_id", w.operand(), numbers(y), numbers(ids)).view(np.float32).reshape(tokens, used, rows)
        check_experts(vulkan, found, w, y, ids, tokens > COLUMNS)


@pytest.mark.parametrize("tokens", [2, 70])
@pytest.mark.parametrize("name", KINDS)
def test_a_view_of_experts(vulkan, name, tokens):
    """Experts from where a device may begin to read. Ids are the first few of all in order, as in llama.cpp."""
    rng = np.random.default_rng(tokens)
    n, rows, experts, used, skipped = 2 * size_of(name), 35, 9, 3, 64
    w = random_weights(rng, name, skipped + experts, rows, n, scales=moderate(rng))
    matrix, row = w.packed.strides[:2]
    view = w.operand(view=((n, rows, experts), row, matrix, experts * matrix, skipped * matrix))
    ids = np.stack([rng.permutation(experts) for _ in range(tokens)]).astype(np.int32)
    first = numbers(ids, view=((used, tokens), ids.strides[0], ids.nbytes, ids.nbytes, 0))
    y = rng.standard_normal((tokens, used, n), np.float32)
    found = vulkan("mul_mat_id", view, numbers(y), first).view(np.float32).reshape(tokens, used, rows)
    check_experts(vulkan, found, Weights(name, w.packed[skipped:]), y, ids[:, :used], tokens > COLUMNS)
