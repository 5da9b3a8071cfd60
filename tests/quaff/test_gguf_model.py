import json
import subprocess
import sys

import gguf
import numpy as np
import peft
import pytest
import small_models
import tokenizers
import torch
import transformers
from conftest import sherry

from sherry_gguf import gguf_type
from sherry_gguf.convert import tokenizer_check
from sherry_gguf.errors import ConvertError
from sherry_gguf.evaluation.scoring import scorer
from sherry_gguf.gguf_file import read_gguf
from sherry_gguf.packed import PackedLinear, gguf_tokenizer
from sherry_gguf.quaff import calibrate, gguf_config, load_gguf, quantize_for_finetuning

NAMES = ["llama", "llama-tied", "llama-64", "smollm2", "qwen2", "qwen3", "gemma2", "mistral", "phi"]
FILES = ["llama", "smollm2"]  # of which quick tests make their own


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A directory with NAME/ and NAME.gguf for FILES."""
    work = tmp_path_factory.mktemp("gguf")
    for name in FILES:
        convert(work, name)
    return work


def convert(work, name, **options):
    small_models.make(work / name, name, **options)
    pre = ["--tokenizer-pre", "gpt-2"] if small_models.MODELS[name][1] == "bpe" else []
    done = sherry("convert", work / name, "--outfile", work / f"{name}.gguf", *pre)
    assert done.returncode == 0, done.stderr
    return work / f"{name}.gguf"


def checkpoint(directory):
    """The checkpoint's own model, packed."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    if model.config.model_type == "gemma2":  # the file has no place for it: llama.cpp takes the size of a head
        for layer in model.model.layers:
            layer.self_attn.scaling = model.config.head_dim**-0.5
    return quantize_for_finetuning(model, None, "tq1_25", method="naive").eval()


def packed_layers(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, PackedLinear)}


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def some_ids(count=2, seed=0):
    return torch.randint(5, small_models.VOCAB, (count, 40), generator=torch.Generator().manual_seed(seed))


