#!/usr/bin/env python3
"""Train a causal language model with 3:4 sparse ternary weights (Sherry), and export it as a Hugging Face directory.

    train_sherry.py --model DIR --train text/ --output_dir run             # quantization-aware training of a model
    train_sherry.py --config DIR --tokenizer DIR --train a.jsonl --output_dir run           # from scratch

Besides its own flags it takes those of transformers' TrainingArguments, and runs under torchrun and accelerate launch.
Ctrl-C saves a checkpoint; the same command goes on from the last one in --output_dir. At the end the model is exported to
--export, evaluated there as it was saved, and training.png shows loss, Arenas' λ and the effective rank.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path


def interrupted() -> int:
    print("train_sherry: interrupted; run the same command again to go on", file=sys.stderr, flush=True)
    return 128 + signal.SIGINT


if __name__ == "__main__":  # the imports take seconds, and an exception would come out of their middle
    signal.signal(signal.SIGINT, lambda *_: os._exit(interrupted()))
# PyTorch's threads wait for each other by spinning. Not to do so makes a step five times faster beside other work, and
# a third slower alone.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainingArguments,
)

from sherry_gguf import qat
from sherry_gguf.qat.arenas import DECAYS
from sherry_gguf.qat.data import labelled, mean_loss, pack
from sherry_gguf.qat.quantizer import GRANULARITIES, GROUP_SIZE, METHODS

TEXT = (".txt", ".md", ".rst", ".py")  # what a directory is searched for, besides these:
TABLES = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
RECORD = "training.json"  # in the export, and the last that is written
EXPORTING = "exporting.json"  # in --output_dir while an export is not complete: what is there then is ours to replace
DOCUMENTS = 1000  # tokenized at a time; between two such batches less than a block of tokens is dropped


class Stop(Exception):
    """What a person can mend; the message says how."""


def flag(help: str, default=None, **metadata):
    factory = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return dataclasses.field(**factory, metadata={"help": help, **metadata})


@dataclasses.dataclass
class SherryArguments:
    model: str = flag("model to start from: a Hugging Face directory or name", "")
    config: str = flag("config to make a model from scratch: a directory with config.json, or a name", "")
    tokenizer: str = flag("its tokenizer, where it is not the model's", "")
    train: list[str] = flag("text to train on: files (a document each; .jsonl and .parquet: a row each) or directories", [])
    validation: list[str] = flag("held-out text, in the same way; without it a share of the training documents", [])
    dataset: str = flag("instead of --train, the name of a data set for datasets.load_dataset", "")
    dataset_config: str = flag("the data set's configuration", "")
    text_column: str = flag("the column of the text in tables and data sets", "text")
    validation_share: float = flag("share of the documents that is held out where no validation text is given", 0.01)
    context: int = flag("tokens of a training sequence", 1024)
    eval_tokens: int = flag("held-out tokens that are evaluated, at most", 1 << 17)
    method: str = flag("how to quantize; all but sherry are there to compare with", "sherry", choices=list(METHODS))
    granularity: str = flag("which weights share a scale", "per_group", choices=list(GRANULARITIES))
    group_size: int = flag("of per_group; TQ1_25 stores multiples of 128", GROUP_SIZE)
    keep: str = flag("regular expression: layers that stay in full precision, besides head and routers", "")
    only: str = flag("regular expression: layers that are quantized, all others stay", "")
    arenas_peak: float = flag("highest λ of Arenas, the residual λ·X·W; 0 trains without", 1.0)
    arenas_warmup: float = flag("share of the steps in which λ rises", 0.1)
    arenas_decay: str = flag("how λ falls", "cosine", choices=list(DECAYS))
    arenas_end: float = flag("share of the steps after which λ is 0", 1.0)
    arenas_rescale: bool = flag("divide each layer's product by 1 + λ", False)
    teacher: str = flag("model to learn from, besides the text: a directory or name of the same vocabulary", "")
    distill: float = flag("the teacher's share in the loss", 0.5)
    temperature: float = flag("by which the logits are divided in that share", 1.0)
    monitor_every: int = flag("steps between two looks at effective rank and flips; 0 never looks", 50)
    export: str = flag("directory for the result (default: hf in --output_dir)", "")
    export_dtype: str = flag("of the result", "float16", choices=["float16", "float32"])


@dataclasses.dataclass
class Arguments(TrainingArguments):
    """The published recipe where transformers' defaults differ from it."""

    learning_rate: float = dataclasses.field(default=1e-4, metadata={"help": "highest learning rate"})
    lr_scheduler_type: str = dataclasses.field(default="cosine", metadata={"help": "how the learning rate falls"})
    warmup_ratio: float = dataclasses.field(default=0.05, metadata={"help": "share of the steps in which it rises"})
    logging_steps: float = dataclasses.field(default=10, metadata={"help": "steps between two log entries"})
    save_total_limit: int = dataclasses.field(default=2, metadata={"help": "checkpoints that are kept"})


    def __post_init__(self):
        if self.use_cpu and self.fsdp and self.fsdp_config is None:  # every process makes the same model; CPUs cannot sync it
            self.fsdp_config = {"sync_module_states": False}
        if self.report_to is None:  # transformers' default is all that are installed, some of which ask for an account
            self.report_to = ["tensorboard"] if _installed("tensorboard") else []
        super().__post_init__()


