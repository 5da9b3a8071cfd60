"""Train 3:4 sparse ternary weights in a training loop of your own, without the Trainer, and store them without loss.

.venv/bin/python examples/train_loop.py
"""

import torch

import sherry_gguf
from sherry_gguf.qat import prepare, quantized_layers

STEPS = 300


def mlp() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(128, 256), torch.nn.GELU(), torch.nn.Linear(256, 128))


torch.manual_seed(0)
teacher, model = mlp(), mlp()
print("quantized layers:", *prepare(model))  # before the optimizer; the parameters stay the same objects
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
for step in range(STEPS):
    # With Arenas, here: set_residual(model, arenas.at(step, STEPS), arenas.rescale)
    x = torch.randn(64, 128)
    loss = torch.nn.functional.mse_loss(model(x), teacher(x).detach())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
    if step % 100 == 0 or step == STEPS - 1:
        print(f"step {step:3}: loss {loss.item():.4f}")

model.eval()
for name, layer in quantized_layers(model).items():
    weight = layer.quantized_weight().detach().numpy()  # float32 (out, in), as the forward pass uses it
    assert sherry_gguf.TQ1_25.is_exact(weight).all()
    print(f"layer {name}: {weight.size} weights in {sherry_gguf.quantize(weight).nbytes} bytes, every block exact")
# A transformers model: sherry_gguf.qat.export(model, "DIR", tokenizer), then `sherry-gguf convert DIR --require-exact`.
