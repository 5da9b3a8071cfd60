"""Resuming an interrupted run: its settings and its checkpoints."""

import contextlib
import json
import os
import re
from collections.abc import Collection
from pathlib import Path

from sherry_gguf.errors import Stop

from .files import LOCK, differences, undamaged
from .parsing import Arguments

SETTINGS = "settings.json"  # in --output_dir


def settings(s: object, args: Arguments, free: Collection[str]) -> dict:
    """What a resumed run must have in common with the run that began: of `args`, and a command's own flags `s` without those in `free`."""
    same = {k: v for k, v in vars(s).items() if k not in free}
    names = """learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_ratio warmup_steps per_device_train_batch_size max_steps
        num_train_epochs gradient_accumulation_steps world_size optim optim_args optim_target_modules weight_decay adam_beta1 adam_beta2
        adam_epsilon max_grad_norm label_smoothing_factor neftune_noise_alpha group_by_length train_sampling_strategy
        dataloader_drop_last average_tokens_across_devices ignore_data_skip seed data_seed bf16 fp16 load_best_model_at_end
        metric_for_best_model greater_is_better""".split()
    same |= {k: getattr(args, k) for k in names if hasattr(args, k)}
    return json.loads(json.dumps(same, default=str))


def resume_from(args: Arguments, now: dict) -> Path | None:
    """The checkpoint to resume from, if its run has the same settings. Raises Stop."""
    directory = args.directory
    given = args.resume_from_checkpoint
    if given and not complete(Path(given)):
        raise Stop(f"--resume_from_checkpoint {given}: there is no complete checkpoint of a Trainer")
    checkpoint = Path(given) if given else last_checkpoint(directory)
    begun = checkpoint.resolve().parent if checkpoint else directory
    check_settings(begun, now, bool(checkpoint))
    if begun.resolve() != directory.resolve():
        check_settings(directory, now, last_checkpoint(directory) is not None)
    ours = (directory / SETTINGS).is_file()
    if not ours and directory.exists() and (not directory.is_dir() or set(os.listdir(directory)) - {f"{SETTINGS}.part", LOCK}):
        raise Stop(f"{directory} holds files that this program did not write: choose another --output_dir")
    if checkpoint and not (args.fsdp or args.deepspeed):  # those keep their state in directories
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        random = "rng_state.pth" if args.world_size == 1 else f"rng_state_{args.process_index}.pth"
        for name in ("optimizer.pt", "scheduler.pt", random):
            if state["global_step"] < state["max_steps"] and not (checkpoint / name).is_file():
                raise Stop(f"{checkpoint} has no {name}, so training cannot resume from it (--save_only_model?): start over from its "
                           f"weights, with --model {checkpoint} and another --output_dir")  # fmt: skip
    return checkpoint


def check_settings(directory: Path, now: dict, begun: bool) -> None:
    """Raises Stop if `begun`, but with other settings than `now`."""
    mark = directory / SETTINGS
    if not begun or not mark.is_file():
        return
    with undamaged(mark, f"remove {directory} to start over"):
        other = differences(json.loads(mark.read_text(encoding="utf-8")), now)
    if other:
        raise Stop(f"{directory} was begun with other settings ({other}): choose another --output_dir, or remove it")


def complete(checkpoint: Path) -> bool:
    """The Trainer writes trainer_state.json last, so a checkpoint that was cut off lacks it."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return {"global_step", "max_steps"} <= json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8")).keys()
    return False


def last_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint."""
    found = sorted(directory.glob("checkpoint-*"), key=lambda p: -int(re.sub(r"\D", "", p.name) or 0))
    return next(filter(complete, found), None)
