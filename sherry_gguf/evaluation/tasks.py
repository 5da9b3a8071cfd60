"""lm-eval's tasks, with data from the hub, the cache or local files."""

import difflib
import glob
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import lm_eval.tasks
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._yaml_loader import load_yaml

from ..errors import Stop
from . import first_line, say
from .resume import Request, digest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "tasks"  # the paper's five tasks on local files
FOLDERS = ("piqa", "arc", "hellaswag", "winogrande")  # where lm-eval defines those five; reading all folders takes seconds
SEED = 1234  # of the examples before a question


class _LocalFactory(TaskFactory):
    """lm-eval's task factory, but it looks up a task's data_files in `directory`, plain or compressed."""

    FORMATS = ("json", "csv", "parquet", "text", "arrow")  # a dataset_path that means local files, not a data set on the hub

    def __init__(self, directory: Path):
        super().__init__()
        self.directory = directory.absolute()

    def _load_full_config(self, *args, **kwargs) -> dict[str, Any]:
        config = super()._load_full_config(*args, **kwargs)
        more = config.get("dataset_kwargs") or {}
        if config.get("dataset_path") in self.FORMATS and more.get("data_files"):
            config["dataset_kwargs"] = more | {"data_files": self._located(more["data_files"])}
        return config

    def _located(self, files):
        """The same string, list, or dictionary by split, with absolute paths."""
        if isinstance(files, dict):
            return {split: self._located(f) for split, f in files.items()}
        if not isinstance(files, str):
            return [self._located(f) for f in files]
        if "://" in files:
            return files
        for end in "", ".xz", ".gz", ".bz2":
            if os.path.isfile(path := f"{self.directory / files}{end}"):
                return glob.escape(path)  # datasets reads it as a pattern
        return files if os.path.isabs(files) else os.path.join(glob.escape(str(self.directory)), files)


def load(wanted: list[str], include: Path | None, shots: int, data: Path | None = None) -> tuple[dict[str, Any], dict[str, str]]:
    """Load tasks and their data.

    Args:
        wanted: names of tasks or groups.
        include: a directory of YAML files that override all other tasks.
        shots: examples before each question.
        data: a directory of local data; the tasks in EXAMPLES then override lm-eval's own.

    Returns:
        The tasks by name, and for each wanted name without data the reason.

    Raises:
        Stop: a directory does not exist, or a name is unknown.
    """
    if not wanted:
        return {}, {}
    manager = _manager(wanted, include, data)
    sources = {name: _source(name, manager.task_index[name].cfg or {}) for name in wanted}
    hub_problem = _hub_problem() if any(hub for hub, _ in sources.values()) else None
    tasks, missing = {}, {}
    for name, (hub, files) in sources.items():
        try:
            loaded = manager.load([name])["tasks"]
        except Exception as e:  # data sets fail in many ways
            if not hub:
                missing[name] = f"cannot load its data {files}: {first_line(e)}"
            else:
                if isinstance(e, ConnectionError) and not hub_problem:
                    hub_problem = _go_offline(f"the hub {huggingface_hub.constants.ENDPOINT} does not answer")
                cache = datasets.config.HF_DATASETS_CACHE
                missing[name] = f"its data set {files} is unavailable: {hub_problem or first_line(e)}, and it is not in the cache {cache}"
            say(f"{name}: {missing[name]}")
            continue
        for task_name, task in loaded.items():
            task.set_config("num_fewshot", shots)
            tasks[task_name] = task
    if any(sources[name][0] for name in missing):
        say("run this once on a machine that reaches the hub, copy its cache here and set HF_DATASETS_CACHE to it; or pass the data as "
            "files with --data (see examples/tasks/README.md)")  # fmt: skip
    return tasks, missing


def _manager(wanted: list[str], include: Path | None, data: Path | None) -> lm_eval.tasks.TaskManager:
    """A task manager that knows all wanted tasks. Raises Stop."""
    for flag, directory in ("--include-path", include), ("--data", data):
        if directory and not directory.is_dir():
            raise Stop(f"{flag} {directory}: no such directory")
    more = [EXAMPLES] * bool(data) + ([include] if include else [])
    folders = [Path(lm_eval.tasks.__file__).parent / f for f in FOLDERS] + more
    manager = lm_eval.tasks.TaskManager(include_path=folders, include_defaults=False)
    if not set(wanted) <= manager.task_index.keys():
        manager = lm_eval.tasks.TaskManager(include_path=more)
    manager._factory = _LocalFactory(data or Path())
    unknown = [name for name in wanted if name not in manager.task_index]
    if unknown:
        near = difflib.get_close_matches(unknown[0], manager.all_tasks)
        also = f" or {include}" * bool(include) + f"; similar: {', '.join(near)}" * bool(near) + "".join(_unreadable(include))
        raise Stop(f"--tasks {unknown[0]}: no such task in lm-eval{also}")
    return manager