def rewritten(source, target, fields=(), tensors=(), without=()):
    """A copy of a GGUF. fields: key to value, or None for none; tensors: name to (array, type); without: tensors that it lacks."""
    gguf_type.register()
    old, fields, tensors = read_gguf(source), dict(fields), dict(tensors)
    name = fields.pop("general.architecture", old.fields["general.architecture"])
    writer = gguf.GGUFWriter(target, name)
    V = gguf.GGUFValueType
    for key, value in (old.fields | fields).items():
        if key == "general.architecture" or value is None:
            continue
        kind, *of = V.get_type(value), *([V.get_type(value[0])] if isinstance(value, list) else [])
        if type(value) is type(old.fields.get(key)):
            kind, *of = old.types[key]
        writer.add_key_value(key, value, kind, sub_type=of[0] if of else None)
    for stored in old.tensors.values():
        if stored.name not in without:
            as_it_was = stored.read().reshape(*stored.shape[:-1], -1), stored.type
            data, kind = tensors.pop(stored.name, as_it_was)
            writer.add_tensor(stored.name, data, raw_dtype=kind)
    for tensor, (data, kind) in tensors.items():
        writer.add_tensor(tensor, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


# ---- the model ----


@pytest.mark.parametrize("name", NAMES)
def test_it_equals_the_checkpoint(zoo, name):
    root, _ = zoo
    model, tokenizer = load_gguf(root / f"{name}.gguf")
    wanted = checkpoint(root / name)
    layers, theirs = packed_layers(model), packed_layers(wanted)
    assert layers.keys() == theirs.keys() and layers
    for key, layer in layers.items():
        assert torch.equal(layer.qweight, theirs[key].qweight) and layer.kind is theirs[key].kind
    ids = some_ids()
    a, b = logits(model, ids), logits(wanted, ids)
    assert (a - b).abs().max() <= 1e-6 * b.abs().max()
    prompt = tokenizer("def read(self):", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False).shape == (1, 4 + prompt.input_ids.shape[1])
    assert not model.training and not any(p.requires_grad or p.is_meta for p in model.parameters())
    assert model.config.name_or_path == str(root / f"{name}.gguf") and model.config.architectures == [type(model).__name__]
    own = tokenizer_check.load_tokenizer(root / name)
    texts = tokenizer_check.texts(own)
    pairs = zip(texts, *(tokenizer_check.split_all(t, texts) for t in (own, tokenizer)))
    assert not [text for text, one, other in pairs if not tokenizer_check.same(own, text, one, other)]
    assert (tokenizer.bos_token, tokenizer.eos_token) == (own.bos_token, own.eos_token)


@pytest.mark.parametrize("name", ["llama", "smollm2", "qwen2", "gemma2", "phi"])
def test_llama_cpp_computes_the_same(zoo, name):
    path = zoo[0] / f"{name}.gguf"
    model, _ = load_gguf(path)
    ids = some_ids(6)
    ours = logits(model, ids)[:, -1].log_softmax(-1).double()
    with scorer(path, 64, 1) as loaded:
        for prompt, mine in zip(ids.tolist(), ours):
            scores = loaded.score([([*prompt, token], 1) for token in range(loaded.vocabulary)])
            theirs = torch.tensor([logprob for logprob, _ in scores], dtype=torch.float64)
            assert (theirs.exp() * (theirs - mine)).sum() < 1e-4 and theirs.argmax() == mine.argmax()
            assert [token for token, (_, greedy) in enumerate(scores) if greedy] == [theirs.argmax()]


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 3.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    ],
    ids=lambda s: s["rope_type"],
)
def test_scaled_rotations(scaling, tmp_path):
    path = convert(tmp_path, "llama", config={"rope_scaling": scaling})
    model, _ = load_gguf(path)
    wanted, ids = logits(checkpoint(tmp_path / "llama"), some_ids()), some_ids()
    assert (logits(model, ids) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    plain, _ = load_gguf(rewritten(path, tmp_path / "plain.gguf", {"llama.rope.scaling.type": None}, without=["rope_freqs.weight"]))
    assert (logits(plain, ids) - wanted).abs().max() > 1e-3 * wanted.abs().max()


def test_biases_and_other_types(made, tmp_path):
    """Queries of Llama are permuted: in blocks, in Q8_0 and in a bias."""
    convert(tmp_path, "llama", config={"attention_bias": True, "mlp_bias": True})
    wanted = checkpoint(tmp_path / "llama")
    model, _ = load_gguf(tmp_path / "llama.gguf")
    ids = some_ids()
    assert torch.equal(model.model.layers[1].self_attn.q_proj.bias, wanted.model.layers[1].self_attn.q_proj.bias)
    assert (logits(model, ids) - logits(wanted, ids)).abs().max() < 1e-5
    Q, weight = gguf.GGMLQuantizationType, model.model.embed_tokens.weight.numpy()
    query = read_gguf(tmp_path / "llama.gguf").tensors["blk.0.attn_q.weight"]
    query = gguf.quants.dequantize(query.read(), query.type)
    changed = {
        "token_embd.weight": (gguf.quants.quantize(weight, Q.Q8_0), Q.Q8_0),
        "output.weight": (weight, Q.F32),
        "blk.0.attn_q.weight": (gguf.quants.quantize(query, Q.Q8_0), Q.Q8_0),
    }
    other, _ = load_gguf(rewritten(tmp_path / "llama.gguf", tmp_path / "other.gguf", tensors=changed))
    near = other.model.embed_tokens.weight
    assert 0 < (near - model.model.embed_tokens.weight).norm() < 0.01 * near.norm() and torch.equal(
        other.lm_head.weight, torch.from_numpy(weight)
    )
    name = "model.layers.0.self_attn.q_proj"
    assert packed_layers(other).keys() == packed_layers(model).keys() - {name}
    one, two = other.get_submodule(name).weight, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    two = two.get_submodule(name).weight.float()
    assert (one - two).norm() < 0.01 * two.norm()
    quantize_for_finetuning(other, None, "tq1_25", method="naive")  # which leaves what is not packed alone
    assert packed_layers(other).keys() == packed_layers(model).keys() - {name}


def test_stq1_0_and_splits(made, tmp_path):
    path = tmp_path / "stq.gguf"
    done = sherry("transcode", "--to", "stq1_0", made / "llama.gguf", path)
    assert done.returncode == 0, done.stderr
    model, _ = load_gguf(path)
    assert {layer.kind.name for layer in packed_layers(model).values()} == {"STQ1_0", "TQ1_25"}
    gguf_type.register()
    decoded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name)
    wanted = logits(decoded.eval(), some_ids())
    assert (logits(model, some_ids()) - wanted).norm() < 0.02 * wanted.norm()
    done = sherry("convert", made / "llama", "--outfile", tmp_path / "split.gguf", "--split-max-tensors", "8")
    assert done.returncode == 0, done.stderr
    first, *rest = sorted(tmp_path.glob("split-0*.gguf"))
    assert torch.equal(logits(load_gguf(first)[0], some_ids()), logits(load_gguf(made / "llama.gguf")[0], some_ids()))
    rest[0].unlink()
    with pytest.raises(ConvertError, match="no such file"):
        load_gguf(first)


