#!/usr/bin/env python3
"""Train a causal language model with 3:4 sparse ternary weights (Sherry), and
export it as a Hugging Face directory.

Besides its own flags it takes those of transformers' TrainingArguments, and
runs under torchrun and accelerate launch. Ctrl-C saves a checkpoint; the same
command goes on from the last one in --output_dir. At the end the model is
exported to --export and evaluated there as it was saved; training.png shows
loss, Arenas' λ and the effective rank.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import train_arguments
from train_arguments import RECIPE, SherryArguments


def interrupted() -> int:
    print("train_sherry: interrupted; run the same command again to go on", file=sys.stderr, flush=True)
    return 128 + signal.SIGINT


def warn(text: str) -> None:
    print(f"train_sherry: warning: {text}", file=sys.stderr, flush=True)


def fail(e: BaseException) -> int:
    print(f"train_sherry: {e}", file=sys.stderr, flush=True)
    return 1


if __name__ == "__main__":  # the imports take seconds, and an exception would come out of their middle
    signal.signal(signal.SIGINT, lambda *_: os._exit(interrupted()))
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(train_arguments.help_text(__doc__), end="")
        sys.exit()
# libgomp's threads wait for each other by spinning, which beside other work keeps the one that is waited for off its core. A
# step of the demo (AMD EPYC of family 25, 2 cores; medians, on a machine that others used too) beside two busy loops: spinning
# 5 to 6 s, this 0.9 to 1.1 s, GOMP_SPINCOUNT=1000 1.4 s, 10000 1.8 to 2.4 s, one thread 1.6 to 3 s. With little else to do:
# spinning 0.30 s, this 0.41 s (up to 0.57: both threads may share a core), one thread 0.52 s. Pinned threads (not measured)
# would meet those of another run on the same cores. libgomp reads it when PyTorch is loaded, and not later.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from tqdm import tqdm
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
from transformers.utils import is_torch_xla_available

from sherry_gguf import qat
from sherry_gguf.qat import text
from sherry_gguf.qat.data import labelled, mean_loss, pack
from sherry_gguf.qat.export import appearing

RECORD = "training.json"  # in the export
STAGE = "exporting"  # directory in --output_dir, in which the export is made and evaluated
LOCK = "lock"  # file in --output_dir, locked while a process trains there
START_TOKENS = 1 << 13  # held-out tokens that are evaluated before the first step
NEAR_GUESSING = 0.8  # of ln(vocabulary): a trained model whose loss is above that reads text that it does not know
SLOW_BF16 = 1.25  # times float32's time, from which on --bf16 on a CPU deserves a word
ESTIMATE_AFTER = 60  # seconds of training, after which a line says how long the rest will take
NO_SPACE = 1 << 26  # free bytes of a disk, below which a failure to write is put down to it
DOCUMENTS = 1000  # tokenized at a time; between two such batches less than a block of tokens is dropped


class Stop(Exception):
    """What a person can mend; the message says how."""


def recipe(name: str):
    default, help = RECIPE[name]
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass
class Arguments(TrainingArguments):
    """The published recipe where transformers' defaults differ from it."""

    learning_rate: float = recipe("learning_rate")
    lr_scheduler_type: str = recipe("lr_scheduler_type")
    warmup_ratio: float = recipe("warmup_ratio")
    logging_steps: float = recipe("logging_steps")
    save_total_limit: int = recipe("save_total_limit")
    logging_nan_inf_filter: bool = recipe("logging_nan_inf_filter")

    def __post_init__(self):
        if self.use_cpu and self.fsdp and self.fsdp_config is None:  # every process makes the same model; CPUs cannot sync it
            self.fsdp_config = {"sync_module_states": False}
        if self.report_to is None:  # transformers' default is all that are installed, some of which ask for an account
            self.report_to = ["tensorboard"] if _installed("tensorboard") else []
        cpu = self.use_cpu or self.no_cuda
        if (self.bf16 or self.bf16_full_eval) and not cpu and not torch.accelerator.is_available() and not is_torch_xla_available():
            # transformers says only that the set-up does not support it
            raise ValueError(
                "--bf16 true: PyTorch finds no GPU here; leave it out, or add --use_cpu true to compute in bfloat16 "
                "on the CPU, which is faster than float32 only where the CPU has instructions for it"
            )
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
    held_out = None
    try:
        if s.dataset:
            train, held_out = data_set(s)
        else:
            train = text.load(s.train, s.text_column)
        if s.validation:
            held_out = text.load(s.validation, s.text_column)
    except text.TextError as e:
        raise Stop(str(e)) from e
    if held_out is None:
        if len(train) < 2:
            raise Stop("one document cannot be both trained on and held out: give --validation text as well")
        share = max(1, round(len(train) * s.validation_share))
        split = train.train_test_split(min(share, len(train) - 1), seed=0)
        train, held_out = split["train"], split["test"]
    return train, held_out


