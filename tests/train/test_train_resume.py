"""The training command, interrupted and resumed, and what it refuses to resume; in one process and in two."""

import fcntl
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import train_sherry
from safetensors.torch import load_file
from training_runs import flags

from sherry_gguf.qat import run
from sherry_gguf.training import run as running
from sherry_gguf.training.callbacks import Interrupt
from sherry_gguf.training.resume import last_checkpoint

pytest_plugins = "training_runs"
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def finished(start, text, tmp_path_factory) -> Path:
    """A run of six steps, exported to another directory. Copy it to change it."""
    out = tmp_path_factory.mktemp("finished")
    assert train_sherry.main(flags(start, text, out / "run", export=out / "hf")) == 0
    return out / "run"


def test_interrupted_run_resumes_and_ends_the_same(start, text, tmp_path, capfd):
    """The whole run and the resumed one are in this process, which has imported PyTorch already."""
    steps = 100

    def arguments(out):
        return flags(start, text, tmp_path / out, max_steps=steps, save_steps=1000)

    assert train_sherry.main(arguments("whole")) == 0
    for number in signal.SIGINT, signal.SIGHUP:  # Ctrl-C, and a terminal that is closed
        first = subprocess.Popen([sys.executable, train_sherry.__file__, *arguments("cut")], text=True,
                                 stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"},
                                 preexec_fn=lambda: (signal.signal(signal.SIGINT, signal.default_int_handler),
                                                     signal.signal(signal.SIGHUP, signal.SIG_DFL)))  # fmt: skip
        for line in first.stdout:
            if line.startswith("training:"):
                break
        time.sleep(0.7)
        first.send_signal(number)
        _, errors = first.communicate(timeout=60)
        assert first.returncode == 130 and "run the same command again" in errors and "Traceback" not in errors
        assert not (tmp_path / "cut/hf").exists()
    assert len(list((tmp_path / "cut").glob("checkpoint-*"))) == 2
    settings = (tmp_path / "cut/settings.json").stat().st_mtime_ns
    # an incomplete checkpoint is skipped
    (tmp_path / "cut/checkpoint-9999").mkdir()

    capfd.readouterr()
    assert train_sherry.main(arguments("cut")) == 0
    assert (tmp_path / "cut/settings.json").stat().st_mtime_ns == settings
    step = int(re.search(r"resuming from \S*checkpoint-(\d+)", capfd.readouterr().out)[1])
    assert 0 < step < steps
    a, b = (load_file(tmp_path / d / "hf/model.safetensors") for d in ("whole", "cut"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_other_settings_and_foreign_directories(start, text, finished, tmp_path, capfd):
    shutil.copytree(finished, tmp_path / "run")
    assert train_sherry.main(flags(start, text, tmp_path / "run", export=tmp_path / "two", arenas_peak=0.5)) == 1
    assert "begun with other settings (arenas_peak: 1.0 then, 0.5 now)" in capfd.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis").write_text("precious")
    assert train_sherry.main(flags(start, text, tmp_path / "mine")) == 1
    assert "files that this program did not write" in capfd.readouterr().err
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis"]
    (tmp_path / "run/settings.json").write_text("junk")
    assert train_sherry.main(flags(start, text, tmp_path / "run", export=tmp_path / "two")) == 1
    assert "settings.json is damaged" in capfd.readouterr().err


def test_interrupted_export_is_made_again(start, text, tmp_path, capfd, monkeypatch):
    """Killed, or out of memory, between the export and its evaluation. The result appears only when it is complete."""
    flags = functools.partial(globals()["flags"], lr_scheduler_type="constant")  # so that one more step would show
    weights = []

    def fails(model, rows, batch=None):
        if batch:  # before the first step
            return 0.0
        weights.append((tmp_path / "run/exporting/model.safetensors").read_bytes())
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(run, "mean_loss", fails)
        with pytest.raises(RuntimeError, match="no memory"):
            train_sherry.main(flags(start, text, tmp_path / "run"))
        patch.setattr(running, "NO_SPACE", 1 << 60)  # the disk has less than this
        assert train_sherry.main(flags(start, text, tmp_path / "run")) == 1
    assert "MB are free there (RuntimeError): make room" in capfd.readouterr().err
    assert not (tmp_path / "run/hf").exists()
    # a file that appeared there meanwhile is not ours
    (tmp_path / "run/hf").mkdir()
    (tmp_path / "run/hf/thesis").write_text("precious")
    assert train_sherry.main(flags(start, text, tmp_path / "run")) == 1
    assert "already has something in it" in capfd.readouterr().err
    assert (tmp_path / "run/hf/thesis").read_text() == "precious"
    shutil.rmtree(tmp_path / "run/hf")

    assert train_sherry.main(flags(start, text, tmp_path / "run")) == 0
    assert "resuming from" in capfd.readouterr().out
    # 6 steps; the Trainer would take one more
    assert {(tmp_path / "run/hf/model.safetensors").read_bytes()} == set(weights)
    assert json.loads((tmp_path / "run/hf/training.json").read_text())["steps"] == 6
    assert not list((tmp_path / "run").glob("*exporting*"))
    assert train_sherry.main(flags(start, text, tmp_path / "run")) == 1  # complete now, so it is left alone


def test_what_cannot_be_resumed(start, text, tmp_path, capfd, monkeypatch):
    """A lost optimizer, other text, other noise: each would silently lead to another result."""
    folder = tmp_path / "text"
    shutil.copytree(text, folder)
    more = dict(max_steps=4, save_steps=2, save_total_limit=9, lr_scheduler_type="constant")

    def main(**changed):
        code = train_sherry.main(flags(start, folder, tmp_path / "run", **more | changed))
        return code, capfd.readouterr().err

    with monkeypatch.context() as patch:  # cut off in the third step
        patch.setattr(Interrupt, "on_step_end", lambda self, args, state, *_, **__: 1 // (state.global_step < 3) and None)
        with pytest.raises(ZeroDivisionError):
            train_sherry.main(flags(start, folder, tmp_path / "run", **more))
    last = tmp_path / "run/checkpoint-2"
    assert last_checkpoint(tmp_path / "run") == last
    code, error = main(neftune_noise_alpha=5)
    assert code == 1 and "begun with other settings (neftune_noise_alpha: None then, 5.0 now)" in error
    (folder / "more.txt").write_text("more of it " * 100)
    code, error = main()
    assert code == 1 and "begun with other settings (text: " in error
    (folder / "more.txt").unlink()
    for name in "optimizer.pt", "rng_state.pth":
        os.rename(last / name, tmp_path / name)
        code, error = main()
        assert code == 1 and f"checkpoint-2 has no {name}, so training cannot resume from it" in error
        os.rename(tmp_path / name, last / name)
    code, error = main(resume_from_checkpoint=tmp_path / "nowhere")
    assert code == 1 and "there is no complete checkpoint" in error and "remove" not in error
    with open(tmp_path / "run/lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, error = main()
    assert code == 1 and "another run is using" in error
    assert main()[0] == 0


def test_settings_of_a_failed_start_are_not_kept(start, text, tmp_path, capfd):
    assert train_sherry.main(flags(start, text, tmp_path / "run", teacher=start, distill=2)) == 1
    assert "distill is 2.0" in capfd.readouterr().err
    assert train_sherry.main(flags(start, text, tmp_path / "run", teacher=start, distill=0.5)) == 0


def test_the_best_model_is_exported_again(start, text, tmp_path):
    more = dict(load_best_model_at_end=True, eval_strategy="steps", eval_steps=2, save_steps=2, max_steps=6, learning_rate=0.3,
                save_total_limit=3, arenas_peak=0)  # fmt: skip
    for name in "one", "two":
        assert train_sherry.main(flags(start, text, tmp_path / "run", export=tmp_path / name, **more)) == 0
    best = json.loads((tmp_path / "run/checkpoint-6/trainer_state.json").read_text())["best_model_checkpoint"]
    assert not best.endswith("checkpoint-6")  # such a rate makes it worse and worse
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()


def test_two_processes(start, text, tmp_path):
    """Under torchrun, with accumulation: cut off, resumed, and exported by one of them; the other never finalizes Python."""
    (tmp_path / "sitecustomize.py").write_text(  # always aborts where a Gloo thread does by chance
        "import atexit, os\nif os.environ.get('RANK') == '1':\n    atexit.register(os.abort)\n"
    )
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))

    def torchrun(*more):
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            "2",
            "--rdzv_backend",
            "c10d",
            "--rdzv_endpoint",
            "127.0.0.1:0",
            train_sherry.__file__,
            *flags(start, text, tmp_path / "run", ddp_backend="gloo", gradient_accumulation_steps=2, save_steps=3),
            *more,
        ]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        )

    first = torchrun()
    assert first.returncode == 0, first.stderr[-3000:]
    assert "8 a step" in first.stdout and "2 processes on cpu" in first.stdout
    weights = load_file(tmp_path / "run/hf/model.safetensors")
    shutil.rmtree(tmp_path / "run/hf")
    shutil.rmtree(tmp_path / "run/checkpoint-6")
    second = torchrun()
    assert second.returncode == 0, second.stderr[-3000:]
    assert "resuming from" in second.stdout and "checkpoint-3" in second.stdout
    again = load_file(tmp_path / "run/hf/model.safetensors")
    assert all(torch.equal(again[k], weights[k]) for k in weights)
    shutil.rmtree(tmp_path / "run/hf")
    # a single process would take half as much text a step
    assert train_sherry.main(flags(start, text, tmp_path / "run", gradient_accumulation_steps=2, save_steps=3)) == 1


def test_damaged_checkpoint_is_named(start, text, finished, tmp_path, capfd):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run/checkpoint-6/optimizer.pt").write_bytes(b"junk")
    assert train_sherry.main(flags(start, text, tmp_path / "run", export=tmp_path / "two")) == 1
    error = capfd.readouterr().err
    assert f"cannot resume from {tmp_path}/run/checkpoint-6" in error and "remove it to resume from an earlier one" in error
