"""The training command's models: the one that trains, its tokenizer, and its teacher."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sherry_gguf.errors import Stop
from sherry_gguf.training.models import check_fit, load_float32, load_tokenizer, positions, repair_generation_config, stop_at_errors, warn

from .arguments import SherryArguments


def load(s: SherryArguments):
    """The model, in float32, and its tokenizer. Raises Stop."""
    if bool(s.model) == bool(s.config):
        raise Stop("give a model to start from, --model DIR, or the config of a new one, --config DIR")
    if s.model:
        model = load_float32(s.model)  # bfloat16 loses small optimizer steps; --bf16 makes only the products bfloat16
        if getattr(model, "is_quantized", False):
            with stop_at_errors(s.model):
                model = model.dequantize()
    else:
        with stop_at_errors(s.config):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(s.config), dtype=torch.float32)
    tokenizer = load_tokenizer(name := s.tokenizer or s.model or s.config)
    repair_generation_config(model)
    check_fit(model, tokenizer, name, s.context, SherryArguments.context)
    sherry = getattr(model.config, "sherry_config", None)
    if isinstance(sherry, dict) and sherry.get("weights") == "fake_quantized":
        warn("the model's weights are already ternary (an export). Better continue from the latent weights in its run's checkpoints")
    return model, tokenizer


def load_teacher(s: SherryArguments, tokenizer, dtype: torch.dtype):
    """Raises Stop if it cannot teach this model."""
    with stop_at_errors(s.teacher):
        teacher = AutoModelForCausalLM.from_pretrained(s.teacher, dtype=dtype)
    if s.context > (most := positions(teacher)):
        raise Stop(f"--context {s.context}: the teacher's positions end at {most}")
    try:
        other = AutoTokenizer.from_pretrained(s.teacher).get_vocab()
    except Exception:  # it may have none
        return teacher
    if other != tokenizer.get_vocab():
        raise Stop(f"--teacher {s.teacher} has another tokenizer, so its probabilities belong to other tokens")
    return teacher