def data_set(s: SherryArguments):
    """The splits `train` and `validation` (or None) of --dataset. Raises Stop."""
    import datasets

    try:
        found = datasets.load_dataset(s.dataset, s.dataset_config or None)
    except Exception as e:  # no network, no such name, or whatever else a hub answers
        raise Stop(f"--dataset {s.dataset}: {type(e).__name__}: {e}") from e
    if "train" not in found:
        raise Stop(f"--dataset {s.dataset} has no split 'train', only {', '.join(found)}")
    for split in found.keys() & {"train", "validation"}:
        features = found[split].features
        if s.text_column not in features:
            raise Stop(f"--dataset {s.dataset} has no column {s.text_column!r}, only {', '.join(features)}: see --text_column")
        if (kind := getattr(features[s.text_column], "dtype", "no string")) not in ("string", "large_string"):
            raise Stop(f"--dataset {s.dataset}: the column {s.text_column!r} is {kind}: see --text_column")
    return found["train"], found.get("validation")


def blocks(texts, tokenizer, s: SherryArguments):
    """datasets.Dataset of blocks: the column input_ids, lists of `context` tokens, and bytes_per_token of the text there."""
    column, context, split = s.text_column, s.context, not s.special_tokens
    end, bos = tokenizer.eos_token_id, tokenizer.bos_token_id

    def tokenize(batch):
        encoded = tokenizer([text or "" for text in batch[column]], add_special_tokens=False, return_attention_mask=False,
                            split_special_tokens=split, verbose=False)  # fmt: skip
        ids = np.concatenate([np.array([*x, *([end] if end is not None else [])], np.int32) for x in encoded["input_ids"]])
        packed = pack(ids, context, bos)
        size = sum(len(text.encode("utf-8", "surrogatepass")) for text in batch[column] if text)
        mean = size / max(1, sum(map(len, encoded["input_ids"])))  # the batch's: blocks do not keep where tokens come from
        return {"input_ids": packed, "bytes_per_token": [mean] * len(packed)}

    return texts.map(tokenize, batched=True, batch_size=DOCUMENTS, remove_columns=texts.column_names)


def digest(*tables) -> str:
    """Of the tokens of tables of blocks: a run must go on with those that it began with."""
    sum = hashlib.blake2b(digest_size=16)
    for table in tables:
        sum.update(b"%d" % len(table))
        for chunk in table.data.column("input_ids").chunks:
            sum.update(np.ascontiguousarray(chunk.flatten().to_numpy(zero_copy_only=False)))
    return sum.hexdigest()


def bytes_per_token(table) -> float:
    """Of the text of a table of blocks, in UTF-8, without the tokens that begin and end documents."""
    return float(np.mean(table.data.column("bytes_per_token").to_numpy()))


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
            model, info = AutoModelForCausalLM.from_pretrained(s.model, dtype=torch.float32, output_loading_info=True)
            if lacking := [*info["missing_keys"], *(str(m[0]) for m in info["mismatched_keys"])]:
                raise Stop(
                    f"{s.model} lacks {len(lacking)} of the model's tensors, or has them in other shapes, the first {sorted(lacking)[0]}"
                )
        else:
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(s.config), dtype=torch.float32)
    tokenizer = load_tokenizer(name := s.tokenizer or s.model or s.config)
    mend_generation(model)
    if (n := len(tokenizer)) > (m := model.get_input_embeddings().num_embeddings):
        raise Stop(f"the tokenizer {name} has {n} tokens, the model room for {m}: they do not belong together")
    said = getattr(model.config, "sherry_config", None)
    if isinstance(said, dict) and said.get("weights") == "fake_quantized":
        warn(
            "the model's weights are ternary already (an export): their latent weights, with which training goes on better, are "
            "in the checkpoints of the run that made it"
        )
    return model, tokenizer


