"""A pytest plugin for the tests of the training command: a text, a model to start from, and the flags of a small run."""

import random
from pathlib import Path

import pytest
import small_models


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    rng = random.Random(0)
    for i in range(12):
        lines = [f"    {rng.choice('abc')} = {rng.choice('xyz')} + {rng.randrange(10)}" for _ in range(150)]
        (folder / f"{i:02}.txt").write_text("\n".join(["def f(x, y, z):", *lines]))
    return folder


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    return small_models.make(tmp_path_factory.mktemp("start") / "llama", "llama", latent=True)


def flags(start: Path, text: Path, out: Path, **more) -> list[str]:
    settings = dict(model=start, train=text, output_dir=out, context=64, max_steps=6, per_device_train_batch_size=2,
                    learning_rate=1e-3, monitor_every=2, logging_steps=2, use_cpu=True, eval_tokens=512, report_to="none",
                    validation_share=0.2, arenas_peak=1) | more  # fmt: skip
    return [x for k, v in settings.items() if v is not None for x in (f"--{k}", *(v if isinstance(v, list) else [str(v)]))]
