"""`sherry-gguf pack`, and what transformers and the converter make of packed checkpoints."""

import json
import re
import shutil

import numpy as np
import packed_models
import pytest
import small_models
import torch
import transformers
from conftest import sherry
from safetensors.torch import load_file, save_file

import sherry_gguf
from sherry_gguf.errors import ConvertError
from sherry_gguf.packed import PackedLinear, SherryConfig, layout
from sherry_gguf.qat import models as qat_models
from sherry_gguf.qat.arguments import SherryArguments
from sherry_gguf.quaff import building, quantize_for_finetuning
from sherry_gguf.quaff.arguments import FinetuneArguments

LATENT = "llama-tied"
VANISHING = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A directory with NAME/, packed/NAME/ and the GGUFs NAME.gguf and packed/NAME.gguf."""
    work = tmp_path_factory.mktemp("pack")
    (work / "packed").mkdir()
    for name in "llama-64", LATENT:
        small_models.make(work / name, name, latent=name == LATENT)
    tensors = load_file(work / LATENT / "model.safetensors")
    tensors[VANISHING][:8] *= 1e-8  # below what fp16 scales hold
    tensors[VANISHING][3] = 0
    save_file(tensors, work / LATENT / "model.safetensors", {"format": "pt"})
    for name, *flags in ("llama-64", "--require-exact"), (LATENT, "--max-shard-size", "300K"):
        done = sherry("pack", work / name, "--out", work / "packed" / name, *flags)
        assert done.returncode == 0, done.stderr
        for directory in work / name, work / "packed" / name:
            done = sherry("convert", directory, "--outfile", f"{directory}.gguf")
            assert done.returncode == 0, done.stderr
    return work


@pytest.fixture
def copy(work, tmp_path):
    """A packed checkpoint to damage."""
    return shutil.copytree(work / "packed/llama-64", tmp_path / "copy")


def load(directory, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, **({"dtype": torch.float32} | options))


def ids(seed=0):
    return torch.randint(5, small_models.VOCAB, (2, 30), generator=torch.Generator().manual_seed(seed))


def packed_layers(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, PackedLinear)}


def changed(directory, **tensors):
    """Change tensors of a checkpoint; None removes one."""
    path = directory / "model.safetensors"
    new = load_file(path) | tensors
    save_file({name: t for name, t in new.items() if t is not None}, path, {"format": "pt"})


# ---- the files ----


def test_an_exact_checkpoint_gives_the_same_gguf(work):
    assert (work / "llama-64.gguf").read_bytes() == (work / "packed/llama-64.gguf").read_bytes()
    done = sherry("verify", work / "packed/llama-64.gguf", work / "packed/llama-64")
    assert done.returncode == 0 and done.stdout.startswith("14 TQ1_25 and TQ1_25_64 tensors bit for bit"), done.stdout


def test_latent_weights_give_the_same_blocks(work):
    """Also where a scale vanishes in fp16: the codes of such a block are those of its weights."""
    one, two = (sherry_gguf.read_gguf(path).tensors for path in (work / f"{LATENT}.gguf", work / f"packed/{LATENT}.gguf"))
    assert [*one] == [*two] and sum(t.type.name == "TQ1_25" for t in one.values()) == 14
    for name, t in one.items():
        assert np.array_equal(t.read(), two[name].read()), name
    vanished = one["blk.1.ffn_up.weight"].read()[:8].reshape(8, -1, 22)
    assert not vanished[..., 20:].any() and vanished[0, :, :20].any()
    done = sherry("verify", work / f"packed/{LATENT}.gguf", work / f"packed/{LATENT}")
    assert done.returncode == 0, done.stdout


def test_the_files_are_those_of_save_pretrained(work, tmp_path):
    old = work / "packed" / LATENT
    model = load(old)
    model.save_pretrained(tmp_path, max_shard_size="300KB")
    assert {p.name for p in tmp_path.iterdir()} | {"tokenizer.model", "tokenizer_config.json"} == {p.name for p in old.iterdir()}
    weights = [load_file(p) for p in sorted(old.glob("*.safetensors"))]
    again = [load_file(p) for p in sorted(tmp_path.glob("*.safetensors"))]
    assert len(weights) == 2 and sum(map(len, weights)) == sum(map(len, again)) == 20
    weights, again = ({name: t for part in parts for name, t in part.items()} for parts in (weights, again))
    for name, t in weights.items():
        assert torch.equal(t.float(), again[name].float()) and (t.dtype == again[name].dtype) == name.endswith(".qweight")
    one, two = (json.loads((d / "config.json").read_text()) for d in (old, tmp_path))
    assert one["quantization_config"] == two["quantization_config"] and one["sherry_config"] == two["sherry_config"]
    assert torch.equal(load(tmp_path)(ids()).logits, model(ids()).logits)


def test_blocks_are_in_the_order_of_the_format(work):
    for name, t in load_file(work / "packed/llama-64/model.safetensors").items():
        if not name.endswith(".qweight"):
            continue
        original = load_file(work / "llama-64/model.safetensors")[name.replace("qweight", "weight")].float().numpy()
        kind = sherry_gguf.TQ1_25_64 if "down_proj" in name else sherry_gguf.TQ1_25
        assert np.array_equal(kind.dequantize(t.numpy()), original)


def test_modules_name_only_what_is_packed():
    one, two = sherry_gguf.TQ1_25, sherry_gguf.TQ1_25_64
    packed = {"l.0.a": one, "l.1.a": one, "l.0.b": one, "l.1.b": two, "l.0.c": one}
    modules = layout.modules_of(packed, ["l.1.c", "head"])
    assert modules == {"TQ1_25": ["l.*.a", "l.0.b", "l.0.c"], "TQ1_25_64": ["l.1.b"]}
    found = layout.Modules(modules)
    assert {name: found.kind(name) for name in packed} == packed and found.kind("l.1.c") is found.kind("head") is None
    assert found.kind("l.7.a") is one


# ---- transformers ----


def test_the_model_is_the_fake_quantized_one(work):
    fake, packed = load(work / "llama-64"), load(work / "packed/llama-64", device_map="auto")
    layers = packed_layers(packed)
    assert len(layers) == 14 and packed.is_quantized and packed.hf_quantizer.is_serializable()
    bits = 8 * sum(b.nbytes for layer in layers.values() for b in layer.buffers())
    weights = sum(layer.in_features * layer.out_features for layer in layers.values())
    assert bits / weights < 1.43  # two of its layers are TQ1_25_64
    naive = quantize_for_finetuning(load(work / "llama-64"), None, "tq1_25", method="naive").eval()
    with torch.no_grad():
        a, b = (m(ids()).logits for m in (fake, packed))
        assert torch.equal(b, naive(ids()).logits)
        p, q = a.log_softmax(-1), b.log_softmax(-1)
        assert 0 < float((p.exp() * (p - q)).sum(-1).mean()) < 1e-3
        half = load(work / "packed/llama-64", dtype=torch.bfloat16)(ids()).logits
        assert half.dtype == torch.bfloat16 and (half - b).norm() < 0.05 * b.norm()
        assert torch.equal(packed.dequantize()(ids()).logits, a) and not packed_layers(packed)


def test_generate_and_pipeline(work):
    model = load(work / "packed/llama-64", dtype="auto")
    assert model.dtype == torch.bfloat16
    found = model.generate(ids()[:1], attention_mask=torch.ones(1, 30), max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    text = transformers.pipeline("text-generation", str(work / "packed/llama-64"))
    assert found.shape == (1, 34) and isinstance(text.model, type(model)) and text("def", max_new_tokens=3)[0]["generated_text"]


def test_the_model_without_its_head(work):
    model = transformers.AutoModel.from_pretrained(work / "packed/llama-64", dtype=torch.float32)
    assert len(packed_layers(model)) == 14
    assert torch.equal(model(ids()).last_hidden_state, load(work / "packed/llama-64").model(ids()).last_hidden_state)


def test_gguf_file(work):
    """transformers' own loading of GGUFs: it decodes the types, which are registered."""
    model = load(work, gguf_file="llama-64.gguf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(work, gguf_file="llama-64.gguf")
    assert torch.allclose(model(ids()).logits, load(work / "llama-64")(ids()).logits, atol=1e-3)
    assert tokenizer.decode(tokenizer("def f():", add_special_tokens=False).input_ids) == "def f():"


# ---- what is refused ----

Q = "model.layers.0.self_attn.q_proj.qweight"


@pytest.mark.parametrize(
    "tensors, cause",
    [
        ({Q: None}, f"lacks 1 of its tensors, the first {Q}"),
        ({"model.norm.weight": None}, "lacks 1 of its tensors, the first model.norm.weight"),
        ({Q: torch.zeros(127, 22, dtype=torch.uint8)}, rf"{Q} is damaged.*uint8 \(127, 22\) instead of uint8 \(128, 22\)"),
        ({Q: torch.zeros(128, 22)}, f"{Q} is damaged.*float32"),
        ({Q: torch.full((128, 22), 255, dtype=torch.uint8)}, f"{Q} is damaged.*a scale of row 0 is nan, which no TQ1_25 has"),
    ],
    ids=["no blocks", "no norm", "shape", "dtype", "scale"],
)
def test_damaged_tensors(copy, tensors, cause):
    changed(copy, **tensors)
    with pytest.raises(ConvertError, match=cause):
        load(copy)


@pytest.mark.parametrize(
    "change, cause",
    [
        ({"modules": None}, "modules None, not an object"),
        ({"modules": {"TQ1_25": [["a"]]}}, "not an object of types and lists of layers"),
        ({"modules": {"TQ9": []}}, "type 'TQ9'; known are TQ1_25, TQ1_25_64"),
        ({"modules": {"TQ1_25": ["other"]}}, "no layer of LlamaForCausalLM is in quantization_config"),
        ({"modules": {"TQ1_25": ["model.layers.*.mlp.down_proj"]}}, "down_proj: 192 inputs are not a multiple of 128"),
        ({"modules": {"TQ1_25": ["model.norm"]}}, "model.norm, which is a LlamaRMSNorm here"),
        ({"version": 2}, "quantization_config has version, which this version of sherry-gguf does not know"),
    ],
    ids=["none", "lists", "type", "names", "rows", "norm", "later"],
)
def test_damaged_configurations(copy, change, cause):
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] |= change
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConvertError, match=cause):
        load(copy)


