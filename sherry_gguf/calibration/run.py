"""One calibration, from its arguments to the exported directory."""

import argparse
import contextlib
import copy
import hashlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from tqdm import tqdm

from sherry_gguf.errors import Stop
from sherry_gguf.qat.hf_export import export
from sherry_gguf.qat.linear import full_precision
from sherry_gguf.qat.trainer import bf16_is_faster
from sherry_gguf.training.files import differences, locked, replacing, undamaged, write
from sherry_gguf.training.run import check_target

from . import distillation, layers, models, streams, training
from .sequences import Source
from .streams import Streams

SETTINGS, RECORD, DISTILLED = "settings.json", "layers.jsonl", "distilled.pt"  # in --work
REPORT = "calibration.json"  # in --output
HELD_OUT = 1 / 16  # of the sequences, at least one: to show what training does
MOST_HELD_OUT = 16  # of the sequences for distillation
FREE = "output", "work", "device"  # arguments that may change when a run is continued
LATER = "steps", "train", "distill_rate", "distill_batch"  # nothing of the layers depends on them


def run(a: argparse.Namespace) -> int:
    """Calibrate, distil and export; returns the exit status. Raises Stop, OSError, MemoryError, signals.Interrupted."""
    transformers.utils.logging.set_verbosity_warning()
    check_target(a.output, a.work, "--output")
    for folder in filter(Path.is_dir, map(Path, a.text)):
        for flag, path in ("--output", a.output), ("--work", a.work):
            if path.resolve().is_relative_to(folder.resolve()):
                raise Stop(f"{flag} {path} is in {folder}, which is read as text: choose another place")
    a.work.mkdir(parents=True, exist_ok=True)
    with locked(a.work, "--work"), _memory():
        return Calibration(a).run()


@contextlib.contextmanager
def _memory():
    """PyTorch's errors about memory as MemoryError, about a file as OSError."""
    try:
        yield
    except RuntimeError as e:
        if isinstance(e, torch.OutOfMemoryError) or "allocate memory" in str(e):
            raise MemoryError(f"not enough memory ({str(e).splitlines()[0]}): for the layers, start again with a smaller --batch and "
                              "another --work; for the distillation, use --train scales or a smaller --distill-batch") from e  # fmt: skip
        if "PytorchStreamWriter failed" in str(e):  # its name for a full disk
            raise OSError(f"--work: {str(e).splitlines()[0]}") from e
        raise
    except safetensors.SafetensorError as e:
        raise OSError(f"--work: {e}") from e


