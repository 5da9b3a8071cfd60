"""One calibration, from its arguments to the exported directory."""

import argparse
import copy
import hashlib
import json
import math
import re
import time
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from tqdm import tqdm

from sherry_gguf.errors import Stop
from sherry_gguf.qat.hf_export import export
from sherry_gguf.qat.linear import AUTO, QuantConfig, full_precision, prepare, quantized_layers
from sherry_gguf.qat.trainer import bf16_is_faster
from sherry_gguf.training.files import differences, locked, undamaged, write
from sherry_gguf.training.models import check_fit, load_tokenizer, repair_generation_config, stop_at_errors
from sherry_gguf.training.run import check_target

from . import distillation, layers, streams, training
from .sequences import Source
from .streams import Streams

SETTINGS, RECORD, DISTILLED = "settings.json", "layers.jsonl", "distilled.pt"  # in --work
REPORT = "calibration.json"  # in --output
HELD_OUT = 1 / 16  # of the sequences, at least one: to show what training does, which never sees them
MOST_HELD_OUT = 64  # of the sequences for distillation
FREE = "output", "work", "device"  # arguments that may change when a run is continued


def run(a: argparse.Namespace) -> int:
    """Calibrate, distil and export; returns the exit status. Raises Stop, OSError, signals.Interrupted."""
    transformers.utils.logging.set_verbosity_warning()
    check_target(a.output, a.work, "--output")
    a.work.mkdir(parents=True, exist_ok=True)
    with locked(a.work, "--work"):
        return Calibration(a).run()


