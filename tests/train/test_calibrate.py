"""`sherry-gguf calibrate`: error feedback, layers alone, distillation, and runs that are cut off."""

import json
import re

import pytest
import small_models
import torch
from conftest import sherry
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sherry_gguf.calibration import command, distillation, feedback, layers, sequences, training
from sherry_gguf.calibration import run as running
from sherry_gguf.calibration.streams import Streams
from sherry_gguf.errors import Stop
from sherry_gguf.qat import fake_quantize, full_precision, prepare, quantized_layers

pytest_plugins = "training_runs"
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

CONTEXT = 32


# ---- error feedback ----


def correlated(rng, rows, columns, tokens=512):
    """Weights, and inputs of which each is mostly a mixture of a few others."""
    hidden = torch.randn(tokens, columns // 8, generator=rng)
    x = hidden @ torch.randn(columns // 8, columns, generator=rng) + 0.1 * torch.randn(tokens, columns, generator=rng)
    return torch.randn(rows, columns, generator=rng) * 0.05, x


@pytest.mark.parametrize("size", [64, 128])
def test_feedback_gives_blocks_with_less_error_in_the_outputs(size):
    w, x = correlated(torch.Generator().manual_seed(0), 48, 256)
    q = feedback.quantize(w, x.t() @ x, size)
    groups = q.reshape(-1, 4)
    assert ((groups == 0).sum(-1) == 1).all()
    scales = q.reshape(-1, size).abs()
    d = scales.amax(-1, keepdim=True)
    assert ((scales == 0) | (scales == d)).all() and torch.equal(d, d.half().float())
    error, rounded = ((x @ (w - other).t()).square().sum() for other in (q, fake_quantize(w, group_size=size)))
    assert error < 0.35 * rounded


def test_without_correlation_feedback_takes_the_nearest_code():
    """Nothing can be made up for then, so each group is on its own."""
    w = torch.randn(16, 128, generator=torch.Generator().manual_seed(1))
    q = feedback.quantize(w, torch.eye(128), 128)
    d = q.abs().amax(-1, keepdim=True)
    lanes = w.abs().reshape(16, -1, 4)
    smallest = lanes == lanes.amin(-1, keepdim=True)  # for one d, leaving out the smallest loses least: d² - 2d|w| + w² against w²
    assert torch.equal(q, torch.where(smallest.reshape(16, 128), 0.0, d * w.sign()))


def test_inputs_that_are_always_zero():
    w, x = correlated(torch.Generator().manual_seed(2), 16, 128)
    x[:, 5] = 0
    q = feedback.quantize(w, x.t() @ x, 128)
    assert q.isfinite().all() and ((x @ (w - q).t()).square().mean() < (x @ w.t()).square().mean())


@pytest.mark.parametrize("size", [64, 128])
def test_latent_weights_give_the_quantized_ones(size):
    w, x = correlated(torch.Generator().manual_seed(3), 40, 256)
    q = feedback.quantize(w, x.t() @ x, size)
    q[3] = 0  # a row of zeros
    latent = feedback.latent(w, q, size)
    found = fake_quantize(latent, group_size=size)
    assert torch.equal(found.sign()[:3], q.sign()[:3]) and torch.equal(found.sign()[4:], q.sign()[4:])
    assert torch.allclose(found, q, rtol=1e-3, atol=0)  # the mean of 96 floats may round to the neighbour in float16
    assert latent[3].abs().max() == 0


# ---- layers ----


def tiny(kind, **more):
    sizes = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, vocab_size=320,
                 max_position_embeddings=256, head_dim=32) | more  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).eval()


KINDS = {
    "llama": {},
    "qwen3": {},
    "gemma2": {"query_pre_attn_scalar": 32, "sliding_window": 16, "final_logit_softcapping": 3.0},
    "gemma3_text": {"query_pre_attn_scalar": 32, "sliding_window": 16, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]},
    "gpt_neox": {"num_key_value_heads": 4},
}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_layers_one_by_one_are_the_model(kind):
    """Also those that differ in their masks and rotary embeddings."""
    model = tiny(kind, **KINDS[kind])
    ids = torch.randint(0, 320, (3, CONTEXT), generator=torch.Generator().manual_seed(1))
    wanted = model(input_ids=ids, output_hidden_states=True).hidden_states
    x = layers.embed(model, ids)
    assert torch.equal(x, wanted[0])
    for i, layer in enumerate(layers.calls(model, CONTEXT)):
        x = layer(x)
        if i < 2:  # the last ones of transformers are normed
            torch.testing.assert_close(x, wanted[i + 1])
    head = layers.Head(model, torch.tensor([3, 5, 7]))
    layers.check_head(model)
    torch.testing.assert_close(head(head.norm(x)), model(input_ids=ids).logits[..., [3, 5, 7]])