def test_what_packed_layers_cannot(work):
    with pytest.raises(ConvertError, match="do not multiply torch.float16: pass dtype=torch.float32"):
        load(work / "packed/llama-64", dtype=torch.float16)
    with pytest.raises(ConvertError, match="cannot be on the device disk"):
        load(work / "packed/llama-64", device_map={"model": "cpu", "lm_head": "disk"})
    with pytest.raises(ConvertError, match="cannot be on the device meta"):
        load(work / "packed/llama-64", device_map="meta")
    with pytest.raises(ConvertError, match="SherryConfig is for packed checkpoints; `sherry-gguf pack DIR`"):
        load(work / "llama-64", quantization_config=SherryConfig({"TQ1_25": []}))


def test_the_converter_refuses_damaged_blocks(copy):
    for tensor, cause in (
        (torch.full((128, 22), 255, dtype=torch.uint8), "a scale is nan, which no TQ1_25 has: the checkpoint is damaged"),
        (
            torch.zeros(128, 21, dtype=torch.uint8),
            f"{Q} is torch.uint8 (128, 21), not torch.uint8 (rows, bytes of TQ1_25 blocks): the checkpoint",
        ),
    ):
        changed(copy, **{Q: tensor})
        done = sherry("convert", copy, "--outfile", copy / "x.gguf")
        assert done.returncode == 1 and cause in done.stderr, done.stderr
        assert not (copy / "x.gguf").exists()


