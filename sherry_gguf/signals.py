"""What a command does when Ctrl-C, SIGTERM or SIGHUP asks it to end."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator

ENDINGS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Interrupted(BaseException):
    """A signal asked the command to end; no `except Exception` catches it.

    Args:
        number: the signal's.
    """

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number
        self.exit_code = 128 + number  # as a shell reports it


@contextlib.contextmanager
def handled(handler: Callable[[int], object]) -> Iterator[None]:
    """Call `handler(number)` for each of these signals within the block.

    Signals that the process already ignores, as under nohup, stay ignored. Only the main thread may enter the block.
    """
    previous = {n: old for n in ENDINGS if (old := signal.getsignal(n)) != signal.SIG_IGN}
    try:
        for number in previous:
            signal.signal(number, lambda number, _: handler(number))
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Raise Interrupted at the first signal within the block, and ignore later ones so that cleanup can finish."""

    def interrupt(number: int):
        for n in ENDINGS:
            signal.signal(n, signal.SIG_IGN)
        raise Interrupted(number)

    with handled(interrupt):
        yield


@contextlib.contextmanager
def exit_at_once(message: str) -> Iterator[None]:
    """Print `message` to stderr and end the process at the first signal within the block, without any cleanup.

    For slow imports: an exception raised in the middle of one is often swallowed or reported as another error.
    """

    def end(number: int):
        print(message, file=sys.stderr, flush=True)
        os._exit(128 + number)

    with handled(end):
        yield