def load_tokenizer(name: str):
    if os.path.isdir(name) and not any(p.name.startswith(("tokenizer", "vocab")) for p in Path(name).iterdir()):
        raise Stop(f"{name} has no tokenizer: name its directory with --tokenizer")
    with _telling(f"the tokenizer of {name}"):
        return AutoTokenizer.from_pretrained(name)


def mend_generation(model) -> None:
    """transformers refuses to save what some checkpoints, Llama 2 among them, have in generation_config.json."""
    generation = getattr(model, "generation_config", None)
    if generation is None:
        return
    with contextlib.suppress(ValueError):
        generation.validate(strict=True)
        return
    generation.do_sample = True  # as it was meant where there is a temperature or a top_p
    try:
        generation.validate(strict=True)
    except ValueError as e:
        raise Stop(f"the model's generation_config.json is wrong, and could not be saved: {e}") from e


def load_teacher(s: SherryArguments, tokenizer, dtype: torch.dtype):
    """Raises Stop where it cannot teach this model."""
    with _telling(s.teacher):
        teacher = AutoModelForCausalLM.from_pretrained(s.teacher, dtype=dtype)
    if s.context > (most := positions(teacher)):
        raise Stop(f"--context {s.context}: the teacher's positions end at {most}")
    try:
        other = AutoTokenizer.from_pretrained(s.teacher).get_vocab()
    except Exception:  # it may have none
        return teacher
    if other != tokenizer.get_vocab():
        raise Stop(f"--teacher {s.teacher} has another tokenizer: its probabilities would be those of other tokens")
    return teacher


def positions(model) -> float:
    """Tokens that it can see."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf


@contextlib.contextmanager
def _telling(name: str):
    try:
        yield
    except Stop:
        raise
    except Exception as e:
        raise Stop(f"{name}: {type(e).__name__}: {' '.join(str(e).split())}") from e


def before_training(s: SherryArguments, args: TrainingArguments, model, rows: np.ndarray, trained: bool) -> dict | None:
    """The held-out loss that training starts from, printed and returned for `RECORD`; None under DeepSpeed.

    full_precision: the loss of the model as it was given. It tells whether model, tokenizer and text belong together, and a
    warning says so where it is near that of guessing. With quantized weights the loss of a good model that is new to them is
    as bad as guessing, or worse, so it could not.
    quantized: the loss of what the first step computes.
    """
    if args.deepspeed:  # no process may have the whole model
        return None
    # Under FSDP the model is still on the CPU here, where a large one takes long.
    rows = rows[: 1 if args.fsdp else max(1, START_TOKENS // s.context)]
    batch = min(8, args.per_device_train_batch_size)
    with torch.random.fork_rng(devices=[args.device] if args.device.type == "cuda" else []):  # training's numbers stay its own
        with qat.full_precision(model):
            loss = mean_loss(model, rows, batch)
        quantized = mean_loss(model, rows, batch) if qat.quantized_layers(model) else loss
    given = "as it was given" if s.model else "of random weights"
    print(f"start: held-out loss before the first step ({rows.size} tokens): {loss:.4f} {given}"
          + f", {quantized:.4f} quantized by {s.method}" * (s.method != "full"), flush=True)  # fmt: skip
    vocabulary = model.get_input_embeddings().num_embeddings
    if s.model and trained and loss > NEAR_GUESSING * math.log(vocabulary):
        warn(
            f"before the first step the held-out loss of {s.model} is {loss:.2f}; guessing among its {vocabulary} tokens has "
            f"{math.log(vocabulary):.2f}. If it is a trained model, is {s.tokenizer or s.model} its tokenizer, and is the text "
            "of a kind that it knows?"
        )
    return {"full_precision": loss, "quantized": quantized, "tokens": rows.size}


class Finished(Exception):
    """The checkpoint that training went on from was of its last step; the Trainer would take one more."""


class Interrupt(TrainerCallback):
    """Ctrl-C, SIGTERM and SIGHUP end training after the step, with a checkpoint; in every process after the same one.

    A loss that is not finite ends it too, without one.

    asked: of this process; agreed: of all, so that all leave training together; stepped: training has begun.
    """

    def __init__(self):
        self.asked = self.agreed = self.stepped = False

    def __enter__(self):
        self.before = {n: signal.signal(n, self._ask) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
                       if signal.getsignal(n) != signal.SIG_IGN}  # fmt: skip
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

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not math.isfinite(logs.get("loss", 0.0)):  # a mean over the processes, so all of them see it
            raise Stop(
                f"the loss is not finite at step {state.global_step}: training diverged. Use a lower --learning_rate; "
                f"checkpoints before that are in {args.output_dir}"
            )


class Estimate(TrainerCallback):
    """Says once, a minute after training began, how long the rest will take, for those who watch no progress bar."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.began, self.first, self.said = time.monotonic(), state.global_step, not state.is_world_process_zero

    def on_step_end(self, args, state, control, **kwargs):
        seconds, done = time.monotonic() - self.began, state.global_step - self.first
        if self.said or seconds < ESTIMATE_AFTER:
            return
        self.said = True
        rest = (state.max_steps - state.global_step) * seconds / done
        tqdm.write(f"training: step {state.global_step} of {state.max_steps}, {seconds / done:.2f} s a step: about "
                   f"{duration(rest)} to go", file=sys.stdout)  # fmt: skip
        sys.stdout.flush()