def test_pack_refuses(work, tmp_path):
    def error(directory, *flags):
        done = sherry("pack", directory, *flags)
        assert done.returncode == 1 and not [*tmp_path.glob("x*"), *tmp_path.glob(".sherry*")], done.stderr
        return done.stderr

    assert f"{work / 'packed'} already has something in it" in error(work / "llama-64", "--out", work / "packed")
    assert "is quantized already (sherry)" in error(work / "packed/llama-64", "--out", tmp_path / "x")
    assert "14 of 14 tensors are not 3:4 sparse ternary" in error(work / LATENT, "--out", tmp_path / "x", "--require-exact")
    assert "is not a directory. Create it first" in error(work / LATENT, "--out", tmp_path / "none/x")
    small_models.make(tmp_path / "gpt2", "gpt2")
    assert "nothing to pack, transformers has no torch.nn.Linear for blk.*.attn_qkv" in error(tmp_path / "gpt2", "--out", tmp_path / "x")
    small_models.make(tmp_path / "bin", "llama-64", safe=False)
    assert "only safetensors are packed" in error(tmp_path / "bin", "--out", tmp_path / "x")


def pack_with(source, target, config, *flags):
    """Copy a checkpoint, change its config.json (None removes a key), pack it; what pack says, and the packed config.json."""
    shutil.copytree(source, target)
    changed_config = {k: v for k, v in (json.loads((target / "config.json").read_text()) | config).items() if v is not None}
    (target / "config.json").write_text(json.dumps(changed_config))
    done = sherry("pack", target, *flags)
    packed = target.with_name(f"{target.name}-packed") / "config.json"
    return done, json.loads(packed.read_text()) if packed.exists() else None