def test_models_whose_head_is_not_known():
    model = tiny("llama")
    hook = model.lm_head.register_forward_hook(lambda module, args, out: out * 2)
    with pytest.raises(Stop, match="what it computes after its last layer is not known here"):
        layers.check_head(model)
    hook.remove()
    model.model.norm, model.model.other = None, model.model.norm
    del model.model.norm
    with pytest.raises(Stop, match="no norm after its last layer is known here"):
        layers.Head(model)
    model.config.num_hidden_layers = 7
    with pytest.raises(Stop, match="no list of 7 transformer layers"):
        layers.find(model)


def test_matrices_with_the_same_inputs_share_their_moments(monkeypatch):
    """Feedback gives what it gives with moments of each matrix's own."""
    model = tiny("llama")
    prepare(model)
    layer = layers.calls(model, CONTEXT)[0]
    x = torch.randn(6, CONTEXT, 128, generator=torch.Generator().manual_seed(0))
    inputs = {name: [] for name in quantized_layers(layer.module)}
    for name, m in quantized_layers(layer.module).items():
        m.register_forward_pre_hook(lambda module, args, name=name: inputs[name].append(args[0].detach().reshape(-1, args[0].shape[-1])))
    with torch.no_grad(), full_precision(layer.module):
        wanted = layer(x)
    moments = {name: torch.cat(found).t() @ torch.cat(found) for name, found in inputs.items()}
    found, quantize = [], feedback.quantize
    monkeypatch.setattr(feedback, "quantize", lambda weight, moments, size: found.append(moments) or quantize(weight, moments, size))
    training.Task(layer, x, wanted, 6, 2, False, torch.device("cpu")).start_from_feedback(lambda: None)
    assert len(found) == len(moments) == 7 and len({id(m) for m in found}) == 4
    for mine, theirs in zip(found, moments.values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)  # added in another order


def test_a_layer_learns():
    model = tiny("llama")
    x = torch.randn(12, CONTEXT, 128, generator=torch.Generator().manual_seed(1))
    prepare(model)
    layer = layers.calls(model, CONTEXT)[0]
    with torch.no_grad(), full_precision(layer.module):
        wanted = layer(x)
    task = training.Task(layer, x, wanted, trained=10, batch=4, bf16=False, device=torch.device("cpu"))
    before, seen = task.held_out_error(), []
    task.train(rate=0.02, passes=12, seed=0, advance=seen.append)
    assert len(seen) == 30 and task.held_out_error() < before and sum(seen[-5:]) < 0.8 * sum(seen[:5])


def test_error_is_relative_but_for_small_states():
    wanted = torch.tensor([[[100.0, 0.0], [1.0, 0.0], [0.1, 0.0]]])
    assert training.typical(wanted) == 1
    found = wanted + torch.tensor([0.0, 0.5])
    assert float(training.error(found, wanted, 1.0)) == pytest.approx((0.25 / 1e4 + 0.25 + 0.25) / 3)


# ---- distillation ----