def duration(seconds: float) -> str:
    """In the unit that says it in one or two digits."""
    units = ("days", 86400), ("hours", 3600), ("minutes", 60), ("seconds", 1)
    unit, size = next((u for u in units if seconds >= 2 * u[1]), units[-1])
    return f"{seconds / size:.0f} {unit}"


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
    names = (
        "learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_ratio warmup_steps per_device_train_batch_size max_steps "
        "num_train_epochs gradient_accumulation_steps world_size optim optim_args optim_target_modules weight_decay "
        "adam_beta1 adam_beta2 adam_epsilon max_grad_norm label_smoothing_factor neftune_noise_alpha group_by_length "
        "train_sampling_strategy dataloader_drop_last average_tokens_across_devices ignore_data_skip seed data_seed bf16 "
        "fp16 load_best_model_at_end metric_for_best_model greater_is_better"
    )
    same |= {k: getattr(args, k) for k in names.split() if hasattr(args, k)}
    return json.loads(json.dumps(same, default=str))


def write(path: Path, value: dict) -> None:
    """JSON, whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(part, path)


def resume_from(args: TrainingArguments, now: dict) -> Path | None:
    """The checkpoint to go on from, if its run was begun with the same settings. Raises Stop."""
    directory = Path(args.output_dir)
    if args.resume_from_checkpoint:
        checkpoint = Path(args.resume_from_checkpoint)
        if not complete(checkpoint):
            raise Stop(f"--resume_from_checkpoint {checkpoint}: there is no whole checkpoint of a Trainer")
    else:
        checkpoint = last_checkpoint(directory)
    begun = checkpoint.resolve().parent if checkpoint else directory
    check_settings(begun, now, bool(checkpoint))
    if begun.resolve() != directory.resolve():
        check_settings(directory, now, last_checkpoint(directory) is not None)
    ours = (directory / "settings.json").is_file()
    if not ours and directory.exists() and (not directory.is_dir() or set(os.listdir(directory)) - {"settings.json.part", LOCK}):
        raise Stop(f"{directory} has something in it that is not of this program: choose another --output_dir")
    if checkpoint and not (args.fsdp or args.deepspeed):  # which keep it in directories
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        random = "rng_state.pth" if args.world_size == 1 else f"rng_state_{args.process_index}.pth"
        for name in ("optimizer.pt", "scheduler.pt", random):
            if state["global_step"] < state["max_steps"] and not (checkpoint / name).is_file():
                raise Stop(
                    f"{checkpoint} has no {name}, so training cannot go on from it (--save_only_model?): begin anew from "
                    f"its weights, with --model {checkpoint} and another --output_dir"
                )
    return checkpoint


def check_settings(directory: Path, now: dict, begun: bool) -> None:
    """Raises Stop where the run in this directory has other settings, and has begun to train."""
    mark = directory / "settings.json"
    if not begun or not mark.is_file():
        return
    try:
        then = json.loads(mark.read_text(encoding="utf-8"))
        other = ", ".join(f"{k}: {then.get(k)} then, {v} now" for k, v in now.items() if then.get(k) != v)
    except (ValueError, AttributeError, OSError) as e:
        raise Stop(f"{mark} is damaged ({e}): remove {directory} to start over") from e
    if other:
        raise Stop(f"{directory} was begun with other settings ({other}): choose another --output_dir, or remove it")


def complete(checkpoint: Path) -> bool:
    """trainer_state.json is written last, so that one whose writing was cut off lacks it."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return {"global_step", "max_steps"} <= json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8")).keys()
    return False


