"""The command `sherry-gguf evaluate`, also known as scripts/evaluate.py."""

from __future__ import annotations

import os
import sys

from .. import signals
from ..errors import Stop
from . import options

INTERRUPTED = "evaluate: interrupted"


def main(argv: list[str] | None = None, prog: str = "evaluate.py") -> int:
    """Run the command.

    Args:
        argv: the arguments; None: those of the process.
        prog: the command's name in its help.

    Returns:
        The exit code: 0 if everything was measured, 1 if anything could not be, 128 plus the signal's number when interrupted.
    """
    a = options.parse(argv, prog)
    with signals.exit_at_once(INTERRUPTED):  # the imports take seconds
        # PyTorch's threads wait for each other by spinning, which slows down everything beside them. Read when PyTorch is loaded.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it warns when a process is started
        from . import measure
    try:
        with signals.raised():
            return measure.run(a)
    except (Stop, OSError, MemoryError) as e:  # OSError includes NotBuilt
        print(f"evaluate: {e or type(e).__name__}", file=sys.stderr)
        return 1
    except signals.Interrupted as e:
        print(INTERRUPTED, file=sys.stderr, flush=True)
        return e.exit_code
