"""The fine-tuning command: `sherry-gguf finetune`."""

from sherry_gguf.training import command

from .arguments import HELP


def main(argv: list[str] | None = None, prog: str = "sherry-gguf finetune") -> int:
    """Fine-tune (`training.command.run`)."""

    def load():
        from .parsing import parse
        from .run import run

        return parse, run

    return command.run(argv, prog, HELP, load)
