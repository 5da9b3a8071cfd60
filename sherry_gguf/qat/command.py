"""The training command: `sherry-gguf train` and scripts/train_sherry.py."""

import functools

from sherry_gguf.training import command

from .arguments import HELP


def main(argv: list[str] | None = None, prog: str = "train_sherry.py", trained: bool = True) -> int:
    """Train (`training.command.run`).

    trained: whether --model names a trained model. One with random weights may guess without a warning.
    """

    def load():
        from .parsing import parse
        from .run import run

        return parse, functools.partial(run, trained=trained)

    return command.run(argv, prog, HELP, load)
