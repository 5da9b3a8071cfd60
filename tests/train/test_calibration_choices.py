"""scripts/studies/calibration_choices.py at a tiny size: what its variants change, and what is kept."""

import argparse
import json
import os
import signal

import calibration_choices as study
import pytest
import small_models
import torch
from transformers import AutoModelForCausalLM

from sherry_gguf.calibration import distillation, feedback, layers, training
from sherry_gguf.calibration.run import DISTILLED
from sherry_gguf.errors import Stop
from sherry_gguf.qat import prepare, quantized_layers, trainer
from sherry_gguf.qat.arenas import Arenas

pytest_plugins = "training_runs"
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def arguments(model, text, work, *more):
    return [str(x) for x in (model, "--text", text, "--evaluate", text / "00.txt", "--work", work, "--out", work / "out", "--tokens", 512,
                             "--steps", 6, "--context", 32, "--chunks", 2, "--bf16", "false", *more)]  # fmt: skip


def test_study(text, tmp_path, capfd):
    model = small_models.make(tmp_path / "llama", "llama", latent=True)
    work = tmp_path / "work"
    assert study.main(arguments(model, text, work, "--variants", "rounding,steps-2")) == 0
    results = {r["run"]["variant"]: r for r in map(json.loads, (work / "runs.jsonl").read_text().splitlines())}
    assert list(results) == ["base", "rounding", "steps-2"]
    assert list(results["rounding"]["layers"][0]["errors"]) == ["rounded"]
    assert results["base"]["error"] < results["rounding"]["error"]
    assert results["steps-2"]["error"] == results["base"]["error"]  # the same layers
    assert results["steps-2"]["distillation"]["tokens"] > results["base"]["distillation"]["tokens"]
    table = (work / "out.md").read_text()
    base = results["base"]
    assert f"| base | {base['choice']:.3f} | – | {base['perplexity']:.0f} |" in table and table.count("\n| ") == 4
    assert f"{results['rounding']['choice'] - base['choice']:+.3f} |" in table and "another seed" not in table
    assert (work / "out.png").stat().st_size > 5000
    assert not list(work.glob("*.hf")) and [p.name for p in work.glob("*.layers")] == ["base.layers"]

    capfd.readouterr()
    assert study.main(arguments(model, text, work, "--variants", "rounding,distill-mild")) == 0  # only what is new
    assert "1 of 1: distillation with mild Arenas" in capfd.readouterr().out
    assert study.main(arguments(model, text, work, "--variants", "rounding", "--chunks", 3)) == 1
    assert f"{work} was begun with other settings (chunks: 2 then, 3 now): choose another --work" in capfd.readouterr().err
    with pytest.raises(SystemExit):
        study.main(arguments(model, text, work, "--steps", 1))
    assert "--steps 1: at least 2" in capfd.readouterr().err  # of which batch-2 has half
    with pytest.raises(SystemExit):
        study.main(arguments(model, text, work, "--variants", "best"))
    assert "--variants best: choose from base, seed, rounding" in capfd.readouterr().err


def test_the_report(tmp_path):
    run = {"tokens": 1, "steps": 2, "context": 8}
    base = {"run": run | {"variant": "base"}, "scored": 9, "machine": "CPU", "choice": 1, "perplexity": 3, "seconds": 60}
    seed = base | {"run": run | {"variant": "seed"}, "choice": 0.9}
    failed = {"run": run | {"variant": "distill-mild"}, "choice": float("inf"), "failed": "made it worse", "seconds": 60}
    study.report(argparse.Namespace(out=tmp_path / "out"), [base, seed, failed])
    kept = json.loads((tmp_path / "out.json").read_text(), parse_constant=pytest.fail)  # JSON has no Infinity
    assert [r["choice"] for r in kept] == [1, 0.9, None]
    table = (tmp_path / "out.md").read_text()
    assert '"base, another seed" shows how large a difference chance makes' in table
    assert "| base, another seed | 0.900 | -0.100 | 3 | 1.0 |" in table
    assert "| distillation with mild Arenas | diverged | – | – | 1.0 |" in table
    assert all(v.own != v.label.startswith("distillation") for v in study.VARIANTS.values())  # as the table says
    assert list(study.VARIANTS)[:2] == ["base", "seed"]


def test_a_distillation_that_diverges(text, tmp_path, monkeypatch):
    """Before and after its first save. A variant's is a result; the base's ends the study."""
    model = small_models.make(tmp_path / "llama", "llama", latent=True)
    a = {"model": str(model), "texts": [str(text)], "work": str(tmp_path), "bf16": "false", "device": "cpu", "machine": "CPU"}
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # `train` has a process of its own otherwise

    def trained(variant, rate):
        monkeypatch.setitem(study.VARIANTS, variant, study.Variant("", ("--passes", "0", "--distill-rate", rate), own=False))
        return study.train(study.Run(variant, tokens=512, steps=40, context=32), a)

    for rate, why, saved in ("9e5", "the divergence is nan in step", False), ("100", "the distillation made it worse", True):
        found = trained("distill-twice", rate)
        assert found["choice"] == float("inf") and found["failed"].startswith(why)
        assert (tmp_path / "base.layers" / DISTILLED).exists() == saved
    with pytest.raises(distillation.Diverged):
        trained("base", "9e5")


