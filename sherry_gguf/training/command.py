"""What every training command does around its run."""

import os
import signal
import sys
from collections.abc import Callable, Sequence

from sherry_gguf import signals
from sherry_gguf.errors import Stop

from .flags import Help


def run(argv: Sequence[str] | None, prog: str, help: Help, load: Callable) -> int:
    """Run a training command, and return the exit status: 1 for a problem the user can fix, 130 if interrupted.

    Under torchrun every process but the first ends here. Raises SystemExit for wrong arguments.

    argv: arguments; None: those of the process. prog: the program's name in messages.
    load: imports PyTorch and what else the run needs, and returns a function that parses (argv, prog), and one that runs what was parsed.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if {"-h", "--help"} & set(argv):
        print(help.text(prog), end="")
        return 0
    # By default libgomp's threads spin while they wait, which keeps the thread they wait for off its core if other work
    # runs. A step of the demo (AMD EPYC of family 25, 2 cores; medians, on a shared machine) beside two busy loops: spinning
    # 5 to 6 s, this 0.9 to 1.1 s, GOMP_SPINCOUNT=1000 1.4 s, 10000 1.8 to 2.4 s, one thread 1.6 to 3 s. With little else to
    # do: spinning 0.30 s, this 0.41 s (up to 0.57: both threads may share a core), one thread 0.52 s. Pinned threads (not
    # measured) would meet those of another run on the same cores. libgomp reads the variable only while PyTorch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    interrupted = f"{prog}: interrupted; run the same command again to resume"
    with signals.exit_at_once(interrupted):
        parse, train = load()
        import torch
    s, args = parse(argv, prog)
    try:
        status = train(s, args)
    except (Stop, OSError) as e:
        print(f"{prog}: {e}", file=sys.stderr, flush=True)
        status = 1
    except KeyboardInterrupt:
        if args.process_index == 0:
            print(interrupted, file=sys.stderr, flush=True)
        status = 128 + signal.SIGINT
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank():
        # A Gloo thread that releases a tensor while Python finalizes aborts the process, and torchrun then ends the first one, which
        # may still be evaluating the export. Only the first one owns trackers and files. Destroying the process group first would hang:
        # it waits for the thread with the GIL held, and the thread waits for the GIL.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status