@pytest.mark.parametrize("train", ["scales", "weights"])
def test_distillation(tmp_path, train):
    """It brings the probabilities closer, keeps the codes if only scales train, and goes on where it was cut off."""
    ids = torch.randint(0, 320, (8, CONTEXT), generator=torch.Generator().manual_seed(1))
    full = tiny("llama")
    with torch.no_grad():
        states = full.model(input_ids=ids).last_hidden_state
    d = distillation.Distillation(steps=8, batch=4, rate=0.02, bf16=False, seed=0, save_every=3)

    def start():
        model = tiny("llama")
        prepare(model)
        codes = {name: m.quantized_weight().sign() for name, m in quantized_layers(model).items()}
        return model, layers.Head(model), distillation.fix_codes(model) if train == "scales" else {}, codes

    found = {}
    for stop in None, 3:
        model, head, fixed, codes = start()
        before = distillation.mean_divergence(model, head, ids, states, d)
        saved = tmp_path / f"{stop}.pt"

        def advance(done, loss, stop=stop):
            if done == stop:
                raise KeyboardInterrupt

        try:
            distillation.distil(model, head, fixed, ids, states, d, saved, advance)
        except KeyboardInterrupt:
            model, head, fixed, _ = start()
            distillation.distil(model, head, fixed, ids, states, d, saved, lambda *_: None)
        distillation.round_scales(fixed)
        after = distillation.mean_divergence(model, head, ids, states, d)
        assert after < 0.9 * before
        distillation.release(fixed)
        model.float()
        assert distillation.mean_divergence(model, head, ids, states, d) == pytest.approx(after, rel=1e-4)
        for name, m in quantized_layers(model).items():
            same = torch.equal(m.quantized_weight().sign(), codes[name])
            assert same == (train == "scales")
        found[stop] = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, p in found[None].items():
        assert torch.equal(p, found[3][name]), name


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_divergence_in_parts(kind, monkeypatch):
    """The same value and gradients as PyTorch's own at once; in parts of three tokens."""
    model = tiny(kind, **KINDS[kind])
    head = layers.Head(model)
    random = torch.Generator().manual_seed(0)
    found, wanted = (torch.randn(2, 5, 128, generator=random) for _ in range(2))
    found.requires_grad_(True)
    whole = torch.nn.functional.kl_div(head(found).log_softmax(-1), head(wanted).log_softmax(-1), log_target=True, reduction="sum") / 10
    gradient = torch.autograd.grad(whole, found)[0]
    monkeypatch.setattr(distillation, "LOGITS", 3 * 320)
    assert distillation.divergence(head, found * 1, wanted, backward=True) == pytest.approx(float(whole.detach()), rel=1e-5)
    torch.testing.assert_close(found.grad, gradient, rtol=1e-4, atol=1e-7)


def test_the_vocabulary_of_a_text(monkeypatch):
    monkeypatch.setattr(distillation, "MOST", 2)
    found = distillation.vocabulary(torch.tensor([[5, 5, 9], [7, 7, 7]]), torch.tensor([1]), torch.tensor([7, 300]))
    assert found.tolist() == [1, 5, 7, 300]


def test_likely_tokens(monkeypatch):
    head = layers.Head(tiny("llama"))
    states = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(distillation, "LIKELY", 2)
    monkeypatch.setattr(distillation, "LOGITS", 3 * 320)
    wanted = {int(i) for x in states.reshape(-1, 128) for i in head(x).argsort()[-2:]}
    assert set(distillation.likely(head, states).tolist()) == wanted


# ---- the command ----


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small_models.make(tmp_path_factory.mktemp("model") / "llama", "llama", latent=True)


def arguments(model, text, out, *more):
    return [str(x) for x in (model, "--text", text, "--output", out, "--tokens", 24 * CONTEXT, "--context", CONTEXT, "--passes", 2,
                             "--steps", 4, "--distill-batch", 4, "--device", "cpu", "--bf16", "false", *more)]  # fmt: skip


@pytest.fixture(scope="module")
def calibrated(model, text, tmp_path_factory):
    """A finished run: its directory."""
    out = tmp_path_factory.mktemp("calibrated") / "hf"
    assert command.main(arguments(model, text, out)) == 0
    return out


def test_result(model, calibrated, text, tmp_path, capfd):
    report = json.loads((calibrated / running.REPORT).read_text())
    count = AutoConfig.from_pretrained(model).num_hidden_layers
    assert len(report["layers"]) == count
    for record in report["layers"]:
        assert record["errors"]["trained"] < record["errors"]["rounded"], record
    assert report["distillation"]["after"] < report["distillation"]["before"]
    done = sherry("convert", calibrated, "--require-exact", "--outfile", tmp_path / "a.gguf")
    assert done.returncode == 0, done.stderr
    loaded = AutoModelForCausalLM.from_pretrained(calibrated, dtype=torch.float32)
    assert not any(p.isnan().any() for p in loaded.parameters())
    work = calibrated.with_name("hf.work")
    assert not [p for p in work.glob("*.states") if not p.name.startswith("teacher-")]  # nothing needs the layers' any more