def test_group_sizes(work, tmp_path):
    """Of a model with several: the packed directory gives the same GGUF, and --group-size drops them."""
    sherry_config = json.loads((work / "llama-64/config.json").read_text()).get("sherry_config", {})
    sizes = {"model.layers.0.mlp.down_proj": 64, "model.layers.1.mlp.down_proj": 64}
    sherry_config |= {"method": "sparse_absmean", "granularity": "per_group", "group_size": 128, "group_sizes": sizes}
    done, config = pack_with(work / "llama-64", tmp_path / "a", {"sherry_config": sherry_config})
    assert done.returncode == 0 and config["sherry_config"]["group_sizes"] == sizes, done.stderr
    for directory in "a", "a-packed":
        done = sherry("convert", tmp_path / directory, "--outfile", tmp_path / f"{directory}.gguf", "--model-name", "x")
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "a-packed.gguf").read_bytes()
    done, config = pack_with(work / "llama-64", tmp_path / "b", {"sherry_config": sherry_config}, "--group-size", "64")
    assert done.returncode == 0 and "group_sizes" not in config["sherry_config"], done.stderr


def test_kept_latent_weights_stay_latent(work, tmp_path):
    done, config = pack_with(work / LATENT, tmp_path / "a", {}, "--keep", r"blk\.0\..*")
    assert done.returncode == 0 and config["sherry_config"].get("weights", "latent") == "latent", done.stderr


def test_a_float16_checkpoint_that_does_not_say_so(work, tmp_path):
    half = shutil.copytree(work / "llama-64", tmp_path / "half")
    path = half / "model.safetensors"
    save_file({name: t.half() for name, t in load_file(path).items()}, path, {"format": "pt"})
    done, config = pack_with(half, tmp_path / "a", {"dtype": None, "torch_dtype": None})
    assert done.returncode == 0 and config["dtype"] == "float32", done.stderr
    assert load(tmp_path / "a-packed", dtype="auto").dtype == torch.float32


def test_shapes_that_config_json_contradicts(work, tmp_path):
    done, config = pack_with(work / "llama-64", tmp_path / "a", {"vocab_size": 4 * small_models.VOCAB})
    assert done.returncode == 1 and not config and "they do not belong together" in done.stderr, done.stderr


# ---- training ----


def test_finetune_takes_it_packed_and_train_decodes_it(work):
    directory = str(work / "packed/llama-64")
    arguments = FinetuneArguments(model=directory, context=64)
    model, _ = building.load_model(arguments)
    assert building.base_of(arguments, model) == "tq1_25" and len(packed_layers(model)) == 14
    model, _ = qat_models.load(SherryArguments(model=directory, context=64))
    assert not packed_layers(model) and not model.is_quantized
    original = load(work / "llama-64")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), original.parameters(), strict=True))


@pytest.mark.slow
def test_the_benchmark(tmp_path, capsys):
    sizes = {"hidden": 256, "intermediate": 384, "layers": 2, "vocab": 512, "tokens": 2, "rounds": 1, "threads": 1, "kl-tokens": 20}
    threads = torch.get_num_threads()
    assert packed_models.main([f"--{name}={value}" for name, value in sizes.items()] + ["--work", str(tmp_path)]) == 0
    torch.set_num_threads(threads)
    shown = capsys.readouterr().out
    assert re.search(r"packed layers: 14, 1 M weights, 1\.37\d+ bits each in memory", shown), shown
    kl = float(re.search(r"20 random tokens: (\S+) nats", shown)[1])
    assert 0 < kl < 1e-3
