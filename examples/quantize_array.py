"""Quantize an array to TQ1_25 and back: the size, what it costs, and that 3:4 sparse ternary weights cost nothing.

.venv/bin/python examples/quantize_array.py
"""

import numpy as np

import sherry_gguf

rng = np.random.default_rng(0)
x = rng.standard_normal((4, 256), np.float32)  # rows are multiples of 128
b = sherry_gguf.quantize(x)  # uint8 (4, 44)
y = sherry_gguf.dequantize(b)  # float32 (4, 256): each weight 0 or ±d, one d for 128 weights
print(f"{x.nbytes} bytes of float32 became {b.nbytes}: {8 * b.nbytes / x.size} bits a weight")
print(f"relative error {np.linalg.norm(y - x) / np.linalg.norm(x):.3f}: random weights were not trained for this")
print(f"first group of four: {x[0, :4].round(2)} became {y[0, :4].round(2)}")

# Ternary weights survive bit for bit. TQ1_25 is the NumPy reference, which the C kernels agree with.
exact = sherry_gguf.TQ1_25.is_exact  # bool (4, 2): one for each block
print(f"blocks stored exactly: {exact(x).sum()} of 8 before, {exact(y).sum()} of 8 when quantized again")
assert np.array_equal(sherry_gguf.quantize(y), b) and np.array_equal(sherry_gguf.TQ1_25.quantize(x), b)

activations = rng.standard_normal(256, np.float32)
for isa in sherry_gguf.kernels.available():
    product = sherry_gguf.kernels.vec_dot(b[0], activations, isa=isa)
    print(f"row 0 · activations, {isa}: {product:.4f} (float32: {y[0] @ activations:.4f})")