class Calibration:
    """One run: what it has loaded, and where it keeps what is done."""

    def __init__(self, a: argparse.Namespace):
        self.a, self.began, self.device = a, time.monotonic(), models.device(a.device)
        self.bf16 = self._bf16()
        self.model, self.names = models.quantized(a)
        self.tokenizer = models.tokenizer(a, self.model)
        if a.steps or a.generated:
            layers.check_head(self.model)
        if a.generated and getattr(self.model, "_is_stateful", False):
            raise Stop(f"{type(self.model).__name__} keeps a state besides keys and values, so it cannot write text here: leave out "
                       "--generated")  # fmt: skip
        fingerprint = models.fingerprint(self.model)
        self.source = Source(a, self.tokenizer, fingerprint)
        self._check_settings(fingerprint, self.source.text_for_layers)
        if self.source.lacks():
            self._write()
        self.ids = self.source.for_layers()
        self.held_out = max(1, round(HELD_OUT * len(self.ids)))  # the last ones
        kinds = streams.KINDS if a.inputs == streams.QUANTIZED else (streams.FULL,)
        self.streams = Streams(a.work, kinds, len(self.ids), a.context, self.model.config.get_text_config().hidden_size)
        text = [f"{self.source.bytes_per_token:.2f} bytes a token"] * bool(a.text)
        text += [f"{self.source.generated[0]} written by the model"] * bool(a.generated)
        print(f"text: {self.ids.numel()} tokens in sequences of {a.context}, {self.held_out} of {len(self.ids)} held out; "
              f"{'; '.join(text)}", flush=True)  # fmt: skip
        print(f"calibrating: {self.model.num_parameters() / 1e6:.1f} M parameters, {len(self.names)} matrices in "
              f"{len(layers.find(self.model))} layers, {'bfloat16' if self.bf16 else 'float32'} products on {self.device}",
              flush=True)  # fmt: skip

    def _bf16(self) -> bool:
        """Whether to multiply in bfloat16; what was measured once stays."""
        if self.a.bf16 != "auto":
            return self.a.bf16 == "true"
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # `_check_settings` says what is wrong
            return bool(json.loads((self.a.work / SETTINGS).read_text())["bf16"])
        return self.device.type != "cpu" or bf16_is_faster()

    def _check_settings(self, fingerprint: str, text: torch.Tensor) -> None:
        """Raises Stop if --work was begun with other settings, another model or text."""
        now = {k: v for k, v in vars(self.a).items() if k not in FREE}
        now["prompts"] = hashlib.sha256(repr(self.source.prompts).encode()).hexdigest() if self.source.prompts else None
        now |= {"bf16": self.bf16, "weights": fingerprint, "sequences": hashlib.sha256(text.numpy().tobytes()).hexdigest()}
        now, mark = json.loads(json.dumps(now)), self.a.work / SETTINGS
        if mark.exists():
            with undamaged(mark, f"remove {self.a.work} to start over"):
                then = dict(json.loads(mark.read_text()))
            if other := differences(then, {k: v for k, v in now.items() if k not in LATER}):
                raise Stop(f"{self.a.work} was begun with other settings ({other}): choose another --work, or remove it")
            if (path := self.a.work / DISTILLED).exists() and (other := differences(then, now)):
                raise Stop(f"{path} was begun with other settings ({other}): remove that file to distil the calibrated layers again")
        write(mark, json.dumps(now, indent=2) + "\n")

    def _write(self) -> None:
        """Let the model write its sequences. Only one model is in memory at a time."""
        self.model = None
        model = models.load(self.a)
        self.source.write(model.to(self.device, torch.bfloat16 if self.bf16 else torch.float32))
        del model
        self.model, _ = models.quantized(self.a)

    def run(self) -> int:
        record = self.train_layers()
        report: dict[str, Any] = {"settings": json.loads((self.a.work / SETTINGS).read_text()), "layers": record}
        if self.a.steps:
            report["distillation"] = self.distil()
        else:
            self._load_all(settled=True)
        report["seconds"] = round(time.monotonic() - self.began, 1)
        path = export(self.model, self.a.output, self.tokenizer)
        write(path / REPORT, json.dumps(report, indent=2) + "\n")
        print(f"calibrated: {path}", flush=True)
        return 0

    # ---- layers ----

    @torch.no_grad()
    def train_layers(self) -> list[dict]:
        """Train the layers that are not done yet; returns each one's record. Raises Stop."""
        modules = layers.find(self.model)
        record = self._done(len(modules))
        if len(record) == len(modules):
            return record
        self.model.to(self.device)
        with full_precision(self.model), training.precision(self.device, self.bf16):
            calls = layers.calls(self.model, self.a.context)
        if not self.streams.exist(0) and not record:
            self._embed()
        for i in range(len(record), len(modules)):
            record.append(self._layer(i, calls[i]))
            write(self.a.work / RECORD, "".join(json.dumps(found) + "\n" for found in record))
            self.streams.drop(i)  # what the record has not got yet would be needed again
            print(_line(record[-1], len(modules)), flush=True)
        self.streams.drop(len(modules))
        return record

    def _done(self, count: int) -> list[dict]:
        """The records of the layers, of `count`, that are complete."""
        path, found = self.a.work / RECORD, []
        if path.exists():
            with undamaged(path, f"remove {self.a.work} to start over"):
                found = [json.loads(line) for line in path.read_text().splitlines()]
        layer = len(found)
        if 0 < layer < count and not self.streams.exist(layer):
            raise Stop(f"{self.a.work} lacks the hidden states before layer {layer + 1}: remove it to start over")
        for i in range(layer + (layer == count)):
            self.streams.drop(i)
        if layer:
            print(f"continuing after {layer} layers", flush=True)
        return found

    def _weights(self, i: int) -> Path:
        return self.a.work / f"layer-{i:03}.safetensors"

    def _load_all(self, settled: bool) -> None:
        """Load the calibrated layers; settled: as they are used, small; otherwise their latent weights, in float32."""
        for i, module in enumerate(layers.find(self.model)):
            with undamaged(self._weights(i), f"remove {self.a.work} to start over"):
                module.float().load_state_dict(safetensors.torch.load_file(self._weights(i)))
            if settled:
                models.settle(module)

    def _embed(self) -> None:
        kinds = self.streams.kinds
        with tqdm(total=len(kinds) * math.ceil(len(self.ids) / self.a.batch), desc="embedding", leave=False) as bar:
            for kind in kinds:
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

        with tqdm(total=len(self.streams.kinds) * batches, desc=f"layer {i + 1}", leave=False) as bar:
            with full_precision(module):
                self.streams.write(streams.FULL, i + 1, a.batch, lambda b, e: through(streams.FULL, b, e), bar.update)
            task = training.Task(layer, self.streams.read(a.inputs, i), self.streams.read(streams.FULL, i + 1),
                                 len(self.ids) - self.held_out, a.batch, self.bf16, self.device)  # fmt: skip
            bar.total += task.steps(a.passes) + (task.steps(1) if a.start == "feedback" else 0)
            errors, kept = self._train(task, i, bar)
            if streams.QUANTIZED in self.streams.kinds:
                self.streams.write(streams.QUANTIZED, i + 1, a.batch, lambda b, e: through(streams.QUANTIZED, b, e), bar.update)
        with replacing(self._weights(i)) as part:
            safetensors.torch.save_file({k: v.contiguous() for k, v in module.state_dict().items()}, part)
        models.settle(module)
        return {"layer": i, "errors": errors, "kept": kept, "seconds": round(time.monotonic() - began, 1)}

    def _train(self, task: training.Task, i: int, bar: tqdm) -> tuple[dict[str, float], str]:
        """Quantize a layer; returns its held-out errors by what was done to it, and which of them is the least, which it then has."""
        a, module = self.a, task.layer.module
        errors: dict[str, float] = {}

        def advance(loss: float) -> None:
            bar.set_postfix_str(f"error {loss:.4f}", refresh=False)
            bar.update()

        ways: dict[str, Callable[[], None]] = {"rounded": lambda: None}
        if a.start == "feedback":
            ways["feedback"] = lambda: task.start_from_feedback(bar.update)
        if a.passes:
            ways["trained"] = lambda: task.train(a.rate, a.passes, a.seed + i, advance)
        best, kept = module.state_dict(), ""
        for name, change in ways.items():
            with contextlib.suppress(torch.linalg.LinAlgError):  # feedback on inputs that are not finite
                change()
            errors[name] = task.held_out_error()
            if math.isfinite(errors[name]) and (not kept or errors[name] < errors[kept]):
                best, kept = copy.deepcopy(module.state_dict()), name
            else:
                module.load_state_dict(best)
        if not kept:
            raise Stop(f"layer {i + 1} of {self.a.model} does not give finite numbers, even without training: is the model intact?")
        return errors, kept

    # ---- distillation ----

    def distil(self) -> dict:
        """Train the whole model; returns the divergences on held-out text, before and after. Raises Stop."""
        a = self.a
        ids = self.source.for_distillation(self.ids)
        held_out = min(MOST_HELD_OUT, max(1, round(HELD_OUT * len(ids))))  # the first ones
        states = self._teach(ids)
        self._load_all(settled=a.train == "scales")
        self.model.to(self.device)
        modules = layers.find(self.model)
        fixed = distillation.fix_codes(self.model) if a.train == "scales" else {}
        self.model.float()
        every = layers.Head(self.model)
        special = [i for i in self.tokenizer.all_special_ids if i < len(every.weight)]
        used = distillation.vocabulary(
            ids, torch.tensor(special, dtype=torch.int64), distillation.likely(every, states[-MOST_HELD_OUT:]).cpu()
        )
        head = layers.Head(self.model, used.to(self.device))
        d = distillation.Distillation(a.steps, a.distill_batch, a.distill_rate, self.bf16, a.seed)
        for module in (*modules, head.norm):
            training.let_train(module, matrices=a.train == "weights")

        def measure() -> float:
            return distillation.mean_divergence(self.model, every, ids[:held_out], states[:held_out], d)

        before = measure()
        with tqdm(total=a.steps, desc="distilling") as bar:

            def advance(done: int, loss: float) -> None:
                bar.set_postfix_str(f"{loss:.4f} nats", refresh=False)
                bar.update(done - bar.n)

            distillation.distil(self.model, head, fixed, ids[held_out:], states[held_out:], d, a.work / DISTILLED, advance)
        distillation.round_scales(fixed)
        after = measure()
        if not after < before:
            raise distillation.Diverged(f"the distillation made it worse: KL divergence from full precision {before:.4f} before, "
                                        f"{after:.4f} nats a token after. Use a smaller --distill-rate, or --steps 0; remove "
                                        f"{a.work / DISTILLED} first")  # fmt: skip
        distillation.release(fixed)
        print(f"distilled: {a.steps} steps, KL divergence from full precision {before:.4f} before, {after:.4f} nats a token after "
              "(held out)", flush=True)  # fmt: skip
        return {"tokens": ids[held_out:].numel(), "vocabulary": len(used), "before": before, "after": after}

    @torch.no_grad()
    def _teach(self, ids: torch.Tensor) -> torch.Tensor:
        """The full-precision model's hidden states after its norm, bfloat16 (n, context, hidden), for tokens (n, context)."""
        a, shape = self.a, (*ids.shape, self.streams.shape[-1])
        path = a.work / f"teacher-{hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16]}.states"
        if not path.exists():
            if (a.work / DISTILLED).exists():
                raise Stop(f"{a.work / DISTILLED} was begun on other text: remove that file to distil the calibrated layers again")
            self.model = None  # only one model is in memory at a time
            body = layers.body(models.load(a).float().to(self.device))

            def compute(b: int, e: int) -> torch.Tensor:
                with training.precision(self.device, self.bf16):
                    return body(input_ids=ids[b:e].to(self.device), use_cache=False).last_hidden_state

            with tqdm(total=math.ceil(len(ids) / a.batch), desc="full precision", leave=False) as bar:
                streams.write(path, shape, a.batch, compute, bar.update)
            del body
            self.model, _ = models.quantized(a)
        return streams.read(path, shape)


def to_float(value: Any) -> Any:
    """Floating-point tensors in a layer's arguments, such as position embeddings, as float32."""
    if isinstance(value, torch.Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {k: to_float(v) for k, v in value.items()}
    return type(value)(to_float(v) for v in value) if isinstance(value, (tuple, list)) else value


def _line(record: dict, count: int) -> str:
    errors = ", ".join(f"{value:.4f} {name}" for name, value in record["errors"].items())
    instead = f"; kept {record['kept']}" if record["kept"] != list(record["errors"])[-1] else ""
    return f"layer {record['layer'] + 1} of {count}: error {errors}{instead} ({record['seconds']:.0f} s)"
