"""`sherry-gguf finetune`: runs to an adapter, and resumes; what is refused, before hours of work."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import peft
import pytest
import small_models
import torch
import transformers
from conftest import sherry
from quaff_models import CHATML
from safetensors.torch import load_file

from sherry_gguf.cli import main
from sherry_gguf.errors import Stop
from sherry_gguf.quaff import Channels, building, load_factors, quantize_for_finetuning
from sherry_gguf.quaff import rows as quaff_rows

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = small_models.make(tmp_path_factory.mktemp("base") / "llama", "llama")
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    path, rng = tmp_path_factory.mktemp("rows") / "chats.jsonl", random.Random(0)
    with open(path, "w") as f:
        for _ in range(40):
            a, b = rng.randrange(10), rng.choice("xyz")
            messages = [{"role": "user", "content": f"return {b} + {a}"}, {"role": "assistant", "content": f"def f({b}): return {b} + {a}"}]
            f.write(json.dumps({"messages": messages}) + "\n")
    return path


def flags(directory, chats, out, **more):
    settings = dict(model=directory, train=chats, output_dir=out, context=64, max_steps=6, per_device_train_batch_size=4,
                    learning_rate=1e-2, rank=4, logging_steps=2, use_cpu=True, report_to="none", threshold=4,
                    budget=0.05) | more  # fmt: skip
    return ["finetune", *(str(x) for k, v in settings.items() if v is not None for x in (f"--{k}", v))]


@pytest.fixture(scope="module")
def finished(base, chats, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    assert main(flags(base, chats, out)) == 0
    return out


def test_the_result_is_an_adapter_of_peft(base, chats, finished):
    """Everything that the run did, again by hand from its files."""
    record = json.loads((finished / "adapter/training.json").read_text())
    assert record["loss"]["held_out"] < record["before"]["quantized"] - 0.1 and record["steps"] == 6
    assert abs(record["before"]["quantized"] - record["before"]["given"]) < 0.1
    assert (finished / "training.png").stat().st_size > 10_000
    config = json.loads((finished / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base) and config["r"] == 4
    channels = Channels.load(finished / "adapter/channels.safetensors")
    assert sum(map(len, channels.channels.values())) > 0 and channels.settings["threshold"] == 4
    model = quantize_for_finetuning(transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), channels)
    model = peft.PeftModel.from_pretrained(model, finished / "adapter")
    load_factors(model, finished / "adapter/factors.safetensors")
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    encoder, held_out = quaff_rows.Encoder(tokenizer, 64), []
    for row in quaff_rows.documents(arguments(train=[str(chats)]), quaff_rows.Row())[1]["row"]:
        held_out += [{"input_ids": tokens.ids, "labels": tokens.labels} for tokens in encoder(json.loads(row))]
    batch = quaff_rows.Collate(2)(held_out)
    with torch.no_grad():
        loss = model.eval()(**batch).loss.item()
    assert loss == pytest.approx(record["loss"]["held_out"], abs=1e-5)


def arguments(**more):
    from sherry_gguf.quaff.arguments import FinetuneArguments

    return FinetuneArguments(**more)


def test_the_output(base, chats, tmp_path, capfd):
    assert main(flags(base, chats, tmp_path / "run", base="tq1_25")) == 0
    out, errors = capfd.readouterr()
    assert re.search(r"rows: 38 to train on, 2 held out\n", out)
    assert re.search(r"model: 14 layers of 1\.\d M weights in tq1_25 by quaff, 1\.3\d* bits each; lora trains 0\.\d+ M parameters\n", out)
    assert re.search(r"outlier channels: \d+ in \d+ of 14 layers \(calibrated\)\n", out)
    start = re.search(r"start: held-out loss before the first step \(\d+ tokens\): ([\d.]+) as given, ([\d.]+) quantized\n", out)
    end = re.search(r"training: 6 steps, held-out loss ([\d.]+) of the adapter in \S*run/adapter\n", out)
    assert float(end[1]) < float(start[2])
    assert "Traceback" not in errors and "arning" not in errors, errors


@pytest.mark.parametrize("method", ["naive", "static", "dynamic", "mixed", "full", "bf16"])
def test_other_methods(base, chats, tmp_path, capfd, method):
    assert main(flags(base, chats, tmp_path / "run", method=method, max_steps=2)) == 0
    assert (f"by {method}" in capfd.readouterr().out) is (method not in ("full", "bf16"))
    assert (tmp_path / "run/adapter/adapter_model.safetensors").is_file()
    assert (tmp_path / "run/adapter/channels.safetensors").exists() is (method == "static")


@pytest.mark.parametrize("adapter", ["ia3", "prompt", "p-tuning"])
def test_other_adapters(base, chats, tmp_path, adapter):
    assert main(flags(base, chats, tmp_path / "run", adapter=adapter, max_steps=2, virtual_tokens=3)) == 0
    kinds = {"ia3": "IA3", "prompt": "PROMPT_TUNING", "p-tuning": "P_TUNING"}
    assert json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())["peft_type"] == kinds[adapter]


def test_experts_in_mxfp4(tmp_path):
    """transformers decodes them to bfloat16, whatever type is asked for; the rest of the model is float32."""
    base = small_models.make(tmp_path / "gptoss", "gptoss")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{i} + {i} =", "completion": f" {2 * i}"}) + "\n" for i in range(8)))
    assert main(flags(base, rows, tmp_path / "run", max_steps=1)) == 0


def test_prompts_checkpointing_targets_and_channels_of_another_run(base, finished, tmp_path, capfd):
    rows = tmp_path / "prompts.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{i} + {i} =", "completion": f" {2 * i}"}) + "\n" for i in range(30)))
    more = dict(gradient_checkpointing=True, target="q_proj|v_proj", channels=finished / "adapter/channels.safetensors", keep="down_proj")
    assert main(flags(base, rows, tmp_path / "run", **more)) == 0
    assert "12 layers" in capfd.readouterr().out
    config = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert len(config["target_modules"]) == 4 and all(name.endswith(("q_proj", "v_proj")) for name in config["target_modules"])


def test_a_packed_gguf(base, chats, tmp_path, capfd):
    """It trains as the directory that it was made from, whose weights are packed here; embeddings are F16 in the file."""
    sherry("convert", base, "--outfile", tmp_path / "base.gguf")
    results = []
    for model in tmp_path / "base.gguf", base:
        more = dict(base="tq1_25") if model == base else {}
        assert main(flags(model, chats, tmp_path / f"of-{model.name}" / "run", **more)) == 0
        results.append(json.loads((tmp_path / f"of-{model.name}" / "run/adapter/training.json").read_text()))
        config = json.loads((tmp_path / f"of-{model.name}" / "run/adapter/adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(model)
    a, b = results
    assert a["before"] == pytest.approx(b["before"], abs=1e-3) and a["loss"] == pytest.approx(b["loss"], abs=0.02)
    assert main(flags(tmp_path / "base.gguf", chats, tmp_path / "other", base="int8")) == 1
    assert "base.gguf is packed: it trains with --base tq1_25 and --method quaff or naive" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "tq1_25"])
def test_interrupted_run_resumes_and_ends_the_same(base, chats, tmp_path, capfd, kind):
    steps = 60

    def command(out):
        return flags(base, chats, tmp_path / out, max_steps=steps, save_steps=1000, base=kind)

    assert main(command("whole")) == 0
    first = subprocess.Popen([sys.executable, "-m", "sherry_gguf", *command("cut")], text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"},
                             preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))  # fmt: skip
    for line in first.stdout:
        if line.startswith("start:"):
            break
    time.sleep(1.5)
    first.send_signal(signal.SIGINT)
    _, errors = first.communicate(timeout=60)
    assert first.returncode == 130 and "run the same command again" in errors and "Traceback" not in errors
    assert not (tmp_path / "cut/adapter").exists()
    capfd.readouterr()
    assert main(command("cut")) == 0
    step = int(re.search(r"resuming from \S*checkpoint-(\d+)", capfd.readouterr().out)[1])
    assert 0 < step < steps
    for name in "adapter_model.safetensors", "factors.safetensors", "channels.safetensors":
        a, b = (load_file(tmp_path / out / "adapter" / name) for out in ("whole", "cut"))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), name


def test_what_is_refused(base, chats, finished, tmp_path, capfd):
    out = tmp_path / "run"
    (tmp_path / "empty.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "x"}]}) + "\n" + json.dumps({"text": "y"}))
    (tmp_path / "junk.gguf").write_bytes(b"junk")
    latent = shutil.copytree(base, tmp_path / "latent")
    small_models.edit_config(latent, sherry_config={"weights": "latent"})
    for more, message in [
        (dict(model=None), "give a model to fine-tune: --model DIR_OR_GGUF"),
        (dict(model=tmp_path / "nothing"), f"{tmp_path}/nothing: "),
        (dict(model=tmp_path / "junk.gguf"), "junk.gguf is not a GGUF file"),
        (dict(model=latent), "holds latent weights of a training that has not ended: fine-tune its export"),
        (dict(train=tmp_path / "nothing"), "no such file or directory"),
        (dict(train=tmp_path / "empty.jsonl"), "none has a token to train within --context 64"),
        (dict(context=1000), "the model's positions end at 256. Pass --context 256, or less"),
        (dict(adapter="prompt", virtual_tokens=193), "--context 64 with --virtual_tokens 193: the model's positions end at 256"),
        (dict(rank=0), "--rank 0: at least 1"),
        (dict(per_device_eval_batch_size=0), "--per_device_eval_batch_size 0: at least 1"),
        (dict(seed=-1), "--seed -1: from 0 to 4294967295"),
        (dict(dataloader_drop_last=True, per_device_train_batch_size=100), "training took no step: the rows do not fill one batch"),
        (dict(dropout=1), "--dropout 1: from 0 to below 1"),
        (dict(threshold=0), "--threshold 0: must be above 0"),
        (dict(budget=2), "--budget 2: from 0 to 1"),
        (dict(budgets="nothing=0.1"), "a budget for 'nothing': no layer to quantize has such a name; one is model."),
        (dict(keep="."), "the model has no layers to quantize: `keep` names all of them"),
        (dict(gamma=3), "--gamma 3: from 0 to 1"),
        (dict(keep="("), "--keep '(': not a regular expression"),
        (dict(target="nothing"), "--target 'nothing': no linear layer has such a name"),
        (dict(base="tq1_25", method="static"), "--base tq1_25 --method static: packed weights train with quaff or naive"),
        (dict(channels=tmp_path / "nothing"), "/nothing: no such file"),
        (dict(channels=chats), "chats.jsonl: not a safetensors file"),
        (dict(channels=finished / "adapter/adapter_model.safetensors"), "not a file of outlier channels"),
        (dict(chat_template=tmp_path / "nothing"), "nothing"),
        (dict(fsdp="full_shard"), "quantized weights are not sharded"),
        (dict(output_dir=finished, export=tmp_path / "two", rank=8), "begun with other settings (rank: 4 then, 8 now)"),
    ]:
        assert main(flags(base, chats, out, **more)) == 1, message
        error = capfd.readouterr().err
        assert message in error and "Traceback" not in error, error
        assert not list(out.glob("checkpoint-*")) and not (out / "adapter").exists()
        shutil.rmtree(out, ignore_errors=True)


@pytest.mark.parametrize(
    "more",
    [
        dict(budgets="down_proj"),
        dict(budgets="down_proj(=0.05"),
        dict(budgets="down_proj=2"),
        dict(method="int4"),
        dict(nonsense=1),
        dict(rank="many"),
    ],
)
def test_wrong_flags(base, chats, tmp_path, capfd, more):
    with pytest.raises(SystemExit) as e:
        main(flags(base, chats, tmp_path / "run", **more))
    error = capfd.readouterr().err
    assert e.value.code == 2 and error.startswith("sherry-gguf finetune: ") and error.count("\n") == 1


def test_a_run_that_was_refused_or_left_no_checkpoint_begins_anew(base, chats, tmp_path, capfd, monkeypatch):
    def no_adapter(s, model):
        raise Stop("no adapter")

    def budget():
        return Channels.load(tmp_path / "run/adapter/channels.safetensors").settings["budget"]

    with monkeypatch.context() as patch:
        patch.setattr(building, "with_adapter", no_adapter)
        assert main(flags(base, chats, tmp_path / "run")) == 1
    assert main(flags(base, chats, tmp_path / "run", max_steps=2, save_strategy="no", budget=0.1)) == 0
    assert budget() == 0.1
    shutil.rmtree(tmp_path / "run/adapter")
    assert main(flags(base, chats, tmp_path / "run", max_steps=2, save_strategy="no")) == 0
    assert budget() == 0.05


def test_the_best_model_has_its_own_factors(base, chats, tmp_path):
    more = dict(eval_strategy="steps", eval_steps=1, save_steps=1, load_best_model_at_end=True, save_total_limit=9,
                metric_for_best_model="loss", greater_is_better=True)  # fmt: skip  # an early one
    assert main(flags(base, chats, tmp_path / "run", **more)) == 0
    best = json.loads((tmp_path / "run/checkpoint-6/trainer_state.json").read_text())["best_model_checkpoint"]
    assert not best.endswith("checkpoint-6")
    for name in "factors.safetensors", "adapter_model.safetensors":
        made, kept = load_file(tmp_path / "run/adapter" / name), load_file(f"{best}/{name}")
        assert all(torch.equal(made[k], v) for k, v in kept.items()), name


def test_a_result_that_is_not_finite_is_not_published(base, chats, tmp_path, capfd):
    assert main(flags(base, chats, tmp_path / "run", learning_rate=1e30, max_grad_norm=0, logging_steps=100)) == 1
    assert "training diverged. Use a lower --learning_rate and another --output_dir" in capfd.readouterr().err
    assert not (tmp_path / "run/adapter").exists()


def test_a_damaged_checkpoint_is_named(base, chats, finished, tmp_path, capfd):
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/adapter")
    (tmp_path / "run/checkpoint-6/factors.safetensors").write_bytes(b"junk")
    assert main(flags(base, chats, tmp_path / "run")) == 1
    error = capfd.readouterr().err
    assert "cannot resume from" in error and "not a safetensors file" in error and "remove it to resume from an earlier one" in error


@pytest.mark.slow
def test_two_processes(base, chats, tmp_path):
    """Under torchrun: cut off and resumed; one of them calibrates, saves and evaluates."""

    def torchrun(*more):
        begin = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0"]
        run = flags(
            base, chats, tmp_path / "run", ddp_backend="gloo", save_steps=3, per_device_train_batch_size=2, gradient_checkpointing=True
        )
        command = [sys.executable, *begin, "-m", "sherry_gguf", *run, *more]
        return subprocess.run(command, capture_output=True, text=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"})

    first = torchrun()
    assert first.returncode == 0, first.stderr[-3000:]
    assert first.stdout.count("start: held-out loss") == first.stdout.count("training: 6 steps") == 1
    result = {name: load_file(tmp_path / "run/adapter" / name) for name in ("adapter_model.safetensors", "factors.safetensors")}
    shutil.rmtree(tmp_path / "run/adapter")
    shutil.rmtree(tmp_path / "run/checkpoint-6")
    second = torchrun()
    assert second.returncode == 0, second.stderr[-3000:]
    assert re.search(r"resuming from \S*checkpoint-3\n", second.stdout)
    for name, wanted in result.items():
        again = load_file(tmp_path / "run/adapter" / name)
        assert all(torch.equal(again[k], v) for k, v in wanted.items()), name
    assert main(flags(base, chats, tmp_path / "run", per_device_train_batch_size=2, save_steps=3, export=tmp_path / "two")) == 1


def test_products_in_bfloat16(base, chats, tmp_path):
    for kind in "int8", "tq1_25":
        assert main(flags(base, chats, tmp_path / kind, base=kind, bf16=True)) == 0
        record = json.loads((tmp_path / kind / "adapter/training.json").read_text())
        assert record["loss"]["held_out"] < record["before"]["quantized"] - 0.1
        assert all(t.dtype == torch.float32 for t in load_file(tmp_path / kind / "adapter/adapter_model.safetensors").values())
