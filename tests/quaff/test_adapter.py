import json
import os
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import compare_adapter
import gguf
import numpy as np
import peft
import pytest
import small_models
import torch
import transformers
from conftest import sherry
from safetensors.torch import load_file

from sherry_gguf import llama_cpp
from sherry_gguf.cli import main
from sherry_gguf.evaluation.tools import serve
from sherry_gguf.quaff import calibrate, load_gguf, quantize_for_finetuning
from sherry_gguf.quaff.adapter import convert_adapter
from sherry_gguf.quaff.scaling import save_factors


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A Sherry checkpoint, its GGUF, and an adapter that Quaff trained on its packed weights."""
    work = tmp_path_factory.mktemp("adapter")
    small_models.make(work / "base", "llama")
    assert sherry("convert", work / "base", "--outfile", work / "base.gguf").returncode == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(work / "base")
    ids = torch.randint(5, 200, (4, 24), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    channels = calibrate(model, [batch], threshold=5, budget=0.05)
    model = quantize_for_finetuning(model, channels, "tq1_25")
    torch.manual_seed(0)
    model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-2)
    for _ in range(8):
        model(**batch, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(work / "adapter")
    channels.save(work / "adapter/channels.safetensors")
    save_factors(model, work / "adapter/factors.safetensors")
    return work


def text(*arguments):
    """What llama-completion prints. Its log may lose the end, also of the text: the longest of three runs, which compute the same."""
    flags = "-p hello -n 12 --temp 0 -no-cnv -t 1 --ignore-eos".split()
    printed = []
    for _ in range(3):
        done = subprocess.run(list(map(str, [llama_cpp.tool("llama-completion"), *arguments, *flags])), capture_output=True, text=True,
                              errors="replace", stdin=subprocess.DEVNULL)  # fmt: skip
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
    return max(printed, key=len)


@pytest.fixture(scope="module")
def files(trained):
    """The checkpoint and the adapter as GGUFs."""
    convert_adapter(trained / "adapter", trained / "lora.gguf")
    return trained / "base.gguf", trained / "lora.gguf"


def test_an_adapter_beside_packed_weights(trained, files, capsys):
    assert main(["convert-adapter", str(trained / "adapter")]) == 0
    assert "adapter.gguf (0.2 MB)" in capsys.readouterr().out
    tensors = {t.name: np.array(t.data) for t in gguf.GGUFReader(trained / "adapter.gguf").tensors}
    weights = load_file(trained / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == len(weights) == 28
    for side in "A", "B":
        name = f"base_model.model.model.layers.1.mlp.down_proj.lora_{side}.weight"
        assert (tensors[f"blk.1.ffn_down.weight.lora_{side.lower()}"] == weights[name].numpy()).all()
    model = ["-m", files[0]]
    assert text(*model) != text(*model, "--lora", trained / "adapter.gguf")


@pytest.mark.slow
def test_llama_cpp_computes_what_pytorch_does(trained, tmp_path, capsys):
    """The adapter changes the model much. On packed weights it gives the same distributions and the same text in both."""
    (tmp_path / "text").write_text("".join(f"def f{i}(x):\n    return x * {i}\n" for i in range(200)))
    arguments = ["--model", trained / "base", "--adapter", trained / "adapter", "--text", tmp_path / "text", "--work", tmp_path,
                 "--out", tmp_path / "out", "--context", 64, "--chunks", 8, "--threads", 1]  # fmt: skip
    before = torch.get_num_threads()
    try:
        assert compare_adapter.main(list(map(str, arguments))) == 0
    finally:
        torch.set_num_threads(before)
    found = json.loads((tmp_path / "out.json").read_text())
    rows = {row["what"]: row for row in found["rows"]}
    assert found["scored"] == 8 * 31 and found["scaled"]
    for label in compare_adapter.RUNS:
        row = rows[f"PyTorch, llama.cpp {label}"]
        assert abs(row["mean"]) < 1e-5 and row["top"] >= 0.99, row
    for program in "PyTorch", "llama.cpp":
        assert rows[f"{program} with the adapter, without"]["mean"] > 0.05
    assert found["greedy"]["same"] >= 7 and found["greedy"]["texts"] == 8
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "out.md").read_text() and all(f"| {what} |" in printed for what in rows)


def test_the_server_with_an_adapter(files):
    base, lora = files
    request = dict(prompt="hello", n_predict=12, temperature=0, ignore_eos=True, cache_prompt=False)

    def complete(server):
        return server.ask("POST", "/completion", **request)["content"]

    def scale(server, factor):
        port = server._http[None].port
        data = json.dumps([{"id": 0, "scale": factor}]).encode()
        with urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}/lora-adapters", data)) as answer:
            assert answer.status == 200

    with serve(base, 1, 64, 1) as server:
        plain = complete(server)
    with serve(base, 1, 64, 1, "--lora", lora) as server:
        adapted = complete(server)
        scale(server, 0)
        assert complete(server) == plain
        scale(server, 1)
        assert complete(server) == adapted != plain
    assert text("-m", base, "--lora", lora).strip() == f"hello{adapted}".strip()


def test_an_adapter_of_a_gguf(trained, capsys):
    """Trained on the file itself, converted without the checkpoint: the same bytes as with it."""
    path, work = trained / "base.gguf", trained / "of_gguf"
    model, tokenizer = load_gguf(path)
    model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(work / "adapter")
    for base, out in ([], "default.gguf"), (["--base", path], "named.gguf"), (["--base", trained / "base"], "checkpoint.gguf"):
        assert main(["convert-adapter", *map(str, [work / "adapter", *base, "--outfile", work / out])]) == 0, capsys.readouterr().err
        made = {t.name: t.data.tobytes() for t in gguf.GGUFReader(work / out).tensors}
        assert len(made) == 28 and made == {t.name: t.data.tobytes() for t in gguf.GGUFReader(work / "default.gguf").tensors}
    ids = torch.tensor([tokenizer("hello").input_ids])
    mine = model.eval().generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, min_new_tokens=8, do_sample=False)
    beside = text("-m", path, "--lora", work / "default.gguf")
    assert beside != text("-m", path) and tokenizer.decode(mine[0], skip_special_tokens=True).strip() in beside
    (work / "broken.gguf").write_bytes(path.read_bytes()[:1000])
    assert main(["convert-adapter", *map(str, [work / "adapter", "--base", work / "broken.gguf"])]) == 1
    assert "is truncated or damaged" in capsys.readouterr().err and not (work / "adapter.gguf").exists()


def test_what_is_no_adapter(trained, tmp_path, capsys):
    def refused(message, *arguments):
        assert main(["convert-adapter", *map(str, arguments)]) == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out.gguf").exists()

    out = ["--outfile", tmp_path / "out.gguf"]
    refused("not an adapter directory of PEFT, it has no adapter_config.json", trained / "base", *out)
    refused(
        "not a model directory, it has no config.json. Name the adapter's model with --base", trained / "adapter", "--base", tmp_path, *out
    )
    copy = shutil.copytree(trained / "adapter", tmp_path / "copy")
    config = json.loads((copy / "adapter_config.json").read_text())
    for change, message in [
        ({"use_rslora": True}, "an adapter with use_rslora; llama.cpp scales every layer by lora_alpha / r"),
        ({"alpha_pattern": {"q_proj": 3}}, "an adapter with alpha_pattern"),
        ({"peft_type": "IA3"}, "an adapter of the type IA3; llama.cpp takes LORA only"),
        (
            {"base_model_name_or_path": "someone/model"},
            "its model 'someone/model' is not here. Name its directory or GGUF with --base MODEL",
        ),
    ]:
        (copy / "adapter_config.json").write_text(json.dumps(config | change))
        refused(message, copy, *out)
    (copy / "adapter_config.json").write_text(json.dumps(config))
    weights, base = copy / "adapter_model.safetensors", tmp_path / "base.gguf"
    base.write_bytes(b"a model")
    for read, before in (weights, weights.read_bytes()), (base, b"a model"):
        refused(f"cannot write {read}: it is read. Choose another --outfile", copy, "--base", base, "--outfile", read)
        assert read.read_bytes() == before
    (copy / "adapter_model.safetensors").write_bytes(b"broken")
    refused("llama.cpp's convert_lora_to_gguf.py failed: ", copy, *out)
    (copy / "adapter_config.json").write_text("{")
    refused("adapter_config.json: ", copy, *out)


def test_the_command_needs_nothing_but_its_arguments(tmp_path):
    for name in "torch", "transformers", "accelerate", "peft":  # importing them takes seconds
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')")
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    done = subprocess.run([sys.executable, "-m", "sherry_gguf.cli", "convert-adapter", "--help"], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": path})  # fmt: skip
    assert done.returncode == 0 and "ADAPTER_DIR" in done.stdout