@pytest.mark.parametrize(
    "point", ["embedding", "a layer's outputs", "training", "before a layer's record", "after a layer's record", "distillation"]
)
def test_a_run_that_was_cut_off_continues(model, calibrated, text, tmp_path, capfd, monkeypatch, point):
    """With the same result, to the last bit."""
    out = tmp_path / "hf"

    class Cut(Exception):
        pass

    calls = {"n": 0}

    def cutting(function, at):
        def call(*args, **kwargs):
            calls["n"] += 1
            if calls["n"] == at:
                raise Cut
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as m:
        if point == "embedding":
            m.setattr(layers, "embed", cutting(layers.embed, 3))
        elif point == "a layer's outputs":
            m.setattr(Streams, "write", cutting(Streams.write, 5))
        elif point == "training":
            m.setattr(training.Task, "train", cutting(training.Task.train, 2))
        elif point == "before a layer's record":
            m.setattr(running, "write", cutting(running.write, 3))  # the settings, the first layer's, this one
        elif point == "after a layer's record":
            m.setattr(Streams, "drop", cutting(Streams.drop, 2))
        else:
            m.setattr(distillation, "_save", cutting(distillation._save, 1))
        with pytest.raises(Cut):
            command.main(arguments(model, text, out))
    assert not out.exists()
    assert command.main(arguments(model, text, out)) == 0
    said = capfd.readouterr().out
    if point in ("training", "before a layer's record", "after a layer's record", "distillation"):
        assert re.search(r"continuing after \d layers", said)
    for name, p in AutoModelForCausalLM.from_pretrained(calibrated).state_dict().items():
        assert torch.equal(p, AutoModelForCausalLM.from_pretrained(out).state_dict()[name]), name


@pytest.mark.parametrize("inputs", ["quantized", "full"])
def test_inputs_of_the_layers(model, text, tmp_path, monkeypatch, inputs):
    """Each layer's, also after a run that was cut off."""
    seen, cut = [], True

    class Task(training.Task):
        def __init__(self, layer, given, wanted, *rest):
            seen.append((given.clone(), wanted.clone()))
            super().__init__(layer, given, wanted, *rest)

        def train(self, *how):
            if cut and len(seen) == 2:
                raise KeyError
            super().train(*how)

    monkeypatch.setattr(training, "Task", Task)
    argv = arguments(model, text, tmp_path / "hf", "--inputs", inputs, "--steps", 0)
    with pytest.raises(KeyError):
        command.main(argv)
    cut, again = False, seen[1]
    assert len(list((tmp_path / "hf.work").glob("quantized-*"))) == (inputs == "quantized")
    assert command.main(argv) == 0
    assert all(map(torch.equal, seen.pop(2), again)) and len(seen) == AutoConfig.from_pretrained(model).num_hidden_layers
    for (given, _), (_, wanted) in zip(seen[1:], seen):
        assert torch.equal(given, wanted) == (inputs == "full")  # what the full-precision layer before it gives
    report = json.loads((tmp_path / "hf" / running.REPORT).read_text())
    assert report["settings"]["inputs"] == inputs and all(r["errors"]["trained"] < r["errors"]["rounded"] for r in report["layers"])


def test_more_distillation_needs_no_new_layers(model, calibrated, text, tmp_path, capfd):
    work = calibrated.with_name("hf.work")
    before = (work / running.RECORD).read_text()
    assert command.main(arguments(model, text, tmp_path / "b", "--work", work, "--steps", 9)) == 1
    says = capfd.readouterr().err
    assert "distilled.pt was begun with other settings (steps: 4 then, 9 now): remove that file" in says
    (work / running.DISTILLED).rename(work / "kept")
    assert command.main(arguments(model, text, tmp_path / "b", "--work", work, "--steps", 2)) == 0
    assert (work / running.RECORD).read_text() == before
    (work / running.DISTILLED).unlink()
    (work / "kept").rename(work / running.DISTILLED)
    (work / running.SETTINGS).write_text((work / running.SETTINGS).read_text().replace('"steps": 2', '"steps": 4'))


@pytest.mark.parametrize("more, says", [
    (["--rate", 0.5], r"was begun with other settings \(rate: 0.02 then, 0.5 now\)"),
    (["--context", 64], r"was begun with other settings \(.*context: 32 then, 64 now"),
])  # fmt: skip
def test_other_settings_are_refused(model, calibrated, text, tmp_path, capfd, more, says):
    work = calibrated.with_name("hf.work")
    assert command.main(arguments(model, text, tmp_path / "b", "--work", work, *more)) == 1
    assert re.search(says, capfd.readouterr().err)