class Calibration:
    """One run: what it has loaded, and where it keeps what is done."""

    def __init__(self, a: argparse.Namespace):
        self.a, self.began = a, time.monotonic()
        self.device = torch.device(a.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.bf16 = a.bf16 == "true" or (a.bf16 == "auto" and (self.device.type != "cpu" or bf16_is_faster()))
        self.model, self.tokenizer = load(a)
        self.source = Source(a, self.tokenizer, self._generator)
        self.ids = self.source.take(a.tokens // a.context)
        self.held_out = max(1, round(HELD_OUT * len(self.ids)))  # the last ones
        config = self.model.config.get_text_config()
        self.streams = Streams(a.work, len(self.ids), a.context, config.hidden_size)
        self._check_settings()
        try:
            self.names = prepare(self.model, QuantConfig(group_size=a.group_size or AUTO), a.keep)
        except (ValueError, re.error) as e:
            raise Stop(f"--keep {a.keep!r}: {e}" if isinstance(e, re.error) else str(e)) from e
        self.model.eval().requires_grad_(False)
        print(f"text: {self.ids.numel()} tokens in sequences of {a.context}, {self.held_out} of {len(self.ids)} held out; "
              f"{self.source}", flush=True)  # fmt: skip
        print(f"calibrating: {self.model.num_parameters() / 1e6:.1f} M parameters, {len(self.names)} matrices in "
              f"{len(layers.find(self.model))} layers, {'bfloat16' if self.bf16 else 'float32'} products on {self.device}",
              flush=True)  # fmt: skip

    def _check_settings(self) -> None:
        """Raises Stop if --work was begun with other settings or text."""
        now = {k: v for k, v in vars(self.a).items() if k not in FREE} | {"tokens": hashlib.sha256(self.ids.numpy().tobytes()).hexdigest()}
        now, mark = json.loads(json.dumps(now)), self.a.work / SETTINGS
        later = {"steps", "train", "distill_rate"}  # nothing of the layers depends on them
        if mark.exists():
            with undamaged(mark, f"remove {self.a.work} to start over"):
                then = json.loads(mark.read_text())
            if (self.a.work / DISTILLED).exists():
                later = set()
            if other := differences(then, {k: v for k, v in now.items() if k not in later}):
                raise Stop(f"{self.a.work} was begun with other settings ({other}): choose another --work, or remove it")
        write(mark, json.dumps(now, indent=2) + "\n")

    def run(self) -> int:
        record = self.train_layers()
        report: dict[str, Any] = {"settings": json.loads((self.a.work / SETTINGS).read_text()), "layers": record}
        if self.a.steps:
            report["distillation"] = self.distil()
        report["seconds"] = round(time.monotonic() - self.began, 1)
        path = export(self.model, self.a.output, self.tokenizer)
        write(path / REPORT, json.dumps(report, indent=2) + "\n")
        print(f"calibrated: {path}", flush=True)
        return 0

    # ---- layers ----

    @torch.no_grad()
    def train_layers(self) -> list[dict]:
        """Train the layers that are not done yet, and load those that are; returns each one's record. Raises Stop."""
        modules, record = layers.find(self.model), self._done()
        if len(record) < len(modules):
            self.model.to(self.device)
            calls = layers.calls(self.model, self.a.context)
            if not self.streams.exist(0) and not record:
                self._embed()
        for i in range(len(record)):
            self._load(i, modules[i])
            settle(modules[i])
        for i in range(len(record), len(modules)):
            record.append(self._layer(i, calls[i]))
            write(self.a.work / RECORD, "".join(json.dumps(found) + "\n" for found in record))
            self.streams.drop(i)  # what the record has not got yet would be needed again
            print(_line(record[-1], len(modules)), flush=True)
        return record

    def _done(self) -> list[dict]:
        """The records of the layers that are complete."""
        path, found = self.a.work / RECORD, []
        if path.exists():
            with undamaged(path, f"remove {self.a.work} to start over"):
                found = [json.loads(line) for line in path.read_text().splitlines()]
        layer = len(found)
        if layer and not self.streams.exist(layer):
            raise Stop(f"{self.a.work} lacks the hidden states before layer {layer}: remove it to start over")
        for i in range(layer):
            self.streams.drop(i)
        if layer:
            print(f"continuing after {layer} layers", flush=True)
        return found

    def _weights(self, i: int) -> Path:
        return self.a.work / f"layer-{i:03}.safetensors"

    def _load(self, i: int, module: torch.nn.Module) -> None:
        with undamaged(self._weights(i), f"remove {self.a.work} to start over"):
            module.float().load_state_dict(safetensors.torch.load_file(self._weights(i)))

    def _embed(self) -> None:
        with tqdm(total=2 * math.ceil(len(self.ids) / self.a.batch), desc="embedding", leave=False) as bar:
            for kind in "full", "quantized":
                self.streams.write(kind, 0, self.a.batch, lambda b, e: layers.embed(self.model, self.ids[b:e].to(self.device)), bar.update)

    def _layer(self, i: int, layer: layers.Layer) -> dict:
        """Train a layer, write its outputs and weights; returns its record."""
        a, began, module = self.a, time.monotonic(), layer.module
        module.float()
        layer = layers.Layer(module, to_float(layer.args), to_float(layer.kwargs))
        batches = math.ceil(len(self.ids) / a.batch)

        def through(kind: str, b: int, e: int) -> torch.Tensor:
            with training.precision(self.device, self.bf16):
                return layer(self.streams.read(kind, i)[b:e].to(self.device).float())

        with tqdm(total=2 * batches, desc=f"layer {i + 1}", leave=False) as bar:
            with full_precision(module):
                self.streams.write("full", i + 1, a.batch, lambda b, e: through("full", b, e), bar.update)
            task = training.Task(layer, self.streams.read("quantized", i), self.streams.read("full", i + 1), len(self.ids) - self.held_out,
                                 a.batch, self.bf16, self.device)  # fmt: skip
            bar.total += task.steps(a.passes) + (task.steps(1) if a.start == "feedback" else 0)
            errors = self._train(task, a.seed + i, bar)
            self.streams.write("quantized", i + 1, a.batch, lambda b, e: through("quantized", b, e), bar.update)
        part = self._weights(i).with_suffix(".part")
        safetensors.torch.save_file({k: v.contiguous() for k, v in module.state_dict().items()}, part)
        part.rename(self._weights(i))
        settle(module)
        return {"layer": i, "errors": errors, "seconds": round(time.monotonic() - began, 1)}

    def _train(self, task: training.Task, seed: int, bar: tqdm) -> dict[str, float]:
        """Quantize a layer; returns its held-out errors by what was done to it."""
        a, module = self.a, task.layer.module
        errors = {"rounded": task.held_out_error()}
        if a.start == "feedback":
            before = copy.deepcopy(module.state_dict())
            task.start_from_feedback(bar.update)
            errors["feedback"] = task.held_out_error()
            if errors["feedback"] > errors["rounded"]:
                module.load_state_dict(before)
        if a.passes:

            def advance(loss: float) -> None:
                bar.set_postfix_str(f"error {loss:.4f}", refresh=False)
                bar.update()

            task.train(a.rate, a.passes, seed, advance)
            errors["trained"] = task.held_out_error()
        return errors

    # ---- distillation ----

    def distil(self) -> dict:
        """Train the whole model; returns the divergences on held-out text, before and after."""
        a, modules = self.a, layers.find(self.model)
        ids = self.source.take(a.steps * a.batch, self.ids)
        held_out = min(MOST_HELD_OUT, max(1, round(HELD_OUT * len(ids))))  # the first ones
        states = self._teach(ids)
        self.model.float()
        if a.train == "weights":
            for i, module in enumerate(modules):
                self._load(i, module)
        self.model.to(self.device)
        used = torch.unique(ids).to(self.device)
        head = layers.Head(self.model, used)
        head.check(self.model, ids[:1].to(self.device))
        d = distillation.Distillation(a.steps, a.batch, a.distill_rate, a.train, self.bf16, a.seed)
        for module in (*modules, head.norm):
            module.requires_grad_(True)

        def measure() -> float:
            return distillation.mean_divergence(self.model, head, ids[:held_out], states[:held_out], d)

        before = measure()
        with tqdm(total=a.steps, desc="distilling") as bar:

            def advance(done: int, loss: float) -> None:
                bar.set_postfix_str(f"{loss:.4f} nats", refresh=False)
                bar.update(done - bar.n)

            distillation.distil(self.model, head, ids[held_out:], states[held_out:], d, a.work / DISTILLED, advance)
        after = measure()
        print(f"distilled: {a.steps} steps, KL divergence from full precision {before:.4f} before, {after:.4f} nats a token after "
              "(held out)", flush=True)  # fmt: skip
        return {"tokens": ids[held_out:].numel(), "vocabulary": len(used), "before": before, "after": after}

    def _generator(self) -> Any:
        """The full-precision model, as it computes fastest."""
        model, _ = load(self.a)
        return model.to(self.device, torch.bfloat16 if self.bf16 else torch.float32).eval()

    @torch.no_grad()
    def _teach(self, ids: torch.Tensor) -> torch.Tensor:
        """The full-precision model's hidden states after its norm, bfloat16 (n, context, hidden), for tokens (n, context)."""
        a, shape = self.a, (*ids.shape, self.streams.shape[-1])
        path = a.work / f"teacher-{hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16]}.states"
        if not path.exists():
            teacher, _ = load(a)
            body = layers.body(teacher.float().to(self.device).eval())

            def compute(b: int, e: int) -> torch.Tensor:
                with training.precision(self.device, self.bf16):
                    return body(input_ids=ids[b:e].to(self.device), use_cache=False).last_hidden_state

            with tqdm(total=math.ceil(len(ids) / a.batch), desc="full precision", leave=False) as bar:
                streams.write(path, shape, a.batch, compute, bar.update)
        return streams.read(path, shape)


@torch.no_grad()
def settle(module: torch.nn.Module) -> None:
    """Make a finished layer small: its weights as they are used, in float16, which holds them exactly."""
    for m in quantized_layers(module).values():
        m.weight.data = m.quantized_weight()
    module.half()


def to_float(value: Any) -> Any:
    """Floating-point tensors in a layer's arguments, such as position embeddings, as float32."""
    if isinstance(value, torch.Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {k: to_float(v) for k, v in value.items()}
    return type(value)(to_float(v) for v in value) if isinstance(value, (tuple, list)) else value


def _line(record: dict, count: int) -> str:
    errors = ", ".join(f"{value:.4f} {name}" for name, value in record["errors"].items())
    return f"layer {record['layer'] + 1} of {count}: error {errors} ({record['seconds']:.0f} s)"


def load(a: argparse.Namespace) -> tuple[Any, Any]:
    """The model, in its own dtype, and its tokenizer. Raises Stop."""
    with stop_at_errors(a.model):
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(a.model, dtype="auto", output_loading_info=True)
    model, info = loaded
    if lacking := sorted([*info["missing_keys"], *(str(m[0]) for m in info["mismatched_keys"])]):
        raise Stop(f"{a.model} lacks {len(lacking)} of the model's tensors, or has them in other shapes, the first {lacking[0]}")
    tokenizer = load_tokenizer(name := a.tokenizer or a.model)
    repair_generation_config(model)
    check_fit(model, tokenizer, name, a.context, 512)
    return model, tokenizer