def _installed(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None


# ---------------------------------------------------------------------------------------------------------------- text


def documents(s: SherryArguments):
    """The training and the held-out documents, datasets.Dataset with a column of text. Raises Stop."""
    import datasets

    datasets.disable_progress_bars()
    if bool(s.train) == bool(s.dataset):
        raise Stop("give text to train on: --train FILE_OR_DIRECTORY ..., or --dataset NAME")
    if s.dataset:
        try:
            found = datasets.load_dataset(s.dataset, s.dataset_config or None)
        except Exception as e:  # no network, no such name, or whatever else a hub answers
            raise Stop(f"--dataset {s.dataset}: {type(e).__name__}: {e}") from e
        if "train" not in found:
            raise Stop(f"--dataset {s.dataset} has no split 'train', only {', '.join(found)}")
        train, held_out = found["train"], found.get("validation")
    else:
        train, held_out = _load(s.train, s), None
    if s.validation:
        held_out = _load(s.validation, s)
    for what in train, held_out:
        if what is not None and s.text_column not in what.column_names:
            raise Stop(f"the text has no column {s.text_column!r}, only {', '.join(what.column_names)}: see --text-column")
    if held_out is None:
        if len(train) < 2:
            raise Stop("one document cannot be both trained on and held out: give --validation text as well")
        split = train.train_test_split(max(1, round(len(train) * s.validation_share)), seed=0)
        train, held_out = split["train"], split["test"]
    return train, held_out


def _load(names: list[str], s: SherryArguments):
    import datasets

    files = []
    for path in map(Path, names):
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix in (*TEXT, *TABLES) and p.is_file())
            if not found:
                raise Stop(f"{path} has no files of text: {', '.join((*TEXT, *TABLES))}")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise Stop(f"{path}: no such file or directory")
    parts = []
    for kind in sorted({TABLES.get(p.suffix, "text") for p in files}):
        of_kind = [str(p) for p in files if TABLES.get(p.suffix, "text") == kind]
        more = {"sample_by": "document"} if kind == "text" else {}
        try:
            part = datasets.load_dataset(kind, data_files=of_kind, split="train", **more)
        except Exception as e:
            raise Stop(f"cannot read {', '.join(of_kind[:3])}{' ...' * (len(of_kind) > 3)}: {e.__cause__ or e}") from e
        if kind == "text" and s.text_column != "text":
            part = part.rename_column("text", s.text_column)
        if s.text_column in part.column_names:
            part = part.select_columns([s.text_column])
        parts.append(part)
    return datasets.concatenate_datasets(parts) if len(parts) > 1 else parts[0]


