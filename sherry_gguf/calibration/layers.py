"""A model's transformer layers, and how to call one without the others."""

import contextlib
import dataclasses
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from sherry_gguf.errors import Stop

LINEAR = (nn.Linear, Conv1D)


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


def name(model: Any) -> str:
    """The dotted name of the list of the model's transformer layers. Raises Stop."""
    count = model.config.get_text_config().num_hidden_layers
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and any(isinstance(m, LINEAR) for m in module[0].modules()):
            return path
    raise Stop(f"{type(model).__name__}: no list of {count} transformer layers found in it, so it cannot be calibrated layer by layer")


def find(model: Any) -> nn.ModuleList:
    """The model's transformer layers. Raises Stop."""
    return model.get_submodule(name(model))


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Also where both are NaN, as in float16 the states of some models are."""
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


@torch.no_grad()
def calls(model: Any, context: int) -> list[Layer]:
    """Each layer with its arguments for sequences of `context` tokens. Raises Stop.

    The arguments must not depend on the tokens or the number of sequences: each layer is compared with itself in the model, on others.
    """
    found: dict[int, Layer] = {}
    modules = find(model)
    why = f"{type(model).__name__} does more between its {len(modules)} layers than call one after the other"

    def note(module, args, kwargs):
        found[id(module)] = Layer(module, args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"})

    def compare(module, args, kwargs, out):
        if busy:
            return
        x, wanted = args[0] if args else kwargs["hidden_states"], out[0] if isinstance(out, tuple) else out
        busy.append(True)
        try:
            same = equal(found[id(module)](x), wanted) and (not before or equal(before[0], x))
        except RuntimeError:  # an argument has another shape for two sequences
            same = False
        busy.clear()
        before[:] = [wanted]
        if not same:
            raise Stop(f"{why}, so it cannot be calibrated layer by layer")

    busy: list[bool] = []
    before: list[torch.Tensor] = []
    ids = torch.arange(context, device=model.device)[None] % model.get_input_embeddings().num_embeddings
    with contextlib.ExitStack() as hooks:
        for module in modules:
            hooks.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)
        body(model)(input_ids=ids, use_cache=False)
    if len(found) != len(modules):
        raise Stop(f"{why}, so it cannot be calibrated layer by layer")
    with contextlib.ExitStack() as hooks:
        for module in modules:
            hooks.callback(module.register_forward_hook(compare, with_kwargs=True).remove)
        body(model)(input_ids=torch.cat([ids.flip(-1), ids]), use_cache=False)
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
    """

    NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f")

    def __init__(self, model: Any, tokens: torch.Tensor | None = None):
        """tokens: int64 (n,), which tokens; None: all. Raises Stop."""
        self.body = body(model)
        norm = next((getattr(self.body, name) for name in self.NORMS if hasattr(self.body, name)), None)
        if norm is None:
            raise Stop(f"{type(model).__name__}: no norm after its last layer is known here, so --steps and --generated cannot be used")
        output = model.get_output_embeddings()
        self.norm = norm
        self.weight = output.weight.detach() if tokens is None else output.weight.detach()[tokens]
        bias = getattr(output, "bias", None)
        self.bias = None if bias is None else bias.detach() if tokens is None else bias.detach()[tokens]
        self.cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states after the norm (..., hidden) to logits (..., n)."""
        logits = nn.functional.linear(hidden, self.weight.to(hidden.dtype), self.bias)
        return self.cap * torch.tanh(logits / self.cap) if self.cap else logits

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """Hidden states after the norm, (batch, context, hidden)."""
        return self.body(input_ids=ids, use_cache=False).last_hidden_state


@torch.no_grad()
def check_head(model: Any) -> None:
    """Raises Stop unless `Head` gives the model's own logits, from random hidden states in place of the layers'."""
    count = model.get_input_embeddings().num_embeddings
    tokens = torch.arange(min(count, 512), device=model.device)
    head = Head(model, tokens)

    def replace(module, args, out):
        out.last_hidden_state = torch.randn(out.last_hidden_state.shape, generator=torch.Generator().manual_seed(0)).to(
            out.last_hidden_state
        )
        hidden.append(out.last_hidden_state)

    hidden: list[torch.Tensor] = []
    hook = head.body.register_forward_hook(replace)
    try:
        theirs = model(input_ids=tokens[None, :8], use_cache=False).logits[..., tokens].float()
    finally:
        hook.remove()
    mine = head(hidden[0]).float()
    if not torch.allclose(mine, theirs, atol=1e-2 * float(theirs.std()), rtol=1e-2):
        raise Stop(f"{type(model).__name__}: what it computes after its last layer is not known here, so --steps and --generated cannot be "
                   "used")  # fmt: skip