@pytest.mark.parametrize("change, says", [
    (["--output", "{full}"], "{full} already has something in it"),
    (["--text", "{nowhere}"], "{nowhere}: no such file or directory"),
    (["--context", "100000", "--tokens", "300000"], "positions end at"),
    (["--keep", "."], "has no linear layer to quantize"),
    (["--keep", "("], "--keep '(': missing )"),
    (["--group-size", "64", "--tokens", "16"], "--tokens: two sequences are 64 tokens"),
    (["--rate", "-1"], "argument --rate: invalid number value: '-1'"),
    (["--rate", "nan"], "argument --rate: invalid number value: 'nan'"),
    (["--device", "foo"], "--device foo: "),
    (["--device", "cuda:99"], "--device cuda:99: "),
    (["--output", "."], "already has something in it"),
    (["--batch", "0"], "argument --batch: invalid positive number value: '0'"),
])  # fmt: skip
def test_errors(model, text, tmp_path, capfd, change, says):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    names = {"full": tmp_path / "full", "nowhere": tmp_path / "nowhere"}
    try:
        code = command.main(arguments(model, text, tmp_path / "hf", *(str(x).format(**names) for x in change)))
    except SystemExit as e:
        code = e.code
    err = capfd.readouterr().err
    assert code == (2 if "argument" in says or "--tokens:" in says else 1) and says.format(**names) in err, err
    assert not (tmp_path / "hf").exists() and "Traceback" not in err


def test_too_little_text(model, tmp_path, capfd):
    (tmp_path / "a.txt").write_text("x = 1")
    assert command.main(arguments(model, tmp_path / "a.txt", tmp_path / "hf")) == 1
    assert re.search(r"the text has \d+ tokens, less than two sequences of 32", capfd.readouterr().err)


def test_text_for_layers_and_distillation(model, text):
    def source(*more):
        a = command.parse(arguments(model, text, "out", *more), "calibrate")
        return sequences.Source(a, AutoTokenizer.from_pretrained(model), "")

    some = source("--steps", 10)
    ids = some.for_layers()
    assert ids.shape == (24, CONTEXT) and (ids[:, 0] == some.tokenizer.bos_token_id).all() and 1 < some.bytes_per_token < 9
    assert torch.equal(ids, source().for_layers())
    more = some.for_distillation(ids)
    assert more.shape == (40, CONTEXT) and not as_set(more) & as_set(ids)
    assert not torch.equal(ids, source("--seed", 1).for_layers())


def as_set(ids):
    return {tuple(row) for row in ids.tolist()}


def test_all_of_a_short_text(model, text, capfd):
    a = command.parse(arguments(model, text, "out", "--tokens", 1 << 25), "calibrate")
    source = sequences.Source(a, AutoTokenizer.from_pretrained(model), "")
    everything = source.for_layers()
    assert len(source.for_distillation(everything)) == 16 and "reads what the layers were trained on" in capfd.readouterr().err
    found = source.for_distillation(everything[3:])
    new = as_set(everything[:3]) - as_set(everything[3:])
    assert len(found) == 16 and as_set(found[: len(new)]) == new  # the first ones are held out


def test_of_many_documents_only_some_are_read(model, tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"The sea was calm {i} times."}) + "\n" for i in range(3000)))
    a = command.parse(arguments(model, tmp_path / "a.jsonl", "out", "--steps", 10), "calibrate")
    tokenizer = AutoTokenizer.from_pretrained(model)
    read = []

    class Counting:
        bos_token_id = tokenizer.bos_token_id

        def __call__(self, piece, **more):
            read.append(piece)
            return tokenizer(piece, **more)

    source = sequences.Source(a, Counting(), "")
    ids = source.for_layers()
    assert len(ids) == 24 and len(read) < 1000
    assert sum(int(re.search(r"(\d+) times", piece)[1]) > 1500 for piece in read) > len(read) / 4  # from all over the text
    first = list(read)
    read.clear()
    assert not as_set(source.for_distillation(ids)) & as_set(ids) and read[: len(first)] == first and len(read) < 2000


@pytest.mark.parametrize("context", [32, 2048])
def test_documents_shorter_than_a_sequence(model, tmp_path, context):
    """They are joined, as are the parts of a document."""
    (tmp_path / "a.jsonl").write_text('{"text": "The sea was calm."}\n' * 2000)
    a = command.parse(arguments(model, tmp_path / "a.jsonl", "out", "--context", context, "--tokens", 4 * context), "calibrate")
    source = sequences.Source(a, AutoTokenizer.from_pretrained(model), "")
    ids = source.for_layers()
    assert ids.shape == (4, context) and re.search("calm\\. ?The sea was", source.tokenizer.decode(ids[0]))
