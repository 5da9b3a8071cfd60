"""What comparisons of training methods share: runs that are trained once and kept, and sweeps of the learning rate."""

import argparse
import concurrent.futures
import dataclasses
import json
import math
import multiprocessing
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sherry_gguf.errors import Stop
from sherry_gguf.training.files import locked, write

RUNS, SETTINGS = "runs.jsonl", "settings.json"  # in --work: what is done, and what all runs depend on
EXTEND = 3  # extend a sweep at most this many times on either side
TIE, LEADERS = 3e-3, 2  # the seed alone may explain a smaller difference; at most this many such choices get all seeds


class Paused(Exception):
    """The time is up; the next call continues."""


class Kept:
    """A base for dataclasses that describe a run: everything its result depends on, except the sizes that --work was begun with."""

    def key(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)  # type: ignore[call-overload]

    @classmethod
    def saved(cls, fields: dict) -> Any:
        """The run that `dataclasses.asdict` and JSON made these fields of. Raises TypeError."""
        return cls(**fields)


class Runs:
    """Runs, each trained once and kept in the file RUNS of --work. As a context manager, it ends its processes.

    a: the program's arguments; `work` is the directory, `jobs` the runs at a time.
    kind: the runs' class, a Kept.
    train: trains a run with vars(a), in a process of its own. Its result has "run", the run's fields, "choice", the loss for choosing
        between runs, and "seconds".
    """

    def __init__(self, a: argparse.Namespace, kind: type[Kept], train: Callable[[Any, dict], dict]):
        self.a, self.kind, self.path, self.train = a, kind, a.work / RUNS, train
        self.pool = concurrent.futures.ProcessPoolExecutor(a.jobs, mp_context=multiprocessing.get_context("spawn"))
        self.done: dict[str, dict] = {}
        if self.path.is_file():
            intact = []
            for number, line in enumerate(self.path.read_text(encoding="utf-8").splitlines(), 1):
                try:
                    result = json.loads(line)
                    self.done[kind.saved(result["run"]).key()] = result
                    intact.append(line + "\n")
                except (ValueError, KeyError, TypeError):  # the line that an interruption cut off
                    print(f"line {number} of {self.path} is damaged; that run is repeated", flush=True)
            write(self.path, "".join(intact))

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is not None:  # the processes ignore the signal and would train to the end
            for process in list(self.pool._processes.values()):
                process.kill()
        self.pool.shutdown(cancel_futures=True)

    def __getitem__(self, run: Kept) -> dict:
        return self.done[run.key()]

    def choice(self, run: Kept) -> float:
        """The loss for choosing between runs; infinite if the run diverged, as NaN has no order."""
        return ordered(self[run]["choice"])

    def __contains__(self, run: Kept) -> bool:
        return run.key() in self.done

    def keep(self, run: Kept, result: dict) -> None:
        self.done[run.key()] = result
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps(result) + "\n")

    def add(self, results: list[dict]) -> int:
        """Keep results of runs that are not done here, and return how many there are."""
        missing = {run: result for result in results if (run := self.kind.saved(result["run"])) not in self}
        for run, result in missing.items():
            self.keep(run, result)
        return len(missing)

    def need(self, runs: list) -> None:
        """Train the runs that are not done yet, `jobs` at a time.

        If one of them raises an error, those that have begun still end and are kept. Then the first error is raised; Stop for a process
        that was killed.
        """
        wanted = [run for run in dict.fromkeys(runs) if run not in self]
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(self.a).items()}
        futures = {self.pool.submit(self.train, run, settings): run for run in wanted}
        failed = None
        for n, future in enumerate(concurrent.futures.as_completed(futures), 1):
            try:
                result = future.result()
            except concurrent.futures.CancelledError:
                continue
            except Exception as e:
                failed = failed or e
                for other in futures:
                    other.cancel()
                continue
            self.keep(futures[future], result)
            print(f"  {n} of {len(wanted)}: {futures[future]}: {result['choice']:.4f}, {result['seconds']:.0f} s", flush=True)
        if isinstance(failed, concurrent.futures.BrokenExecutor):
            raise Stop(f"a process that trained was killed: if memory ran out, use a smaller --jobs (now {self.a.jobs})") from failed
        if failed:
            raise failed


def ordered(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


class Sweep:
    """The learning rate of one method, by factors of 2 until the leaders have a worse rate on either side.

    template: a run, a dataclass with the field `lr`. tie: as for `leaders`.
    """

    def __init__(self, runs: Runs, template: Any, rates: tuple[float, ...], tie: float = TIE):
        self.runs, self.template, self.rates, self.tie = runs, template, sorted(rates), tie
        self.first = tuple(self.rates)

    def run(self, lr: float) -> Any:
        return dataclasses.replace(self.template, lr=lr)

    def open(self, lr: float) -> bool:
        """Whether a rate is the lowest or highest that was trained."""
        return lr in (self.rates[0], self.rates[-1])

    def best(self) -> float:
        """The rate with the lowest loss for choices."""
        return leaders([self])[0].lr

    def wanted(self) -> list:
        """The runs still to be trained; [] once the sweep is complete."""
        if missing := [r for r in map(self.run, self.rates) if r not in self.runs]:
            return missing
        lead = [run.lr for run in leaders([self])]
        lower, higher = self.first[0] / 2**EXTEND, self.first[-1] * 2**EXTEND
        if self.rates[0] in lead and self.rates[0] / 2 >= lower:
            self.rates.insert(0, self.rates[0] / 2)
        elif self.rates[-1] in lead and self.rates[-1] * 2 <= higher:
            self.rates.append(self.rates[-1] * 2)
        else:
            return []
        return self.wanted()


def leaders(sweeps: list[Sweep]) -> list:
    """The runs with the lowest losses, best first: one, or several if the seed may have decided between them."""
    runs = sweeps[0].runs
    trained = sorted((sweep.run(lr) for sweep in sweeps for lr in sweep.rates), key=runs.choice)
    return [run for run in trained[:LEADERS] if run is trained[0] or runs.choice(run) < runs.choice(trained[0]) * (1 + sweeps[0].tie)]


def complete(sweeps: list[Sweep]) -> None:
    while wanted := [run for sweep in sweeps for run in sweep.wanted()]:
        sweeps[0].runs.need(wanted)


def suffixed(out: Path, suffix: str) -> Path:
    return out.with_name(out.name + suffix)  # with_suffix would cut the ".5" off a name


def compare(program: str, a: argparse.Namespace, run: Callable[[argparse.Namespace], None]) -> int:
    """Run a comparison in its locked --work; returns the exit status."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the workers too
    try:
        a.work.mkdir(parents=True, exist_ok=True)
        with locked(a.work, "--work"):
            run(a)
    except (Stop, OSError) as e:
        print(f"{program}: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{program}: interrupted; run the same command again to resume", file=sys.stderr)
        return 128 + signal.SIGINT
    print(f"wrote {suffixed(a.out, '.md')}, .json and .png")
    return 0
