"""Read a GGUF with TQ1_25, TQ1_25_64 or STQ1_0 tensors: list the tensors, dequantize one, and look at its blocks.

.venv/bin/python examples/read_gguf.py build/demo/demo-TQ1_25.gguf
"""

import sys

import sherry_gguf

model = sherry_gguf.read_gguf(sys.argv[1])  # all files, if it is a split; ConvertError if it is damaged
print(f"{model.fields['general.architecture']}, {len(model.tensors)} tensors")
for name, tensor in model.tensors.items():
    print(f"{name:28} {tensor.type.name:9} {' x '.join(map(str, tensor.shape))}")  # rows x inputs

kinds = sherry_gguf.gguf_type.TYPES  # "TQ1_25", "TQ1_25_64" and "STQ1_0" to the block type
name, tensor = next((name, t) for name, t in model.tensors.items() if t.type.name in kinds)
kind = kinds[tensor.type.name]
b = tensor.read()  # uint8 (rows, bytes a row); read(start, count) reads some rows
lanes, scales = kind.unpack(b)  # int8 (rows, n) of -1, 0, +1; float16 (rows, n / kind.size)
weights = sherry_gguf.dequantize(b, kind=kind)  # float32 (rows, n)
print(f"{name}: {weights.shape[0]} rows of {weights.shape[1]}, {b.nbytes} bytes")
print(f"first weights: lanes {lanes[0, :4]} times {scales[0, 0]:.4g} = {weights[0, :4].round(4)}")
print(f"zeros: {(lanes == 0).mean():.0%}; scales from {scales.min():.4g} to {scales.max():.4g}")
