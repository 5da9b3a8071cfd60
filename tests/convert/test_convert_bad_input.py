"""Bad input: each has its own message and leaves nothing behind; checkpoint and older targets stay as they are."""

import json
import os
import pathlib

import conftest
import pytest
import small_models
import torch
from conftest import sherry

pytest_plugins = "conversion_fixtures"
pytestmark = pytest.mark.slow


# ---- the directory ----


def test_no_such_directory(tmp_path, fails):
    fails(tmp_path / "none", says=["none does not exist"])


def test_a_file(tmp_path, fails):
    (tmp_path / "file").write_text("x")
    fails(tmp_path / "file", says=["file is not a directory"])


def test_not_a_model(tmp_path, fails):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "notes.txt").write_text("x")
    fails(tmp_path / "m", says=["m is not a model directory: it has no config.json"])


def test_config_is_no_json(model, fails):
    (model / "config.json").write_text('{"architectures": [')
    fails(model, says=["cannot read", "config.json"])


def test_no_architecture(model, fails):
    small_models.edit_config(model, architectures=None)
    fails(model, says=["config.json names no architecture"])


def test_unknown_architecture(model, fails):
    small_models.edit_config(model, architectures=["NoSuchForCausalLM"])
    fails(model, says=["the architecture NoSuchForCausalLM", "--print-supported-models"])


def test_no_tokenizer(model, fails):
    (model / "tokenizer.model").unlink()
    fails(model, says=["m has no tokenizer: neither tokenizer.json nor tokenizer.model"])
    (model / "tokenizer.model").mkdir()
    fails(model, says=["tokenizer.model is a directory and not a sentencepiece model"])


@pytest.mark.parametrize("name, content, says", [("tokenizer.json", "", "Expecting value"), ("tokenizer.json", "{", "Expecting property"),
                                                 ("tokenizer_config.json", "[]", "is not a JSON object")])  # fmt: skip
def test_tokenizer_files_that_are_damaged(tmp_path, fails, name, content, says):
    model = small_models.make(tmp_path / "m", "llama-bpe")
    (model / name).write_text(content)
    fails(model, "--tokenizer-pre", "gpt-2", says=[f"m/{name}", says])


@pytest.mark.parametrize("flag", ["--fallback-type", "--token-embedding-type", "--output-tensor-type"])
@pytest.mark.parametrize("name", ["", "Q9"])
def test_types_that_do_not_exist(model, fails, zoo, flag, name):
    says = f"unknown tensor type {name or repr(name)}: choose from F32"
    fails(model, flag, name, says=[says])
    root, _ = zoo
    done = sherry("verify", root / "llama.gguf", model, flag, name)
    assert done.returncode == 1 and says in done.stderr


def test_home_trained_bpe(tmp_path, fails):
    model = small_models.make(tmp_path / "m", "llama-bpe")
    done = fails(model, says=["llama.cpp does not know the BPE tokenizer", "--tokenizer-pre", "gpt-2"])
    assert "convert_hf_to_gguf_update" not in done.stderr
    fails(model, "--tokenizer-pre", "gtp2", says=["--tokenizer-pre gtp2: llama.cpp does not know it, only", "gpt-2"])


# ---- the weights ----


def test_no_weights(model, fails):
    (model / "model.safetensors").unlink()
    fails(model, says=["has no weights: neither model*.safetensors nor pytorch_model*.bin"])


@pytest.mark.parametrize("size", [4, 200, -1000, -1])
def test_truncated_shard(model, fails, size):
    part = model / "model.safetensors"
    os.truncate(part, size if size > 0 else part.stat().st_size + size)
    fails(model, says=[f"model.safetensors ({part.stat().st_size} bytes) is truncated or damaged, download it again"])


def test_truncated_bin(tmp_path, fails):
    model = small_models.make(tmp_path / "m", "llama", safe=False)
    os.truncate(model / "pytorch_model.bin", 10000)
    fails(model, says=["pytorch_model.bin (10000 bytes) is truncated or damaged", "not a PyTorch zip archive"])


