"""Converts a Hugging Face model directory to a GGUF of TQ1_25 and TQ1_25_64 with llama.cpp's own conversion classes.

Upstream's class for the architecture prepares the tensors, metadata and tokenizer of an F16 file (`upstream`). `plan` chooses the
tensors that become ternary. `rows` and `encode` read and convert them in chunks, and `writer` reads the finished files back before they
replace anything.
"""

import concurrent.futures
import dataclasses
from pathlib import Path
from typing import Any

from ..report import counted, starred, type_names
from .checkpoint import Grouping, check_checkpoint, check_input, read_grouping
from .encode import WORKERS, Encoder
from .hint import output_note
from .metadata import add_metadata, check_token_count, check_tokenizer
from .options import Options
from .plan import check_blocks, check_fallbacks, make_plan, type_notes
from .provenance import Checkpoint
from .tensor import Tensor
from .upstream import activation_note, instantiate, read_json
from .writer import changes, files_of, needing_64, other_splits, set_tensors, target_of, write

__all__ = ["Options", "Report", "convert", "findings"]

# The relative error above which weights were not ternary: ordinary ones lose 0.5, two groups of 64 under one scale less than 0.2.
_ROUNDED = 0.25
_EARLY = 1 << 29  # bytes of tensors from which on the tokenizer is also checked before the conversion


@dataclasses.dataclass
class Report:
    """What a conversion did, or would do with dry_run."""

    files: list[Path]
    tensors: list[Tensor]
    notes: list[str]


def convert(model_dir: Path, options: Options | None = None) -> Report:
    """Convert a model directory. Raises ConvertError, NotBuilt; then nothing was written or replaced."""
    model_dir, options = Path(model_dir), options or Options()
    check_input(model_dir, options)
    target = target_of(model_dir, options)
    grouping = read_grouping(model_dir, options)
    if options.metadata:
        read_json(options.metadata)
    import torch

    with torch.inference_mode(), concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        model, plan = _prepared(model_dir, options, grouping)
        names = model.gguf_writer.format_shard_names(target)
        files = files_of(model_dir, target, names)
        notes = [*type_notes(plan), *filter(None, [activation_note(model)])]
        if others := other_splits(target, names):
            notes.append(f"files of another conversion beside it, left as they are: {', '.join(others)}")
        if not options.dry_run:
            if sum(t.nbytes for t in plan) > _EARLY:
                check_tokenizer(model, options)
            write(model, plan, target, files, Encoder(grouping, pool, Checkpoint(model)), grouping, options)
            notes += findings(model, plan, grouping)
        notes += filter(None, [output_note(model, plan)])
    return Report(files, plan, notes)


def _prepared(model_dir: Path, options: Options, grouping: Grouping) -> tuple[Any, list[Tensor]]:
    """Upstream's model object with its metadata, and the plan, both checked."""
    if not options.vocab_only:
        check_checkpoint(model_dir)
    model = instantiate(model_dir, options, "MOSTLY_F16")
    plan = [] if options.vocab_only else make_plan(model, options, grouping)
    set_tensors(model.gguf_writer, plan, options)
    add_metadata(model, plan)
    if options.require_exact:
        check_fallbacks(plan)
    if plan:
        check_blocks(model, plan, options)
        check_token_count(model, plan)
    return model, plan


def findings(model: Any, plan: list[Tensor], grouping: Grouping) -> list[str]:
    """Notes on what encoding has found in the tensors."""
    notes = []
    if vanished := [t for t in plan if t.vanished]:
        n = sum(t.vanished for t in vanished)
        its = "its" if n == 1 else "their"
        notes.append(
            f"{counted(n, 'block')} became all zero because {its} mean magnitude is below what fp16 holds (6e-8): {starred(vanished)}"
        )
    if changed := [t for t in plan if t.changed and t.kind]:
        notes += [f"not the checkpoint's weights: {change}" for change in changes(model, changed)]
    if dense := [t for t in plan if t.dense]:
        notes.append(
            f"ternary weights that are not 3:4 sparse lose precision in {type_names(dense)} (relative error up to "
            f"{max(t.relative_error for t in dense):.3f}): {starred(dense)}. TQ2_0 and TQ1_0 hold such weights"
        )
    notes += needing_64(plan, grouping)
    # A checkpoint that says latent or fake_quantized was trained with Sherry.
    if not grouping.weights and (rounded := [t for t in plan if t.kind and t.relative_error > _ROUNDED and not t.needs_64]):
        notes.append(
            f"{len(rounded)} of {sum(t.kind is not None for t in plan)} ternary matrices were rounded (relative error up to "
            f"{max(t.relative_error for t in rounded):.2f}): expect noise unless the model was trained with Sherry. "
            "An ordinary model loses less if sherry-gguf calibrate prepares it first"
        )
    if grouping.weights == "fake_quantized" and (inexact := [t for t in plan if t.kind and not t.is_exact and not t.needs_64]):
        notes.append(
            f"the checkpoint says that its weights are fake_quantized, yet these are not 3:4 sparse ternary "
            f"in {grouping.described(t.group for t in inexact)} and were quantized, with loss: {starred(inexact)}. --keep keeps them"
        )
    return notes