def test_bfloat16(made):
    model, _ = load_gguf(made / "llama.gguf", dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and model.model.rotary_emb.inv_freq.dtype == torch.float32
    wanted = logits(load_gguf(made / "llama.gguf")[0], some_ids())
    assert (logits(model, some_ids()) - wanted).norm() < 0.05 * wanted.norm()
    with pytest.raises(ValueError, match="must be torch.float32 or torch.bfloat16"):
        load_gguf(made / "llama.gguf", dtype=torch.float16)


MEMORY = """
import sys, torch
from sherry_gguf.quaff import load_gguf
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) << 10
load_gguf(sys.argv[1])  # which imports everything
before = peak()
model, _ = load_gguf(sys.argv[2])
print(sum(b.nbytes for b in model.buffers()) + sum(p.nbytes for p in model.parameters()), peak() - before)
"""


def test_peak_memory_is_the_packed_model(made, tmp_path):
    gguf_type.register()
    width, inner, layers, rng = 1024, 4096, 4, np.random.default_rng(0)
    kind, shapes = gguf.GGMLQuantizationType.TQ1_25, {}
    for i in range(layers):
        for what, shape in {"attn_q": (width, width), "attn_k": (width, width), "attn_v": (width, width), "attn_output": (width, width),
                            "ffn_gate": (inner, width), "ffn_up": (inner, width), "ffn_down": (width, inner)}.items():  # fmt: skip
            blocks = rng.integers(0, 256, (shape[0], shape[1] // 128, 22), dtype=np.uint8)
            blocks[..., 20:] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
            shapes[f"blk.{i}.{what}.weight"] = blocks.reshape(shape[0], -1), kind
        for what in "attn_norm", "ffn_norm":
            shapes[f"blk.{i}.{what}.weight"] = np.ones(width, np.float32), None
    for name, rows in (("token_embd.weight", small_models.VOCAB), ("output_norm.weight", 0)):
        shapes[name] = np.ones((rows, width) if rows else width, np.float32), None
    sizes = {"embedding_length": width, "feed_forward_length": inner, "block_count": layers, "attention.head_count": 16}
    sizes |= {"attention.head_count_kv": 16, "attention.key_length": 64, "attention.value_length": 64, "rope.dimension_count": 64}
    old = read_gguf(made / "llama.gguf").tensors
    path = rewritten(made / "llama.gguf", tmp_path / "large.gguf", {f"llama.{key}": value for key, value in sizes.items()}, shapes,
                     without=old.keys() - shapes.keys())  # fmt: skip
    command = [sys.executable, "-c", MEMORY, made / "llama.gguf", path]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    size, peak = map(int, done.stdout.split())
    floats = 4 * layers * (4 * width * width + 3 * width * inner)
    assert size < 0.06 * floats
    assert peak < size + 16e6 < 0.13 * floats, (size, peak, floats)


# ---- fine-tuning ----


def test_the_same_calls_as_for_a_directory(made, tmp_path):
    path = made / "llama.gguf"
    model, _ = load_gguf(path)
    before, ids = logits(model, some_ids()), some_ids()
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    channels = calibrate(model, [batch], threshold=5, budget=0.05)
    assert channels.channels.keys() == packed_layers(model).keys() and any(map(len, channels.channels.values()))
    assert quantize_for_finetuning(model, channels, "tq1_25") is model
    wanted = transformers.AutoModelForCausalLM.from_pretrained(made / "llama", dtype=torch.float32)
    wanted = quantize_for_finetuning(wanted, channels, "tq1_25").eval()
    after = logits(model, ids)
    assert (after - logits(wanted, ids)).abs().max() < 1e-5 and not torch.equal(after, before)
    for name, layer in packed_layers(model).items():
        assert torch.equal(layer.scaling.channels, channels.channels[name])
    model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    model.train()
    model.gradient_checkpointing_enable()
    losses = []
    for _ in range(6):
        losses.append(model(**batch).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1
    assert all(layer.scaling.started for layer in packed_layers(model).values())
    model.save_pretrained(tmp_path)
    assert peft.PeftConfig.from_pretrained(tmp_path).base_model_name_or_path == str(path)
    again = load_gguf(path)[0]
    quantize_for_finetuning(again, channels, "tq1_25")
    again = peft.PeftModel.from_pretrained(again, tmp_path)
    again.base_model.load_state_dict(model.base_model.state_dict())
    assert torch.equal(logits(again.eval(), ids), logits(model.eval(), ids))


def test_other_bases_are_refused(made):
    model, _ = load_gguf(made / "smollm2.gguf")
    for base, method in ("int8", "naive"), ("tq1_25", "full"):
        with pytest.raises(ValueError, match="the model is packed already, use base tq1_25 and quaff or naive"):
            quantize_for_finetuning(model, None, base, method=method)
    with pytest.raises(ValueError, match="method quaff needs channels"):
        quantize_for_finetuning(model, None, "tq1_25")


# ---- the tokenizer ----


@pytest.fixture(scope="module")
def crossing(made):
    """A GGUF whose merges go across the places where text is split, so that every difference shows."""
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    every = tokenizers.trainers.BpeTrainer(
        vocab_size=2000, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False, special_tokens=["<s>"]
    )
    trained.train_from_iterator(2 * tokenizer_check.SAMPLE, every)
    model = json.loads(trained.to_str())["model"]
    fields = {"model": "gpt2", "tokens": list(model["vocab"]), "merges": [" ".join(pair) for pair in model["merges"]], "scores": None}
    fields |= {"token_type": [3] + [1] * (len(model["vocab"]) - 1), "bos_token_id": 0, "eos_token_id": 0}
    return rewritten(made / "llama.gguf", made / "crossing.gguf", {f"tokenizer.ggml.{key}": value for key, value in fields.items()})


@pytest.mark.parametrize("pre", gguf_tokenizer.SPLITS)
def test_text_is_split_as_llama_cpp_splits_it(crossing, pre):
    tokenizer = gguf_tokenizer.from_gguf(crossing, read_gguf(crossing).fields | {"tokenizer.ggml.pre": pre})
    others = [other for other in gguf_tokenizer.SPLITS if gguf_tokenizer.SPLITS[other] != gguf_tokenizer.SPLITS[pre]]
    assert tokenizer_check.matching(crossing, tokenizer, [pre, *others], 2) == [pre]


def test_special_tokens_and_the_chat_template(made, tmp_path):
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    fields = {"tokenizer.chat_template": template, "tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": True}
    fields |= {"tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.padding_token_id": 0}
    model, tokenizer = load_gguf(rewritten(made / "llama.gguf", tmp_path / "chat.gguf", fields))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<user>hi"
    plain = load_gguf(made / "llama.gguf")[1]
    assert tokenizer("hello").input_ids == [*plain("hello").input_ids[1:], 2] and plain("hello").input_ids[0] == 1
    assert tokenizer.pad_token_id == 0 and plain.pad_token is None
    assert model.generation_config.eos_token_id == [2, 7] and model.generation_config.pad_token_id == 0
    assert plain.decode(plain("a  b\n").input_ids, skip_special_tokens=True) == "a  b\n"
    _, given = load_gguf(made / "llama.gguf", tokenizer=made / "smollm2")
    assert given.eos_token == "<|endoftext|>"


# ---- what is refused ----


def test_what_is_refused(made, tmp_path):
    path, bad = made / "llama.gguf", tmp_path / "bad.gguf"
    old = read_gguf(path)
    Q = gguf.GGMLQuantizationType
    norm, query = old.tensors["blk.0.attn_norm.weight"], old.tensors["blk.1.attn_q.weight"].read()
    norm = norm.read().view(np.float32)[0]
    infinite = query.copy()
    infinite[3, 20:22] = 0, 0x7C
    floats = {
        name: (gguf.quants.dequantize(t.read(), t.type).astype(np.float16), Q.F16)
        for name, t in old.tensors.items()
        if t.type.name == "TQ1_25"
    }
    tokens = old.fields["tokenizer.ggml.tokens"]
    for message, changes in {
        "architecture 'mamba'; only llama, qwen2, ": dict(fields={"general.architecture": "mamba"}),
        "llama.expert_count is 4, which changes the model": dict(fields={"llama.expert_count": 4}),
        "llama.attention.head_count_kv is .*; only one number": dict(fields={"llama.attention.head_count_kv": [1, 2]}),
        "lacks the metadata llama.block_count": dict(fields={"llama.block_count": None}),
        "have 3 layers, .*its tensors 2 layers": dict(fields={"llama.block_count": 3}),
        "have 1000000000 layers": dict(fields={"llama.block_count": 10**9}),
        "and 0 heads": dict(fields={"llama.attention.head_count": 0}),
        "of which 20 are rotated": dict(fields={"llama.rope.dimension_count": 20}),
        "rope.scaling.type is yarn": dict(fields={"llama.rope.scaling.type": "yarn"}),
        r"down.weight has the shape \(256, 384\), .* needs \(256, 777\)": dict(fields={"llama.feed_forward_length": 777}),
        "lacks the tensor of model.layers.1.self_attn.q_proj.weight: ": dict(without=["blk.1.attn_q.weight"]),
        "lacks the tensor of model.layers.1.post_.* and 1 more": dict(without=["output_norm.weight", "blk.1.ffn_norm.weight"]),
        "tensor blk.0.attn_q_norm.weight has no place": dict(tensors={"blk.0.attn_q_norm.weight": (norm, None)}),
        "blk.1.attn_q.weight, row 3: the scale of block 0 is inf": dict(tensors={"blk.1.attn_q.weight": (infinite, Q.TQ1_25)}),
        "norm.weight has weights that are not finite": dict(tensors={"blk.0.attn_norm.weight": (norm * np.nan, None)}),
        "has no TQ1_25, .* tensor: .* Give the Hugging Face directory": dict(tensors=floats),
        "rope_freqs.weight has 3 factors": dict(tensors={"rope_freqs.weight": (norm[:3], None)}),
        "a tokenizer of the type 'bert'": dict(fields={"tokenizer.ggml.model": "bert"}),
        "splits text as 'default' does, .*load_gguf": dict(fields={"tokenizer.ggml.model": "gpt2"}),
        "names a token twice": dict(fields={"tokenizer.ggml.tokens": [*tokens[:-1], tokens[0]]}),
        "does not have a type for each": dict(fields={"tokenizer.ggml.token_type": [1]}),
        "eos_token_id is 512, there are 512 tokens": dict(fields={"tokenizer.ggml.eos_token_id": 512}),
        "its tokenizer is damaged": dict(fields={"tokenizer.ggml.scores": [1.0]}),
    }.items():  # fmt: skip
        rewritten(path, bad, **changes)
        with pytest.raises(ConvertError, match=message) as e:
            load_gguf(bad)
        assert str(bad) in str(e.value)
    bad.write_bytes(path.read_bytes()[:-5000])
    for file in bad, tmp_path / "none.gguf", made / "llama" / "config.json":
        with pytest.raises(ConvertError):
            load_gguf(file)
        with pytest.raises(ConvertError):
            gguf_config(file)
