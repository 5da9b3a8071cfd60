"""A model's transformer layers, and how to call one without the others."""

import contextlib
import dataclasses
from typing import Any

import torch
from torch import nn

from sherry_gguf.errors import Stop


class _Reached(Exception):
    """The first layer has been reached; ends the forward pass."""


@dataclasses.dataclass
class Layer:
    """A transformer layer, and what it is called with besides the hidden states: the same for all sequences of one length."""

    module: nn.Module
    args: tuple
    kwargs: dict[str, Any]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Hidden states (batch, context, hidden) to those after the layer."""
        out = self.module(x, *self.args, **self.kwargs)
        return out[0] if isinstance(out, tuple) else out


def find(model: Any) -> nn.ModuleList:
    """The model's transformer layers. Raises Stop."""
    count = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and any(isinstance(m, nn.Linear) for m in module[0].modules()):
            return module
    raise Stop(f"{type(model).__name__}: no list of {count} transformer layers found in it, so it cannot be calibrated layer by layer")


@torch.no_grad()
def calls(model: Any, context: int) -> list[Layer]:
    """Each layer with its arguments for sequences of `context` tokens. Raises Stop."""
    found: dict[int, Layer] = {}

    def note(module, args, kwargs):
        kwargs = {k: v for k, v in kwargs.items() if k != "hidden_states"}
        found[id(module)] = Layer(module, args[1:], kwargs)

    modules = find(model)
    with contextlib.ExitStack() as hooks:
        for module in modules:
            hooks.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)
        ids = torch.zeros(1, context, dtype=torch.int64, device=model.device)
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    if len(found) != len(modules):
        raise Stop(
            f"{type(model).__name__} does not call each of its {len(modules)} layers once, so it cannot be calibrated layer by layer"
        )
    return [found[id(module)] for module in modules]


@torch.no_grad()
def embed(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """What the first layer gets for tokens (batch, context): hidden states (batch, context, hidden)."""
    got = []

    def note(module, args, kwargs):
        got.append(args[0] if args else kwargs["hidden_states"])
        raise _Reached

    hook = find(model)[0].register_forward_pre_hook(note, with_kwargs=True)
    try:
        with contextlib.suppress(_Reached):
            model(input_ids=ids, use_cache=False)
    finally:
        hook.remove()
    return got[0]


def body(model: Any) -> Any:
    """The model without its head."""
    found = model.get_decoder() if hasattr(model, "get_decoder") else model
    return getattr(model, model.base_model_prefix, None) if found is model else found


class Head:
    """What comes after the last layer: the norm, the output matrix, and a soft cap if the model has one.

    Only the columns of some tokens are computed: of a large vocabulary, a text uses a tenth.

    Attributes:
        tokens: int64 (n,), which tokens.
    """

    NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f")

    def __init__(self, model: Any, tokens: torch.Tensor):
        self.body = body(model)
        norm = next((getattr(self.body, name) for name in self.NORMS if hasattr(self.body, name)), None)
        if norm is None:
            raise Stop(f"{type(model).__name__}: no norm after its last layer is known here, so it cannot be distilled")
        self.norm, self.output, self.tokens = norm, model.get_output_embeddings(), tokens
        self.cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states after the norm (..., hidden) to logits (..., n)."""
        bias = None if self.output.bias is None else self.output.bias[self.tokens]
        logits = nn.functional.linear(hidden, self.output.weight[self.tokens].to(hidden.dtype), bias)
        return self.cap * torch.tanh(logits / self.cap) if self.cap else logits

    @torch.no_grad()
    def check(self, model: Any, ids: torch.Tensor) -> None:
        """Raises Stop unless this gives the model's own logits for some tokens (1, context)."""
        mine = self(self.hidden(ids))
        theirs = model(input_ids=ids, use_cache=False).logits[..., self.tokens]
        if not torch.allclose(mine.float(), theirs.float(), atol=1e-2 * float(theirs.float().std()), rtol=1e-3):
            raise Stop(f"{type(model).__name__}: what it computes after its last layer is not known here, so it cannot be distilled")

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """Hidden states after the norm, (batch, context, hidden)."""
        return self.body(input_ids=ids, use_cache=False).last_hidden_state