def blocks(texts, tokenizer, s: SherryArguments):
    """datasets.Dataset of blocks: the column input_ids, lists of `context` tokens."""
    end, bos = tokenizer.eos_token_id, tokenizer.bos_token_id

    def tokenize(batch):
        encoded = tokenizer([text or "" for text in batch[s.text_column]], add_special_tokens=False, return_attention_mask=False, verbose=False)
        ids = np.concatenate([np.array([*x, *([end] if end is not None else [])], np.int32) for x in encoded["input_ids"]])
        return {"input_ids": pack(ids, s.context, bos)}

    return texts.map(tokenize, batched=True, batch_size=DOCUMENTS, remove_columns=texts.column_names)


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    return labelled(torch.tensor([row["input_ids"] for row in rows]))


# ------------------------------------------------------------------------------------------------------------ training


def load(s: SherryArguments):
    """The model, in float32, and its tokenizer. Raises Stop."""
    if bool(s.model) == bool(s.config):
        raise Stop("give a model to start from, --model DIR, or a config to make one from scratch, --config DIR")
    with _telling(s.model or s.config):
        if s.model:
            # float32 on purpose: in bfloat16 small steps of the optimizer are lost; --bf16 makes the products bfloat16
            model = AutoModelForCausalLM.from_pretrained(s.model, dtype=torch.float32)
        else:
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(s.config), dtype=torch.float32)
    with _telling(name := s.tokenizer or s.model or s.config):
        tokenizer = AutoTokenizer.from_pretrained(name)
    if (n := len(tokenizer)) > (m := model.get_input_embeddings().num_embeddings):
        raise Stop(f"the tokenizer {name} has {n} tokens, the model room for {m}: they do not belong together")
    said = getattr(model.config, "sherry_config", None)
    if isinstance(said, dict) and said.get("weights") == "fake_quantized":
        print("train_sherry: the model's weights are ternary already (an export): their latent weights, with which training "
              "goes on better, are in the checkpoints of the run that made it", file=sys.stderr)
    return model, tokenizer


@contextlib.contextmanager
def _telling(name: str):
    try:
        yield
    except Exception as e:
        raise Stop(f"{name}: {type(e).__name__}: {e}") from e


class Finished(Exception):
    """The checkpoint that training went on from was of its last step; the Trainer would take one more."""


