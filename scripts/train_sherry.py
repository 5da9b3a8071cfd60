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


def interrupted() -> int:
    print("train_sherry: interrupted; run the same command again to go on", file=sys.stderr, flush=True)
    return 128 + signal.SIGINT


def fail(e: BaseException) -> int:
    print(f"train_sherry: {e}", file=sys.stderr, flush=True)
    return 1


if __name__ == "__main__":  # the imports take seconds, and an exception would come out of their middle
    signal.signal(signal.SIGINT, lambda *_: os._exit(interrupted()))
# PyTorch's threads wait for each other by spinning. Not to do so makes a step five times faster beside other work, and
# a third slower alone.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
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
from sherry_gguf.qat import text
from sherry_gguf.qat.data import labelled, mean_loss, pack
from sherry_gguf.qat.export import appearing
from sherry_gguf.qat.quantizer import GRANULARITIES, GROUP_SIZE, METHODS

RECORD = "training.json"  # in the export
STAGE = "exporting"  # directory in --output_dir, in which the export is made and evaluated
LOCK = "lock"  # file in --output_dir, locked while a process trains there
NO_SPACE = 1 << 26  # free bytes of a disk, below which a failure to write is put down to it
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
    train: list[str] = flag("text to train on: files (a document each; .jsonl, .parquet: a row each; .gz) or directories", [])
    validation: list[str] = flag("held-out text, in the same way; without it a share of the training documents", [])
    dataset: str = flag("instead of --train, the name of a data set for datasets.load_dataset", "")
    dataset_config: str = flag("the data set's configuration", "")
    text_column: str = flag("the column of the text in tables and data sets", "text")
    special_tokens: bool = flag("take the names of special tokens in the text, as of a chat template, for these tokens", False)
    validation_share: float = flag("share of the documents that is held out where no validation text is given", 0.01)
    context: int = flag("tokens of a training sequence", 1024)
    eval_tokens: int = flag("held-out tokens that are evaluated, at most", 1 << 17)
    method: str = flag("how to quantize; all but sherry are there to compare with", "sherry", choices=list(METHODS))
    granularity: str = flag("which weights share a scale", "per_group", choices=list(GRANULARITIES))
    group_size: int = flag("of per_group; TQ1_25 stores multiples of 128", GROUP_SIZE)
    keep: str = flag("regular expression: layers that stay in full precision, besides head and routers", "")
    only: str = flag("regular expression: layers that are quantized, all others stay", "")
    arenas_peak: float = flag("highest λ of Arenas, the residual λ·X·W; 1 as published, 0 trains without", 0.0)
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
    logging_nan_inf_filter: bool = dataclasses.field(default=False, metadata={"help": "log 0 for a loss that is not finite"})

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
    """datasets.Dataset of blocks: the column input_ids, lists of `context` tokens."""
    column, context, split = s.text_column, s.context, not s.special_tokens
    end, bos = tokenizer.eos_token_id, tokenizer.bos_token_id

    def tokenize(batch):
        encoded = tokenizer([text or "" for text in batch[column]], add_special_tokens=False, return_attention_mask=False,
                            split_special_tokens=split, verbose=False)  # fmt: skip
        ids = np.concatenate([np.array([*x, *([end] if end is not None else [])], np.int32) for x in encoded["input_ids"]])
        return {"input_ids": pack(ids, context, bos)}

    return texts.map(tokenize, batched=True, batch_size=DOCUMENTS, remove_columns=texts.column_names)


def digest(*tables) -> str:
    """Of the tokens of tables of blocks: a run must go on with those that it began with."""
    sum = hashlib.blake2b(digest_size=16)
    for table in tables:
        sum.update(b"%d" % len(table))
        for chunk in table.data.column("input_ids").chunks:
            sum.update(np.ascontiguousarray(chunk.flatten().to_numpy(zero_copy_only=False)))
    return sum.hexdigest()


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
                raise Stop(f"{s.model} lacks {len(lacking)} of the model's tensors, or has them in other shapes, the first "
                           f"{sorted(lacking)[0]}")
        else:
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(s.config), dtype=torch.float32)
    tokenizer = load_tokenizer(name := s.tokenizer or s.model or s.config)
    mend_generation(model)
    if (n := len(tokenizer)) > (m := model.get_input_embeddings().num_embeddings):
        raise Stop(f"the tokenizer {name} has {n} tokens, the model room for {m}: they do not belong together")
    said = getattr(model.config, "sherry_config", None)
    if isinstance(said, dict) and said.get("weights") == "fake_quantized":
        print("train_sherry: the model's weights are ternary already (an export): their latent weights, with which training "
              "goes on better, are in the checkpoints of the run that made it", file=sys.stderr)
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
        raise Stop(f"{name}: {type(e).__name__}: {e}") from e


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
            raise Stop(f"the loss is not finite at step {state.global_step}: training diverged. Use a lower --learning_rate; "
                       f"checkpoints before that are in {args.output_dir}")


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
             "num_train_epochs gradient_accumulation_steps world_size optim optim_args optim_target_modules weight_decay "
             "adam_beta1 adam_beta2 adam_epsilon max_grad_norm label_smoothing_factor neftune_noise_alpha group_by_length "
             "train_sampling_strategy dataloader_drop_last average_tokens_across_devices ignore_data_skip seed data_seed bf16 "
             "fp16 load_best_model_at_end metric_for_best_model greater_is_better")
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
                raise Stop(f"{checkpoint} has no {name}, so training cannot go on from it (--save_only_model?): begin anew from "
                           f"its weights, with --model {checkpoint} and another --output_dir")
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