def last_checkpoint(directory: Path) -> Path | None:
    """The newest complete one."""
    found = sorted(directory.glob("checkpoint-*"), key=lambda p: -int(re.sub(r"\D", "", p.name) or 0))
    return next(filter(complete, found), None)


def check(s: SherryArguments, args: Arguments) -> None:
    """Raises Stop for numbers with which nothing can be trained."""
    if s.monitor_every == 1 or s.monitor_every < 0:
        raise Stop(f"--monitor_every {s.monitor_every}: 2 or more, or 0 to look at nothing")
    if s.context < 2:
        raise Stop(f"--context {s.context}: at least 2 tokens, of which one is predicted")
    if not 0 < s.validation_share < 1:
        raise Stop(f"--validation_share {s.validation_share}: a share between 0 and 1")
    if s.eval_tokens < 1:
        raise Stop(f"--eval_tokens {s.eval_tokens}: at least 1")
    for name in "per_device_train_batch_size", "gradient_accumulation_steps":
        if getattr(args, name) < 1:
            raise Stop(f"--{name} {getattr(args, name)}: at least 1")
    if args.max_steps == 0 or (args.max_steps < 0 and not args.num_train_epochs > 0):
        raise Stop("--max_steps 0, or --num_train_epochs 0: there is nothing to train")


def check_target(out: Path, args: Arguments) -> None:
    """Raises Stop where the result could not be put in the end, before hours of work."""
    mine = Path(args.output_dir).resolve()
    if mine.is_relative_to(out.resolve()) or out.resolve() == mine / STAGE:
        raise Stop(f"--export {out}: that is for checkpoints; choose another directory, or one in it")
    try:
        with contextlib.suppress(InterruptedError), appearing(out):
            raise InterruptedError  # so that nothing appears
    except FileExistsError:
        raise Stop(f"{out} already has something in it: choose another --export, or remove it") from None
    except OSError as e:
        raise Stop(f"--export {out}: nothing can be written there ({e.strerror})") from e