def test_settings(tmp_path, monkeypatch):
    """A --work is for one model, one text and one way to measure."""
    for name in "a/model.safetensors", "b/model.safetensors", "text/one.txt", "other.txt":
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    began = dict(model=str(tmp_path / "a"), texts=[str(tmp_path / "text")], evaluate=tmp_path / "other.txt", chunks=2, device="cpu",
                 bf16="auto", work=tmp_path)  # fmt: skip

    def check(**other):
        study.check_settings(a := argparse.Namespace(**began | other))
        return a.bf16

    with pytest.raises(Stop, match=r"text has no \*.safetensors"):
        check(model=str(tmp_path / "text"))
    with pytest.raises(FileNotFoundError):
        check(texts=[str(tmp_path / "none")])
    assert not (tmp_path / study.SETTINGS).exists()
    monkeypatch.setattr(trainer, "bf16_is_faster", lambda: True)
    assert check() == "true"
    monkeypatch.setattr(trainer, "bf16_is_faster", lambda: False)
    assert check() == check(bf16="true") == "true"
    for name, value in dict(model=str(tmp_path / "b"), texts=[str(tmp_path / "other.txt")], evaluate=tmp_path / "text/one.txt", chunks=3,
                            device="cuda", bf16="false").items():  # fmt: skip
        with pytest.raises(Stop, match=rf"was begun with other settings \({name.replace('texts', 'text')}: [^,]* then, [^,]* now\)"):
            check(**{name: value})
    for name, file in {"model": "a/model.safetensors", "text": "text/one.txt", "evaluate": "other.txt"}.items():
        before = (tmp_path / file).stat()
        os.utime(tmp_path / file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
        with pytest.raises(Stop, match=rf"other settings \({name}: "):
            check()
        os.utime(tmp_path / file, ns=(before.st_atime_ns, before.st_mtime_ns))
    check()
    (tmp_path / study.SETTINGS).write_text("{}")
    with pytest.raises(Stop, match="settings.json is damaged"):
        check()


def test_zeros_by_magnitude(monkeypatch):
    """Error feedback otherwise chooses some zeros elsewhere. The first four columns are chosen before any feedback."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(512, 32, generator=random) @ torch.randn(32, 256, generator=random) + 0.1 * torch.randn(512, 256, generator=random)
    w = torch.randn(48, 256, generator=random) * 0.05

    def quantized():
        """The weights, and for each group whether its zero was at the smallest magnitude at that time."""
        found, choose = [], feedback.choose

        def spy(weight, factor, patterns, d):
            codes, errors = choose(weight, factor, patterns, d)
            at = weight.gather(-1, (patterns[codes] == 0).int().argmax(-1, keepdim=True))
            assert torch.allclose(errors @ factor, weight - d * patterns[codes], atol=1e-4)
            found.append(at[:, 0].abs() == weight.abs().amin(-1))
            return codes, errors

        with monkeypatch.context() as m:
            m.setattr(feedback, "choose", spy)
            q = feedback.quantize(w, x.t() @ x, 128)
        return q, torch.stack(found, 1)

    normal, at_smallest = quantized()
    assert at_smallest.shape == (48, 64) and not at_smallest.all()
    with study.changed("zeros-magnitude"):
        changed, at_smallest = quantized()
    assert at_smallest.all()
    first = w[:, :4].abs()
    assert torch.equal(changed[:, :4] == 0, first == first.amin(-1, keepdim=True))
    assert not torch.equal(normal[:, :4] == 0, first == first.amin(-1, keepdim=True))
    error, more = ((x @ (w - q).t()).square().sum() for q in (normal, changed))
    assert error < more


@pytest.mark.parametrize("how", ["mild", "published"])
def test_arenas(how, tmp_path):
    """λ follows its schedule in the steps, and is 0 afterwards."""
    settings = dict({"mild": study.MILD, "published": study.PUBLISHED}[how])
    model = AutoModelForCausalLM.from_pretrained(small_models.make(tmp_path / "llama", "llama", latent=True), dtype=torch.float32)
    prepare(model)
    layer = next(iter(quantized_layers(model).values()))
    model.eval().dropout = dropout = torch.nn.Dropout().eval()
    seen = []

    def steps(task, rate, passes, seed, advance):
        for _ in range(task.steps(passes)):
            seen.append((layer.training, layer.residual))
            assert not dropout.training and not model.training
            advance(0.0)

    task = training.Task(layers.Layer(model, (), {}), torch.ones(8, 1, 1), torch.ones(8, 1, 1), 8, 1, False, torch.device("cpu"))
    study.layers_with(steps, how)(task, 0.1, 1, 0, lambda loss: None)
    assert seen == [(True, Arenas(**settings).at(i, 8)) for i in range(8)] and max(seen)[1] > 0
    assert layer.residual == 0 and not layer.training


def test_changes_end():
    owners = {"zeros-magnitude": (feedback, "choose"), "layers-mild": (training.Task, "train"),
              "distill-published": (distillation, "distil")}  # fmt: skip
    assert {v.change for v in study.VARIANTS.values()} >= set(owners)
    for change, (owner, name) in owners.items():
        before = getattr(owner, name)
        with study.changed(change):
            assert getattr(owner, name) is not before
        assert getattr(owner, name) is before


def test_sizes():
    run = study.Run("tokens", tokens=100, steps=10, context=32)
    found = study.flags(run)
    assert found[-2:] == ["--tokens", "400"] and found[found.index("--steps") + 1] == "10"
    assert study.flags(study.Run("batch-2", 100, 10, 32))[-2:] == ["--steps", "5"]