def run(s: SherryArguments, args: Arguments) -> int:
    out = Path(s.export or Path(args.output_dir) / "hf")
    transformers.utils.logging.set_verbosity_warning()
    check(s, args)
    for folder in map(Path, (*s.train, *s.validation)):
        if folder.is_dir() and Path(args.output_dir).resolve().is_relative_to(folder.resolve()):
            raise Stop(f"--output_dir {args.output_dir} is in {folder}, which is read as text: choose another place")
    now = settings(s, args)
    checkpoint = resume_from(args, now)
    if args.process_index:
        return train_and_export(s, args, out, now, checkpoint)
    check_target(out, args)
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    with open(Path(args.output_dir) / LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Stop(f"another run is training in {args.output_dir}: wait for it, or choose another --output_dir") from None
        return train_and_export(s, args, out, now, checkpoint)


def train_and_export(s: SherryArguments, args: Arguments, out: Path, now: dict, checkpoint: Path | None) -> int:
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
    if args.dataloader_drop_last and len(train) < args.train_batch_size * args.world_size:
        raise Stop(f"--dataloader_drop_last: the text has {len(train)} sequences, less than one batch")
    now = now | {"text": digest(train, held_out)}
    begun = checkpoint.resolve().parent if checkpoint else Path(args.output_dir)
    check_settings(begun, now, bool(checkpoint))
    held_out = held_out.shuffle(seed=0).select(range(max(1, min(len(held_out), s.eval_tokens // s.context))))
    teacher = load_teacher(s, tokenizer, torch.bfloat16 if args.bf16 else torch.float32) if s.teacher else None

    monitor = qat.TrainingMonitor(s.monitor_every) if s.monitor_every and names else None
    interrupt = Interrupt()
    try:
        trainer = qat.SherryTrainer(
            model, args, data_collator=collate, train_dataset=train, eval_dataset=held_out, processing_class=tokenizer,
            arenas=arenas if names else None, monitor=monitor, teacher=teacher, distill=s.distill, temperature=s.temperature,
            callbacks=[interrupt])
    except (ValueError, ImportError, RuntimeError) as e:  # what is not installed, or does not go together
        raise Stop(f"{type(e).__name__}: {e}") from e
    trainer.remove_callback(PrinterCallback if args.disable_tqdm else ProgressCallback)
    if not args.disable_tqdm:
        trainer.add_callback(Progress)
    if main_process:
        if not checkpoint or not (Path(args.output_dir) / "settings.json").is_file():
            write(Path(args.output_dir) / "settings.json", now)
        tokenizer.save_pretrained(args.output_dir)
        sequences = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        print(f"training: {model.num_parameters() / 1e6:.1f} M parameters, {len(names)} matrices by {s.method}, sequences of "
              f"{s.context} tokens, {sequences} a step, {len(train)} to train on and {len(held_out)} held out, "
              f"{args.world_size} process{'es' * (args.world_size > 1)} on {args.device.type}", flush=True)
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
            raise Stop(f"cannot go on from {checkpoint} ({type(e).__name__}: {e})"
                       + f": remove it to go on from an earlier one, or remove {args.output_dir} to start over" * here) from e
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
        write(stage / RECORD, {"settings": now, "loss": {"train": last, "held_out": loss}, "steps": steps,
                               "seconds": round(seconds, 1)})  # fmt: skip
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


def main(argv: list[str] | None = None) -> int:
    parser = HfArgumentParser((SherryArguments, Arguments), description=__doc__)
    try:
        s, args, rest = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    except (ValueError, ImportError, RuntimeError) as e:  # of TrainingArguments
        parser.error(str(e))
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return run(s, args)
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