@pytest.mark.parametrize("index", [True, False])
def test_missing_shard(tmp_path, fails, index):
    model = small_models.make(tmp_path / "m", "llama", shard="1MB")
    parts = sorted(model.glob("*.safetensors"))
    parts[1].unlink()
    if not index:
        (model / "model.safetensors.index.json").unlink()
    fails(model, says=[f"lacks {parts[1].name}: 1 of {len(parts)} weight files"])


def test_index_names_no_such_tensor(tmp_path, fails):
    model = small_models.make(tmp_path / "m", "llama", shard="1MB")
    path = model / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.9.mlp.up_proj.weight"] = index["weight_map"]["lm_head.weight"]
    path.write_text(json.dumps(index))
    fails(model, says=["Missing tensors", "model.layers.9.mlp.up_proj.weight"])


@pytest.mark.parametrize(
    "name, gguf_name",
    [
        ("model.layers.1.mlp.down_proj.weight", "blk.1.ffn_down.weight"),
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.layers.0.input_layernorm.weight", "blk.0.attn_norm.weight"),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_finite(model, fails, name, gguf_name, value):
    def change(tensors):
        tensors[name].view(-1, tensors[name].shape[-1])[-2:, 77] = value

    small_models.edit_weights(model, change)
    row = {"blk.1.ffn_down.weight": 254, "token_embd.weight": 510, "blk.0.attn_norm.weight": 0}[gguf_name]
    fails(model, says=[f"{gguf_name} ({name}), row {row}: a weight is NaN or infinite"])


def test_scale_beyond_fp16(tmp_path, fails):
    model = small_models.make(tmp_path / "m", "llama")

    def change(tensors):
        tensors["model.layers.0.mlp.up_proj.weight"][3, 128:] = 3e5

    small_models.edit_weights(model, change)
    says = "blk.0.ffn_up.weight (model.layers.0.mlp.up_proj.weight), row 3: "
    fails(model, says=[says, "beyond fp16"])
    fails(model, "--granularity", "per_channel", says=[says, "beyond fp16"])


def test_nothing_to_quantize(tmp_path, fails):
    model = small_models.make(
        tmp_path / "m", "llama", config=dict(hidden_size=160, num_attention_heads=5, num_key_value_heads=1, intermediate_size=352)
    )
    fails(model, says=["no tensor can be TQ1_25 or TQ1_25_64", "rows of 160, not a multiple of 64"])


def test_tensor_in_two_files(tmp_path, fails):
    """Upstream would take the last without a word, so a stray file of another model is reported, with or without index."""
    from safetensors.torch import load_file, save_file

    model = small_models.make(tmp_path / "m", "llama", shard="1MB")
    index, parts = model / "model.safetensors.index.json", sorted(model.glob("*.safetensors"))
    name = next(iter(load_file(parts[0])))
    small_models.edit_weights(model, lambda t: t.update({name: torch.zeros(2, 2)}), parts[2].name)
    fails(model, says=[f"the tensor {name} is in {parts[0].name} and in {parts[2].name}"])
    small_models.edit_weights(model, lambda t: t.pop(name), parts[2].name)
    whole = {k: v for part in parts for k, v in load_file(part).items()}
    index.rename(tmp_path / "index.json")
    for stray in "model.safetensors", "model-old.safetensors":
        save_file(whole, model / stray, metadata={"format": "pt"})
        fails(model, says=["the tensor ", f" and in {stray}: remove the file that does not belong"])
        (model / stray).unlink()
    (model / "pytorch_model.bin").write_bytes(b"not read, as there is safetensors")
    assert sherry("convert", model, "--dry-run").returncode == 0


def test_index_disagrees(tmp_path, fails):
    model = small_models.make(tmp_path / "m", "llama", shard="1MB")
    path = model / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    files = sorted(set(index["weight_map"].values()))
    name = next(k for k, v in index["weight_map"].items() if v == files[0])
    for value, says in [
        (files[1], [f"index.json has {name} in {files[1]}, but it is in {files[0]}"]),
        (["a"], ["index.json has no weight_map of tensors to files"]),
        (5, ["index.json has no weight_map of tensors to files"]),
    ]:
        path.write_text(json.dumps({"weight_map": index["weight_map"] | {name: value}}))
        fails(model, says=says)


def test_bin_that_holds_no_tensors(tmp_path, fails):
    model = small_models.make(tmp_path / "m", "llama", safe=False)
    path = model / "pytorch_model.bin"
    tensors = torch.load(path)
    torch.save([1, 2], path)
    fails(model, says=["pytorch_model.bin holds a list, not tensors by name"])
    torch.save(tensors | {"x": 3}, path)
    fails(model, says=["pytorch_model.bin holds more than tensors by name: 'x' is of type int"])
    torch.save(tensors | {"x": pathlib.Path("y")}, path)
    fails(model, says=["pytorch_model.bin is damaged, or could only be read by running code in it: Unpick"])
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    fails(model, says=["not a PyTorch zip archive (if it was saved before PyTorch 1.6, load it and save it again)"])


def test_missing_tensors(model, fails, tmp_path):
    lost = "model.layers.1.mlp.up_proj.weight"
    small_models.edit_weights(model, lambda tensors: tensors.pop(lost))
    fails(model, says=["blk.1.ffn_up.weight missing, which the other blocks have"])
    fails(model, "--dry-run", says=["blk.1.ffn_up.weight missing"])
    small_models.edit_weights(model, lambda tensors: tensors.update({lost: torch.zeros(0, 256)}))
    fails(model, says=[f"blk.1.ffn_up.weight ({lost}) has the shape (0, 256): it holds no weights"])
    small_models.edit_weights(model, lambda tensors: tensors.update({lost: torch.zeros(384, 0)}))
    fails(model, says=[f"blk.1.ffn_up.weight ({lost}) has the shape (384, 0): it holds no weights"])


def test_missing_blocks(tmp_path, fails):
    model = small_models.make(tmp_path / "m", "llama", config=dict(num_hidden_layers=3))
    small_models.edit_config(model, num_hidden_layers=4)
    fails(model, says=["its configuration has 4 blocks, its weights have 3"])
    small_models.edit_config(model, num_hidden_layers=3)

    def lose(tensors):
        for name in [n for n in tensors if n.startswith("model.layers.1.")]:
            del tensors[name]

    small_models.edit_weights(model, lose)
    fails(model, says=["blk.1.attn_q.weight, ", " missing, which the other blocks have"])


# ---- what the checkpoint says of itself ----


DOWN = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    "config, says",
    [
        (dict(group_size=32), ["sherry_config has group_size 32", "pass --group-size 64 to quantize these weights again"]),
        (dict(group_size=96), ["sherry_config has group_size 96", "a TQ1_25_64 block 64, so groups must be a multiple of 64"]),
        (dict(group_size=0), ["sherry_config has group_size 0"]),
        (dict(group_sizes=[64]), ["sherry_config has group_sizes [64], not an object"]),
        (dict(group_sizes={DOWN: 32}), [f"sherry_config has group_sizes with 32 for {DOWN}. A TQ1_25 block", "a multiple of 64"]),
        (dict(group_sizes={DOWN: "64"}), [f"group_sizes with '64' for {DOWN}, not an integer: correct it"]),
        (dict(group_sizes={DOWN: True}), [f"group_sizes with True for {DOWN}, not an integer"]),
        (
            dict(group_sizes={DOWN: 256}),
            ["1 of 14 matrices have rows of 384, not a multiple of the group size, 256: blk.0.ffn_down.weight"],
        ),
        (
            dict(group_sizes={"model.layers.7.mlp.down_proj": 64}),
            ["config.json: sherry_config has group_sizes for model.layers.7.mlp.down_proj, and the checkpoint has no such matrix"],
        ),
        (dict(group_sizes={"model.norm": 64}), ["group_sizes for model.norm, and the checkpoint has no such matrix"]),
        (dict(group_sizes={"": 64}), ["group_sizes for '', and the checkpoint has no such matrix"]),
        (dict(group_size="128"), ["sherry_config has group_size '128', not an integer"]),
        (dict(group_size=64.0), ["sherry_config has group_size 64.0, not an integer"]),
        (dict(kept="model.norm"), ["sherry_config has kept 'model.norm', not a list of tensor names"]),
        (dict(kept=[1]), ["sherry_config has kept [1]"]),
        (
            dict(group_size=256),
            [
                "2 of 14 matrices have rows of 384, not a multiple of the group size, 256: blk.*.ffn_down.weight (2 blocks)",
                "--keep ffn_down",
                "--group-size 128",
            ],
        ),
        (dict(n=2, m=4), ["the sparsity 2:4; TQ1_25 stores 3:4"]),
        (dict(method="tequila"), ["method 'tequila'; TQ1_25 stores sparse_absmean"]),
        (dict(granularity="per_token"), ["granularity 'per_token', not per_group, per_channel or per_tensor"]),
        (dict(weights="packed"), ["weights 'packed', neither latent nor fake_quantized"]),
    ],
)
def test_sherry_config(model, fails, config, says):
    small_models.edit_config(model, sherry_config=config)
    fails(model, says=says)


def test_config_of_another_kind(model, fails):
    small_models.edit_config(model, text_config=[1])
    fails(model, says=["config.json"])
    small_models.edit_config(model, text_config={"sherry_config": {"group_size": 32}})
    fails(model, says=["sherry_config has group_size 32"])
    small_models.edit_config(model, text_config=None, sherry_config=dict(n="3", m="4"))
    fails(model, says=["the sparsity '3':'4'; TQ1_25 stores 3:4"])
    small_models.edit_config(model, sherry_config=None, architectures="LlamaForCausalLM")
    fails(model, says=["\"architectures\" is 'LlamaForCausalLM', not a list of names"])


def test_several_files(good, tmp_path):
    """Upstream's classes that write more than one file are not supported, and say so."""
    patch = """
from sherry_gguf.convert.upstream import upstream
upstream()
from conversion import llama
llama.LlamaModel.write = lambda self: None
"""
    done = sherry("convert", good, "--outfile", tmp_path / "x.gguf", patch=patch)
    assert "llama.cpp stores this architecture in several files; that is not supported here" in done.stderr
    assert not list(tmp_path.iterdir())


def test_group_size_can_be_overruled(model, tmp_path):
    small_models.edit_config(model, sherry_config=dict(group_size=32))
    done = sherry("convert", model, "--outfile", tmp_path / "x.gguf", "--group-size", "128")
    assert done.returncode == 0, done.stderr
    done = sherry("convert", model, "--outfile", tmp_path / "x.gguf", "--group-size", "100")
    assert done.returncode == 1 and "--group-size is given: group_size 100" in done.stderr


def test_per_tensor_of_a_split_tensor(tmp_path, fails):
    """A scale over one tensor of the checkpoint that becomes two of the file is lost, and the command says so."""
    model = small_models.make(tmp_path / "m", "deepseek2", latent=True)
    fails(
        model,
        "--granularity",
        "per_tensor",
        "--tokenizer-pre",
        "gpt-2",
        says=[
            "only parts of the checkpoint's tensors",
            "blk.*.attn_v_b.weight (2 blocks)",
            "--keep attn_v_b",
            "--granularity per_channel",
        ],
    )


# ---- flags ----


def test_flags(model, fails, tmp_path):
    fails(model, "--token-embedding-type", "Q9", says=["unknown tensor type Q9: choose from F32, F16"])
    fails(model, "--keep", "(", says=["--keep (: not a regular expression"])
    fails(model, "--metadata", tmp_path / "none.json", says=["cannot read", "none.json: "])
    fails(model, "--mtp", says=["--mtp and --no-nextn are not for LlamaForCausalLM"])
    fails(model, "--mtp", "--no-nextn", code=2, says=["argument --no-nextn/--no-mtp: not allowed with argument --mtp"])
    fails(model, "--split-max-size", "1T", code=2, says=["not a number"])
    fails(model, "--split-max-tensors", "-1", code=2, says=["not a number"])
    for text, says in ('{"general.author": 5}', "general.author cannot be 5: "), ("[1]", "does not hold a JSON object"):
        (tmp_path / "meta.json").write_text(text)
        fails(model, "--metadata", tmp_path / "meta.json", says=[says])


# ---- tokens and embeddings ----


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
@pytest.mark.parametrize("rows", [small_models.VOCAB + 64, small_models.VOCAB - 64])
def test_embeddings_of_other_tokens(model, fails, rows, name):
    """llama.cpp refuses such a file, and so does the converter."""

    def change(tensors):
        tensors[name] = tensors[name].repeat(2, 1)[:rows].clone()

    small_models.edit_weights(model, change)
    fails(model, says=[f"{name} has {rows} rows", f"has {small_models.VOCAB} tokens", f"set vocab_size to {rows}"])


def test_embeddings_beyond_the_tokenizer_are_padded(model, tmp_path):
    """Where config.json says so as well, as many models do."""

    def change(tensors):
        for name in "model.embed_tokens.weight", "lm_head.weight":
            tensors[name] = tensors[name].repeat(2, 1)[: small_models.VOCAB + 64].clone()

    small_models.edit_weights(model, change)
    small_models.edit_config(model, vocab_size=small_models.VOCAB + 64)
    assert sherry("convert", model, "--outfile", tmp_path / "x.gguf").returncode == 0
    assert conftest.greedy(tmp_path / "x.gguf", "--no-jinja", "--chat-template", "chatml", prompt="a", count=4)


def test_a_token_beyond_the_vocabulary(tmp_path, fails):
    model = small_models.make(tmp_path / "m", "llama-bpe")
    path = model / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    beyond = dict(id=small_models.VOCAB, content="<|pad|>", single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    tokenizer["added_tokens"].append(beyond)
    path.write_text(json.dumps(tokenizer))
    fails(
        model,
        "--tokenizer-pre",
        "gpt-2",
        says=["1 token beyond", "'<|pad|>' with id 512", "vocab_size 512", "resize_token_embeddings(513)"],
    )


def test_qwen3_next_without_its_multi_token_prediction(tmp_path, fails):
    """As transformers saves it."""
    import transformers

    config = transformers.Qwen3NextConfig(
        vocab_size=small_models.VOCAB, hidden_size=128, intermediate_size=128, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=64, linear_num_key_heads=1, linear_num_value_heads=2,
        linear_key_head_dim=128, linear_value_head_dim=128, num_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=128, shared_expert_intermediate_size=128, max_position_embeddings=128)  # fmt: skip
    model = tmp_path / "m"
    torch.manual_seed(0)
    transformers.Qwen3NextForCausalLM(config).to(torch.bfloat16).save_pretrained(model)
    small_models.save_tokenizer(model, "bpe")
    fails(model, "--tokenizer-pre", "gpt-2", says=["AssertionError at qwen.py, line ", "(assert ", "pass --no-nextn"])
    done = sherry("convert", model, "--outfile", tmp_path / "x.gguf", "--tokenizer-pre", "gpt-2", "--no-nextn")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "error, says",
    [
        ("AssertionError()", "AssertionError at <string>, line"),
        ("KeyError()", "KeyError at <string>, line"),
        ("RuntimeError('')", "RuntimeError at <string>, line"),
        ("AssertionError('the shape')", "AssertionError the shape at <string>, line"),
    ],
)
def test_no_error_without_text(model, fails, error, says):
    """What an upstream class raises without a word: the line, and the tensor that it was at."""
    patch = f"""
from sherry_gguf.convert.upstream import upstream
upstream()
from conversion.llama import LlamaModel
def modify_tensors(self, data_torch, name, bid):
    raise {error}
LlamaModel.modify_tensors = modify_tensors
"""
    done = fails(model, patch=patch, says=["llama.cpp's conversion, LlamaModel, failed: " + says, ", tensor lm_head.weight"])
    assert done.stderr.strip().count("\n") == 0


def test_no_traceback_where_upstream_fails_late(model, fails):
    """When the values are asked for."""
    patch = """
from sherry_gguf.convert.upstream import upstream
upstream()
from conversion.llama import LlamaModel
def late(x):
    if x.device.type != "meta":
        raise IndexError("out of range")
    return x
modify = LlamaModel.modify_tensors
def modify_tensors(self, data, name, bid):
    for new_name, x in modify(self, data, name, bid):
        yield new_name, type(x)._wrap_fn(late)(x) if NAME in new_name else x
LlamaModel.modify_tensors = modify_tensors
"""
    for name in "blk.1.ffn_up", "token_embd":
        fails(
            model,
            patch=patch.replace("NAME", repr(name)),
            says=[f"{name}.weight (model.", "llama.cpp's conversion failed: IndexError: out of range"],
        )