def _unreadable(include: Path | None) -> Iterator[str]:
    """The files that lm-eval silently skips because it cannot read them."""
    for path in sorted(include.rglob("*.yaml")) if include else []:
        try:
            load_yaml(path, resolve_func=False)
        except Exception as e:
            yield f"; cannot read {path}: {' '.join(str(e).split())}"


def _source(name: str, config: dict) -> tuple[bool, str]:
    """Whether a task's configuration takes data from the hub, and the data's name."""
    path, more = config.get("dataset_path"), config.get("dataset_kwargs") or {}
    files = more.get("data_files") or more.get("data_dir")
    if files:
        files = list(files.values()) if isinstance(files, dict) else files
        return False, files if isinstance(files, str) else ", ".join(map(str, files))
    return not (path and Path(path).exists()), " ".join(filter(None, (path or name, config.get("dataset_name"))))


def _hub_problem() -> str | None:
    """Why the hub cannot be reached, found within seconds; from then on only the cache is used. None if the hub answers."""
    constants = huggingface_hub.constants
    if constants.HF_HUB_OFFLINE or datasets.config.HF_HUB_OFFLINE:
        return "offline mode is on (HF_HUB_OFFLINE, HF_DATASETS_OFFLINE)"
    try:
        huggingface_hub.utils.get_session().head(constants.ENDPOINT, timeout=5)
        return None
    except OSError as e:
        return _go_offline(f"the hub {constants.ENDPOINT} cannot be reached ({type(e).__name__})")


def _go_offline(why: str) -> str:
    """Stop asking the hub: each data set would be requested six times over 23 seconds. Returns `why`."""
    huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    huggingface_hub.utils.reset_sessions()
    return why


def prepare(tasks: dict[str, Any], limit: int | None) -> tuple[dict[str, str], dict[str, str]]:
    """Build the tasks' requests on the first `limit` documents if given.

    Returns a hash of each task's requests and documents, and for each task that failed, which is removed, the reason.
    """
    hashes, failed = {}, {}
    for name, task in list(tasks.items()):
        try:
            task.set_fewshot_seed(SEED)
            task.build_all_requests(limit=limit)
            hashes[name] = digest(task.VERSION, task.OUTPUT_TYPE, sorted(task.aggregation()), [(i.args, i.doc) for i in task.instances])
        except Exception as e:  # from the task's own code
            del tasks[name]
            failed[name] = f"{type(e).__name__}: {first_line(e)}"
            say(f"{name}: {failed[name]}")
    return hashes, failed


def requests(task: Any) -> list[Request]:
    """The requests of a prepared or measured task that have a log-likelihood."""
    return [i.args for i in task.instances if i.request_type == "loglikelihood"]


def measure(lm: TemplateLM, name: str, task: Any, limit: int | None) -> dict[str, Any]:
    """Run a task on a model, on the first `limit` documents if given.

    Returns:
        "documents", "seconds", lm-eval's metrics such as "acc" and "acc_stderr" (fractions), and for multiple choice "choices":
        for each document the log-likelihoods of its choices in nats.

    Raises:
        Stop: the model or the task failed.
    """
    begun = time.monotonic()
    task.set_fewshot_seed(SEED)  # each model gets the same examples
    try:
        out = evaluate(lm, {"tasks": {name: task}}, limit=limit, bootstrap_iters=1000)
    except Stop:
        raise
    except Exception as e:  # from lm-eval, the task's own code or PyTorch
        raise Stop(f"{name}: {type(e).__name__}: {first_line(e)}") from e
    samples = out["samples"][name]
    result: dict[str, Any] = {"documents": len(samples), "seconds": round(time.monotonic() - begun, 1)}
    for key, value in out["results"][name].items():
        metric, _, filtered = key.partition(",")
        if filtered and isinstance(value, (int, float)):
            result[metric if filtered == "none" else f"{metric} ({filtered})"] = value
    if task.OUTPUT_TYPE == "multiple_choice":
        result["choices"] = [[r[0] for r in s["filtered_resps"]] for s in samples]
    return result
