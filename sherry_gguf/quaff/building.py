"""The fine-tuning command's model: loaded, quantized, with an adapter."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch

from sherry_gguf.errors import Stop
from sherry_gguf.packed import PackedLinear, load_gguf
from sherry_gguf.training.models import check_fit, load_float32, load_tokenizer, positions, repair_generation_config, stop_at_errors

from . import rows
from .arguments import FinetuneArguments, budgets_of
from .channels import KEEP, Channels, calibrate, linear_layers
from .models import quantize_for_finetuning
from .parsing import Arguments

CHANNELS = "channels.safetensors"  # in --output_dir and in the result
NEED_CHANNELS = "quaff", "static"
PROMPTS = "prompt", "p-tuning"  # adapters whose virtual tokens come before each sequence


def load_model(s: FinetuneArguments) -> tuple[Any, Any]:
    """The frozen model as it is stored, and its tokenizer. Raises Stop, also if --target fits none of its layers."""
    path, tokenizer = Path(s.model), None
    if path.is_file():
        if s.tokenizer:
            load_tokenizer(s.tokenizer)  # an error names it
        with stop_at_errors(s.model):
            packed: Any = load_gguf(path, tokenizer=s.tokenizer or None)
        model, tokenizer = packed
    else:
        model = load_float32(s.model)
    if tokenizer is None:
        tokenizer = load_tokenizer(s.tokenizer or s.model)
    if s.chat_template:
        tokenizer.chat_template = Path(s.chat_template).read_text(encoding="utf-8")
    if path.exists():
        model.name_or_path = os.path.abspath(path)  # what the adapter names as its model
    repair_generation_config(model)
    check_fit(model, tokenizer, s.tokenizer or s.model, s.context, FinetuneArguments.context)
    if s.keep and not any(re.search(s.keep, name) for name in linear_layers(model)):
        raise Stop(f"--keep {s.keep!r}: no layer to quantize has such a name; one is {next(iter(linear_layers(model)), 'not there')}")
    if s.target and not targets(s, model):
        raise Stop(f"--target {s.target!r}: no linear layer has such a name")
    return model, tokenizer


def targets(s: FinetuneArguments, model: Any) -> list[str]:
    """The linear layers that --target names."""
    return [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and re.search(s.target, name)]


def base_of(s: FinetuneArguments, model: Any) -> str:
    """How weights are stored: --base, or what suits the model. Raises Stop if they cannot be stored so."""
    packed = any(isinstance(m, PackedLinear) for m in model.modules())
    sherry = getattr(model.config, "sherry_config", None)
    weights = sherry.get("weights") if isinstance(sherry, dict) else None
    if packed and (s.base == "int8" or s.method not in ("quaff", "naive")):
        raise Stop(f"{s.model} is packed: it trains with --base tq1_25 and --method quaff or naive")
    if weights == "latent":
        raise Stop(f"{s.model} holds latent weights of a training that has not ended: fine-tune its export")
    if s.base != "auto":
        return s.base
    return "tq1_25" if packed or (weights == "fake_quantized" and s.method in ("quaff", "naive")) else "int8"


def known_channels(s: FinetuneArguments, args: Arguments, resumed: bool) -> Path | None:
    """The file of channels that need no calibration. The first process of a machine calibrates, the others read what it saved."""
    kept = args.directory / CHANNELS
    if s.channels:
        return Path(s.channels)
    return kept if kept.is_file() and (resumed or args.local_process_index) else None


def outlier_channels(s: FinetuneArguments, args: Arguments, model: Any, table: rows.Rows, collate: rows.Collate, resumed: bool) -> Channels:
    """Load --channels or what a resumed run saved; otherwise calibrate and save. Raises Stop."""
    kept = args.directory / CHANNELS
    if path := known_channels(s, args, resumed):
        try:
            return Channels.load(path)
        except ValueError as e:
            raise Stop(str(e) if s.channels else f"{e}; remove {kept} to calibrate again") from e
    sample = table.train.shuffle(seed=0).select(range(min(len(table.train), s.calibration_rows)))
    try:
        channels = calibrate(model, rows.batches(sample, collate, args.per_device_train_batch_size, "calibrating"),
                             threshold=s.threshold, budget=s.budget, budgets=budgets_of(s.budgets), **kept_layers(s))  # fmt: skip
    except ValueError as e:
        raise Stop(str(e)) from e
    channels.save(kept)
    return channels


def quantized(s: FinetuneArguments, model: Any, channels: Channels | None, base: str) -> Any:
    """The frozen model. Raises Stop."""
    try:
        return quantize_for_finetuning(model, channels, base, method=s.method, granularity=s.granularity, gamma=s.gamma, **kept_layers(s))
    except ValueError as e:
        raise Stop(str(e)) from e


def kept_layers(s: FinetuneArguments) -> dict[str, str]:
    """`keep` for quaff's functions."""
    return {"keep": f"{s.keep}|{KEEP}"} if s.keep else {}


def with_adapter(s: FinetuneArguments, model: Any) -> peft.PeftModel:
    """The model with an adapter that trains. Raises Stop."""
    target = targets(s, model) if s.target else None
    if s.adapter in PROMPTS and s.context + s.virtual_tokens > (most := positions(model)):
        raise Stop(
            f"--context {s.context} with --virtual_tokens {s.virtual_tokens}: the model's positions end at {most}. Lower one of them"
        )
    hidden = model.config.get_text_config().hidden_size
    configs: dict[str, Callable[[], peft.PeftConfig]] = {
        "lora": lambda: peft.LoraConfig(r=s.rank, lora_alpha=s.alpha, lora_dropout=s.dropout, target_modules=target or "all-linear",
                                        task_type="CAUSAL_LM"),
        "ia3": lambda: peft.IA3Config(target_modules=target, feedforward_modules=None if target is None else
                                      [name for name in target if model.get_submodule(name).in_features > hidden], task_type="CAUSAL_LM"),
        "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=s.virtual_tokens, task_type="CAUSAL_LM"),
        "p-tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=s.virtual_tokens,
                                                     encoder_hidden_size=hidden,
                                                     task_type="CAUSAL_LM"),
    }  # fmt: skip
    try:
        return peft.get_peft_model(model, configs[s.adapter]())
    except ValueError as e:  # an architecture without PEFT's defaults
        raise Stop(f"--adapter {s.adapter}: {e}; see --target") from e
