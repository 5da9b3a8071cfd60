"""Read a GGUF with TQ1_25 tensors: list the tensors, dequantize one, and look at its blocks.

.venv/bin/python examples/read_gguf.py build/demo/demo-TQ1_25.gguf
"""

import sys

from sherry_gguf import gguf_type, tq1_25

gguf = gguf_type.register()  # the published gguf package, which knows the types from here on
reader = gguf.GGUFReader(sys.argv[1])
for tensor in reader.tensors:
    print(f"{tensor.name:28} {tensor.tensor_type.name:7} {' x '.join(map(str, tensor.shape))}")  # the row's length first

tensor = next(t for t in reader.tensors if t.tensor_type.name == tq1_25.NAME)
lanes, scales = tq1_25.unpack(tensor.data)  # int8 (rows, n) of -1, 0, +1; float16 (rows, n / 128)
weights = gguf.quants.dequantize(tensor.data, tensor.tensor_type)  # float32 (rows, n)
print(f"{tensor.name}: {weights.shape[0]} rows of {weights.shape[1]}, {tensor.data.nbytes} bytes")
print(f"first group: lanes {lanes[0, :4]} times {scales[0, 0]:.4g} = {weights[0, :4].round(4)}")
print(f"zeros: {(lanes == 0).mean():.0%}; scales from {scales.min():.4g} to {scales.max():.4g}")