class Interrupt(TrainerCallback):
    """Ctrl-C and SIGTERM end training after the step, with a checkpoint; in every process after the same one.

    asked: of this process; agreed: of all, so that all leave training together; stepped: training has begun.
    """

    def __init__(self):
        self.asked = self.agreed = self.stepped = False

    def __enter__(self):
        self.before = {n: signal.signal(n, self._ask) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for n, handler in self.before.items():
            signal.signal(n, handler)

    def _ask(self, number, frame):
        self.asked = True

    def on_step_begin(self, args, state, control, **kwargs):
        self.stepped = True
        if state.global_step >= state.max_steps:
            raise Finished

    def on_step_end(self, args, state, control, **kwargs):
        self.agreed = self.asked
        if args.world_size > 1:
            asked = torch.tensor(int(self.asked), device=args.device)
            torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
            self.agreed = bool(asked)
        if self.agreed:
            control.should_save = control.should_training_stop = True


class Progress(ProgressCallback):
    """One bar with the loss beside it, for people; a line every ten seconds where no one watches."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.mininterval = 0.5 if sys.stderr.isatty() else 10
            self.training_bar.initial = self.training_bar.n = self.current_step = state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None:
            shown = {"loss": "loss", "eval_loss": "held-out", "residual": "λ"}
            text = [f"{name} {logs[key]:.3f}" for key, name in shown.items() if key in logs]
            if text:  # the last entry of all has none of these
                self.training_bar.set_postfix_str(", ".join(text), refresh=False)


def settings(s: SherryArguments, args: TrainingArguments) -> dict:
    """What a run that goes on must have in common with the one that began."""
    same = {k: v for k, v in vars(s).items() if k not in ("export", "export_dtype", "eval_tokens", "monitor_every")}
    names = ("learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_ratio warmup_steps per_device_train_batch_size max_steps "
             "num_train_epochs gradient_accumulation_steps world_size optim weight_decay adam_beta1 adam_beta2 adam_epsilon "
             "max_grad_norm label_smoothing_factor seed data_seed bf16 fp16")
    same |= {k: getattr(args, k) for k in names.split()}
    return json.loads(json.dumps(same, default=str))


def write(path: Path, value: dict) -> None:
    """JSON, whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(part, path)


def resume_from(args: TrainingArguments, now: dict) -> str | None:
    """The checkpoint to go on from, if this directory was begun with the same settings. Raises Stop."""
    directory = Path(args.output_dir)
    mark = directory / "settings.json"
    if mark.is_file():
        try:
            then = json.loads(mark.read_text(encoding="utf-8"))
            other = ", ".join(f"{k}: {then.get(k)} then, {v} now" for k, v in now.items() if then.get(k) != v)
        except (ValueError, AttributeError, OSError) as e:
            raise Stop(f"{mark} is damaged ({e}): remove {directory} to start over") from e
        if other:
            raise Stop(f"{directory} was begun with other settings ({other}): choose another --output_dir, or remove it")
    elif directory.exists() and (not directory.is_dir() or set(os.listdir(directory)) - {"settings.json.part"}):
        raise Stop(f"{directory} has something in it that is not of this program: choose another --output_dir")
    return args.resume_from_checkpoint or last_checkpoint(directory)


def exporting_to(args: TrainingArguments) -> str | None:
    """Where an earlier run was exporting to when it was cut off."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return json.loads((Path(args.output_dir) / EXPORTING).read_text(encoding="utf-8"))["to"]
    return None


def last_checkpoint(directory: Path) -> str | None:
    """The newest complete one: trainer_state.json is written last, so that one whose writing was cut off lacks it."""
    for path in sorted(directory.glob("checkpoint-*"), key=lambda p: -int(re.sub(r"\D", "", p.name) or 0)):
        with contextlib.suppress(OSError, ValueError):
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            return str(path)
    return None


def run(s: SherryArguments, args: Arguments) -> int:
    main_process = args.process_index == 0
    transformers.utils.logging.set_verbosity_warning()
    out = Path(s.export or Path(args.output_dir) / "hf")
    unfinished = exporting_to(args) == str(out.resolve())
    if not unfinished and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise Stop(f"{out} already has something in it: choose another --export, or remove it")
    now = settings(s, args)
    checkpoint = resume_from(args, now)
    if s.monitor_every == 1 or s.monitor_every < 0:
        raise Stop(f"--monitor-every {s.monitor_every}: 2 or more, or 0 to look at nothing")
    try:
        quant = qat.QuantConfig(s.method, s.granularity, s.group_size)
        arenas = qat.Arenas(s.arenas_peak, s.arenas_warmup, s.arenas_decay, s.arenas_end, s.arenas_rescale)
    except ValueError as e:
        raise Stop(str(e)) from e
    transformers.set_seed(args.seed)  # the Trainer does so only after the model is made
    model, tokenizer = load(s)
    if s.context > (most := getattr(model.config.get_text_config(), "max_position_embeddings", s.context)):
        raise Stop(f"--context {s.context}: the model's positions end at {most}")
    try:
        names = qat.prepare(model, quant, s.keep, s.only)
    except (ValueError, re.error) as e:
        raise Stop(str(e)) from e
    with args.main_process_first(desc="tokenizing"):
        train, held_out = (blocks(texts, tokenizer, s) for texts in documents(s))
    for what, found in ("to train on", train), ("held out", held_out):
        if not len(found):
            raise Stop(f"the text {what} is shorter than one context of {s.context} tokens: give more, or a smaller --context")
    held_out = held_out.shuffle(seed=0).select(range(max(1, min(len(held_out), s.eval_tokens // s.context))))
    teacher = None
    if s.teacher:
        with _telling(s.teacher):
            teacher = AutoModelForCausalLM.from_pretrained(s.teacher, dtype=torch.bfloat16 if args.bf16 else torch.float32)

    if main_process:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        if not (mark := Path(args.output_dir) / "settings.json").is_file():
            write(mark, now)
        tokenizer.save_pretrained(args.output_dir)
    monitor = qat.TrainingMonitor(s.monitor_every) if s.monitor_every and names else None
    interrupt = Interrupt()
    trainer = qat.SherryTrainer(
        model, args, data_collator=collate, train_dataset=train, eval_dataset=held_out, processing_class=tokenizer,
        arenas=arenas if names else None, monitor=monitor, teacher=teacher, distill=s.distill, temperature=s.temperature,
        callbacks=[interrupt])
    trainer.remove_callback(PrinterCallback if args.disable_tqdm else ProgressCallback)
    if not args.disable_tqdm:
        trainer.add_callback(Progress)
    if main_process:
        sequences = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        print(f"training: {model.num_parameters() / 1e6:.1f} M parameters, {len(names)} matrices by {s.method}, sequences of "
              f"{s.context} tokens, {sequences} a step, {len(train)} to train on and {len(held_out)} held out, "
              f"{args.world_size} process{'es' * (args.world_size > 1)} on {args.device.type}", flush=True)
        if checkpoint:
            print(f"training: going on from {checkpoint}", flush=True)
    began = time.monotonic()
    with interrupt:
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        except Finished:
            pass
        except Exception as e:
            if checkpoint and not interrupt.stepped:  # whatever a damaged file makes fail
                raise Stop(f"cannot go on from {checkpoint} ({type(e).__name__}: {e}): remove it to go on from an earlier one, "
                           f"or remove {args.output_dir} to start over") from e
            raise
    if interrupt.agreed:
        return interrupted() if main_process else 128 + signal.SIGINT
    seconds = time.monotonic() - began
    if main_process:
        plot(trainer.state.log_history, Path(args.output_dir) / "training.png")
    if main_process:
        if unfinished:
            shutil.rmtree(out, ignore_errors=True)
        write(Path(args.output_dir) / EXPORTING, {"to": str(out.resolve())})
    try:
        trainer.export(out, getattr(torch, s.export_dtype))
    except ValueError as e:  # not finite
        raise Stop(str(e)) from e
    if main_process:
        history, steps, rows = trainer.state.log_history, trainer.state.global_step, np.array(held_out["input_ids"])
        del trainer, model, teacher  # their memory
        exported = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).to(args.device)
        loss = mean_loss(exported, rows)
        last = next((entry["loss"] for entry in reversed(history) if "loss" in entry), None)
        write(out / RECORD, {"settings": now, "loss": {"train": last, "held_out": loss}, "steps": steps,
                             "seconds": round(seconds, 1)})  # fmt: skip
        (Path(args.output_dir) / EXPORTING).unlink()
        print(f"training: {steps} steps, held-out loss {loss:.4f} of what was exported to {out}", flush=True)
    return 0


# ---------------------------------------------------------------------------------------------------------------- plot


def plot(history: list[dict], path: Path) -> None:
    """Loss, Arenas' λ, effective ranks and flips, as far as they were logged, by step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def draw(axis, key, label, **style):
        points = [(e["step"], e[key]) for e in history if key in e]
        if points:
            axis.plot(*zip(*points), label=label, lw=1.3, **style)

    figure, (loss, rank, flips) = plt.subplots(3, 1, figsize=(9, 9), sharex=True)
    draw(loss, "loss", "training loss")
    draw(loss, "eval_loss", "held-out loss", marker="o", ms=3)
    loss.set_ylabel("nats a token")
    residual = loss.twinx()
    draw(residual, "residual", "λ", color="tab:green", ls="--")
    residual.set_ylabel("λ of Arenas")
    draw(rank, "gradient_rank", "of the gradients")
    draw(rank, "activation_rank", "of the layers' inputs")
    rank.set_ylabel("effective rank")
    draw(flips, "flips", "ternary values changed in a step")
    draw(flips, "sign_flips", "of them from + to - or back")
    draw(flips, "near_zeroing", "groups near another choice of the zero", ls=":")
    draw(flips, "near_sign", "latent weights near 0", ls=":")
    flips.set_ylabel("share")
    flips.set_yscale("log")
    flips.set_xlabel("optimizer step")
    for axis in loss, rank, flips:
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = HfArgumentParser((SherryArguments, Arguments), description=__doc__)
    s, args = parser.parse_args_into_dataclasses(argv)
    try:
        return run(s, args)
    except (Stop, OSError) as e:
        print(f"train_sherry: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return interrupted()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