def run(s: SherryArguments, args: Arguments, trained: bool) -> int:
    out = Path(s.export or Path(args.output_dir) / "hf")
    transformers.utils.logging.set_verbosity_warning()
    check(s, args)
    for folder in map(Path, (*s.train, *s.validation)):
        if folder.is_dir() and Path(args.output_dir).resolve().is_relative_to(folder.resolve()):
            raise Stop(f"--output_dir {args.output_dir} is in {folder}, which is read as text: choose another place")
    now = settings(s, args)
    checkpoint = resume_from(args, now)
    if args.process_index:
        return train_and_export(s, args, out, now, checkpoint, trained)
    check_target(out, args)
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    with open(Path(args.output_dir) / LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Stop(f"another run is training in {args.output_dir}: wait for it, or choose another --output_dir") from None
        return train_and_export(s, args, out, now, checkpoint, trained)


def train_and_export(s: SherryArguments, args: Arguments, out: Path, now: dict, checkpoint: Path | None, trained: bool) -> int:
    main_process = args.process_index == 0
    try:
        quant = qat.QuantConfig(s.method, s.granularity, s.group_size)
        arenas = qat.Arenas(s.arenas_peak, s.arenas_warmup, s.arenas_decay, s.arenas_end, s.arenas_rescale)
    except ValueError as e:
        raise Stop(str(e)) from e
    if not arenas.peak and arenas != qat.Arenas(peak=0.0):
        raise Stop("--arenas_peak is 0, which trains without Arenas: the other --arenas_ flags need one above it")
    transformers.set_seed(args.seed)  # the Trainer does so only after the model is made
    model, tokenizer = load(s)
    if s.context > (most := positions(model)):
        raise Stop(
            f"--context {s.context}{' (the default)' * (s.context == SherryArguments.context)}: the model's positions end at "
            f"{most}. Pass --context {most}, or less"
        )
    try:
        names = qat.prepare(model, quant, s.keep, s.only)
    except (ValueError, re.error) as e:
        raise Stop(str(e)) from e
    with args.main_process_first(desc="tokenizing"):
        train, held_out = (blocks(texts, tokenizer, s) for texts in documents(s))
    for what, found in ("to train on", train), ("held out", held_out):
        if not len(found):
            raise Stop(f"the text {what} is shorter than one context of {s.context} tokens: give more, or a smaller --context")
    if args.dataloader_drop_last and len(train) < args.train_batch_size * args.world_size:
        raise Stop(f"--dataloader_drop_last: the text has {len(train)} sequences, less than one batch")
    now = now | {"text": digest(train, held_out)}
    begun = checkpoint.resolve().parent if checkpoint else Path(args.output_dir)
    check_settings(begun, now, bool(checkpoint))
    density = {"train": bytes_per_token(train), "held_out": bytes_per_token(held_out)}
    held_out = held_out.shuffle(seed=0).select(range(max(1, min(len(held_out), s.eval_tokens // s.context))))
    teacher = load_teacher(s, tokenizer, torch.bfloat16 if args.bf16 else torch.float32) if s.teacher else None

    monitor = qat.TrainingMonitor(s.monitor_every) if s.monitor_every and names else None
    interrupt = Interrupt()
    try:
        trainer = qat.SherryTrainer(
            model,
            args,
            data_collator=collate,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=tokenizer,
            arenas=arenas if names else None,
            monitor=monitor,
            teacher=teacher,
            distill=s.distill,
            temperature=s.temperature,
            callbacks=[interrupt],
        )
    except (ValueError, ImportError, RuntimeError) as e:  # what is not installed, or does not go together
        raise Stop(f"{type(e).__name__}: {e}") from e
    trainer.add_callback(Estimate())
    trainer.remove_callback(PrinterCallback if args.disable_tqdm else ProgressCallback)
    if not args.disable_tqdm:
        trainer.add_callback(Progress)
    if main_process:
        if not checkpoint or not (Path(args.output_dir) / "settings.json").is_file():
            write(Path(args.output_dir) / "settings.json", now)
        print(f"text: {density['train']:.2f} bytes a token in the training text, {density['held_out']:.2f} in the held-out text",
              flush=True)  # fmt: skip
        if args.device.type == "cpu" and args.bf16 and (slower := qat.bf16_time()) > SLOW_BF16:
            warn(f"--bf16 true: on this CPU bfloat16 products take {slower:.3g} times as long as in float32: leave it out")
        before = before_training(s, args, model, np.array(held_out["input_ids"]), trained)
        sequences = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        print(
            f"training: {model.num_parameters() / 1e6:.1f} M parameters, {len(names)} matrices by {s.method}, sequences of "
            f"{s.context} tokens, {sequences} a step, {len(train)} to train on and {len(held_out)} held out, "
            f"{args.world_size} process{'es' * (args.world_size > 1)} on {args.device.type}",
            flush=True,
        )
        if checkpoint:
            print(f"training: going on from {checkpoint}", flush=True)
    began = time.monotonic()
    with interrupt:
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except Finished:
            if args.load_best_model_at_end and trainer.state.best_model_checkpoint:
                trainer._load_best_model()  # as the Trainer does at the end
        except (Stop, torch.OutOfMemoryError):
            raise
        except Exception as e:
            if interrupt.stepped:
                raise
            if not checkpoint:  # what is not installed, or does not go together
                raise Stop(f"training does not begin: {type(e).__name__}: {e}") from e
            here = not args.resume_from_checkpoint
            raise Stop(
                f"cannot go on from {checkpoint} ({type(e).__name__}: {e})"
                + f": remove it to go on from an earlier one, or remove {args.output_dir} to start over" * here
            ) from e
    if interrupt.agreed:
        return interrupted() if main_process else 128 + signal.SIGINT
    seconds = time.monotonic() - began
    stage = Path(args.output_dir) / STAGE
    if main_process:
        plot(trainer.state.log_history, Path(args.output_dir) / "training.png")
        for rest in stage, *stage.parent.glob(f".{STAGE}.*.part"):  # of an export that was cut off
            shutil.rmtree(rest, ignore_errors=True)
    try:
        trainer.export(stage, getattr(torch, s.export_dtype))
    except ValueError as e:  # not finite
        raise Stop(str(e)) from e
    if main_process:
        history, steps, rows = trainer.state.log_history, trainer.state.global_step, np.array(held_out["input_ids"])
        del trainer, model, teacher  # their memory
        exported = AutoModelForCausalLM.from_pretrained(stage, dtype=torch.float32).to(args.device)
        loss = mean_loss(exported, rows)
        last = next((entry["loss"] for entry in reversed(history) if "loss" in entry), None)
        write(stage / RECORD, {"settings": now, "loss": {"train": last, "held_out": loss}, "before": before,
                               "bytes_per_token": density, "steps": steps, "seconds": round(seconds, 1)})  # fmt: skip
        with appearing(out) as part:
            for path in stage.iterdir():
                shutil.move(path, part / path.name)
        stage.rmdir()
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
    if any("residual" in entry for entry in history):
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


class Parser(HfArgumentParser):
    """Our flags and the Trainer's. An error is one line, the status 2."""

    def __init__(self):
        super().__init__((SherryArguments, Arguments), prog="train_sherry")
        self.add_argument("--help-all", action=HelpAll, nargs=0, dest=argparse.SUPPRESS, default=argparse.SUPPRESS)

    def format_help(self) -> str:
        return train_arguments.help_text(__doc__)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (--help lists the flags)\n")


class HelpAll(argparse.Action):
    def __call__(self, parser, *_):
        trainer = HfArgumentParser(Arguments, add_help=False, usage=argparse.SUPPRESS)
        print(f"{parser.format_help()}\nall flags of transformers' TrainingArguments:\n{trainer.format_help()}", end="")
        parser.exit()


def parse(argv: list[str] | None) -> tuple[SherryArguments, Arguments]:
    parser = Parser()
    try:
        s, args, rest = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    except Exception as e:  # of TrainingArguments, which has one of many kinds for what its flags cannot be
        plain = isinstance(e, (ValueError, ImportError, RuntimeError))
        parser.error(str(e) if plain else f"{type(e).__name__}: {e}")
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return s, args


def main(argv: list[str] | None = None, trained: bool = True) -> int:
    """The exit status. trained: whether --model names a trained model; one with random weights may guess without a warning."""
    s, args = parse(argv)
    try:
        return run(s, args, trained)
    except (Stop, OSError) as e:
        return fail(e)
    except (SafetensorError, RuntimeError) as e:  # these are how safetensors and PyTorch say that nothing could be written
        free = shutil.disk_usage(args.output_dir).free if os.path.isdir(args.output_dir) else NO_SPACE
        if free >= NO_SPACE:
            raise
        return fail(Stop(f"{args.output_dir}: only {free / 1e6:.1f} MB are free there ({type(e).__name__}): make room, and run "
                         "the same command again"))  # fmt: skip
    except KeyboardInterrupt:
        return interrupted()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = main()
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank():
        # A thread of Gloo that lets go of a tensor while Python finalizes aborts the process, and torchrun then ends the
        # first one, which may still be evaluating the export. Trackers and files are the first one's alone. To destroy the
        # process group before is no cure: its end waits for that thread with the GIL held, which the thread waits for.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
