"""Bad input: each has its own message and leaves nothing behind; checkpoint and older targets stay as they are."""

import contextlib
import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import time

import conftest
import pytest
import small_models
import torch
from conftest import sherry

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return small_models.make(tmp_path_factory.mktemp("good") / "m", "llama")


@pytest.fixture
def model(good, tmp_path):
    return shutil.copytree(good, tmp_path / "m")


@pytest.fixture
def fails(tmp_path):
    """Convert, which must fail with a message that holds all `told`, and leave every file as it was."""
    target = tmp_path / "out.gguf"
    target.write_bytes(b"an older target")

    def check(*args, told, code=1, **kwargs):
        before = small_models.snapshot(tmp_path)
        done = sherry("convert", *args, *([] if "--outfile" in args else ["--outfile", target]), **kwargs)
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        for text in told:
            assert text in done.stderr, done.stderr
        assert small_models.snapshot(tmp_path) == before
        return done

    return check


# ---- the directory ----


def test_no_such_directory(tmp_path, fails):
    fails(tmp_path / "none", told=["none does not exist"])


def test_a_file(tmp_path, fails):
    (tmp_path / "file").write_text("x")
    fails(tmp_path / "file", told=["file is not a directory"])


def test_not_a_model(tmp_path, fails):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "notes.txt").write_text("x")
    fails(tmp_path / "m", told=["m is not a model directory: it has no config.json"])


def test_config_is_no_json(model, fails):
    (model / "config.json").write_text('{"architectures": [')
    fails(model, told=["cannot read", "config.json"])


def test_no_architecture(model, fails):
    small_models.edit_config(model, architectures=None)
    fails(model, told=["config.json names no architecture"])


def test_unknown_architecture(model, fails):
    small_models.edit_config(model, architectures=["NoSuchForCausalLM"])
    fails(model, told=["the architecture NoSuchForCausalLM", "--print-supported-models"])


def test_no_tokenizer(model, fails):
    (model / "tokenizer.model").unlink()
    fails(model, told=["m has no tokenizer: neither tokenizer.json nor tokenizer.model"])
    (model / "tokenizer.model").mkdir()
    fails(model, told=["tokenizer.model is a directory and not a sentencepiece model"])


@pytest.mark.parametrize("name, content, told", [("tokenizer.json", "", "Expecting value"), ("tokenizer.json", "{", "Expecting property"),
                                                 ("tokenizer_config.json", "[]", "is not a JSON object")])  # fmt: skip
def test_tokenizer_files_that_are_damaged(tmp_path, fails, name, content, told):
    model = small_models.make(tmp_path / "m", "llama-bpe")
    (model / name).write_text(content)
    fails(model, "--tokenizer-pre", "gpt-2", told=[f"m/{name}", told])


@pytest.mark.parametrize("flag", ["--fallback-type", "--token-embedding-type", "--output-tensor-type"])
@pytest.mark.parametrize("name", ["", "Q9"])
def test_types_that_do_not_exist(model, fails, zoo, flag, name):
    told = f"unknown tensor type {name or repr(name)}: choose from F32"
    fails(model, flag, name, told=[told])
    root, _ = zoo
    done = sherry("verify", root / "llama.gguf", model, flag, name)
    assert done.returncode == 1 and told in done.stderr


def test_home_trained_bpe(tmp_path, fails):
    model = small_models.make(tmp_path / "m", "llama-bpe")
    done = fails(model, told=["llama.cpp does not know the BPE tokenizer", "--tokenizer-pre", "gpt-2"])
    assert "convert_hf_to_gguf_update" not in done.stderr
    fails(model, "--tokenizer-pre", "gtp2", told=["--tokenizer-pre gtp2: llama.cpp does not know it, only", "gpt-2"])


# ---- the weights ----


def test_no_weights(model, fails):
    (model / "model.safetensors").unlink()
    fails(model, told=["has no weights: neither model*.safetensors nor pytorch_model*.bin"])


@pytest.mark.parametrize("size", [4, 200, -1000, -1])
def test_truncated_shard(model, fails, size):
    part = model / "model.safetensors"
    os.truncate(part, size if size > 0 else part.stat().st_size + size)
    fails(model, told=[f"model.safetensors ({part.stat().st_size} bytes) is truncated or damaged, download it again"])


def test_truncated_bin(tmp_path, fails):
    model = small_models.make(tmp_path / "m", "llama", safe=False)
    os.truncate(model / "pytorch_model.bin", 10000)
    fails(model, told=["pytorch_model.bin (10000 bytes) is truncated or damaged", "not a PyTorch zip archive"])


@pytest.mark.parametrize("index", [True, False])
def test_missing_shard(tmp_path, fails, index):
    model = small_models.make(tmp_path / "m", "llama", shard="1MB")
    parts = sorted(model.glob("*.safetensors"))
    parts[1].unlink()
    if not index:
        (model / "model.safetensors.index.json").unlink()
    fails(model, told=[f"lacks {parts[1].name}: 1 of {len(parts)} weight files"])


def test_index_names_no_such_tensor(tmp_path, fails):
    model = small_models.make(tmp_path / "m", "llama", shard="1MB")
    path = model / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.9.mlp.up_proj.weight"] = index["weight_map"]["lm_head.weight"]
    path.write_text(json.dumps(index))
    fails(model, told=["Missing tensors", "model.layers.9.mlp.up_proj.weight"])


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
    fails(model, told=[f"{gguf_name} ({name}), row {row}: a weight is NaN or infinite"])


def test_scale_beyond_fp16(tmp_path, fails):
    model = small_models.make(tmp_path / "m", "llama")

    def change(tensors):
        tensors["model.layers.0.mlp.up_proj.weight"][3, 128:] = 3e5

    small_models.edit_weights(model, change)
    told = "blk.0.ffn_up.weight (model.layers.0.mlp.up_proj.weight), row 3: "
    fails(model, told=[told, "beyond fp16"])
    fails(model, "--granularity", "per_channel", told=[told, "beyond fp16"])


def test_nothing_to_quantize(tmp_path, fails):
    model = small_models.make(tmp_path / "m", "llama", config=dict(hidden_size=192, intermediate_size=320))
    fails(model, told=["no tensor can be TQ1_25", "rows of 192, not a multiple of 128"])


def test_tensor_in_two_files(tmp_path, fails):
    """Upstream would take the last without a word, so a stray file of another model is told, with or without index."""
    from safetensors.torch import load_file, save_file

    model = small_models.make(tmp_path / "m", "llama", shard="1MB")
    index, parts = model / "model.safetensors.index.json", sorted(model.glob("*.safetensors"))
    name = next(iter(load_file(parts[0])))
    small_models.edit_weights(model, lambda t: t.update({name: torch.zeros(2, 2)}), parts[2].name)
    fails(model, told=[f"the tensor {name} is in {parts[0].name} and in {parts[2].name}"])
    small_models.edit_weights(model, lambda t: t.pop(name), parts[2].name)
    whole = {k: v for part in parts for k, v in load_file(part).items()}
    index.rename(tmp_path / "index.json")
    for stray in "model.safetensors", "model-old.safetensors":
        save_file(whole, model / stray, metadata={"format": "pt"})
        fails(model, told=["the tensor ", f" and in {stray}: remove the file that does not belong"])
        (model / stray).unlink()
    (model / "pytorch_model.bin").write_bytes(b"not read, as there is safetensors")
    assert sherry("convert", model, "--dry-run").returncode == 0


def test_index_disagrees(tmp_path, fails):
    model = small_models.make(tmp_path / "m", "llama", shard="1MB")
    path = model / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    files = sorted(set(index["weight_map"].values()))
    name = next(k for k, v in index["weight_map"].items() if v == files[0])
    for value, told in [
        (files[1], [f"index.json has {name} in {files[1]}, but it is in {files[0]}"]),
        (["a"], ["index.json has no weight_map of tensors to files"]),
        (5, ["index.json has no weight_map of tensors to files"]),
    ]:
        path.write_text(json.dumps({"weight_map": index["weight_map"] | {name: value}}))
        fails(model, told=told)


def test_bin_that_holds_no_tensors(tmp_path, fails):
    model = small_models.make(tmp_path / "m", "llama", safe=False)
    path = model / "pytorch_model.bin"
    tensors = torch.load(path)
    torch.save([1, 2], path)
    fails(model, told=["pytorch_model.bin holds a list, not tensors by name"])
    torch.save(tensors | {"x": 3}, path)
    fails(model, told=["pytorch_model.bin holds more than tensors by name: 'x' is of type int"])
    torch.save(tensors | {"x": pathlib.Path("y")}, path)
    fails(model, told=["pytorch_model.bin is damaged, or could only be read by running code in it: Unpick"])
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    fails(model, told=["not a PyTorch zip archive (if it was saved before PyTorch 1.6, load it and save it again)"])


def test_missing_tensors(model, fails, tmp_path):
    lost = "model.layers.1.mlp.up_proj.weight"
    small_models.edit_weights(model, lambda tensors: tensors.pop(lost))
    fails(model, told=["blk.1.ffn_up.weight missing, which the other blocks have"])
    fails(model, "--dry-run", told=["blk.1.ffn_up.weight missing"])
    small_models.edit_weights(model, lambda tensors: tensors.update({lost: torch.zeros(0, 256)}))
    fails(model, told=[f"blk.1.ffn_up.weight ({lost}) has the shape (0, 256): it holds no weights"])
    small_models.edit_weights(model, lambda tensors: tensors.update({lost: torch.zeros(384, 0)}))
    fails(model, told=[f"blk.1.ffn_up.weight ({lost}) has the shape (384, 0): it holds no weights"])


def test_missing_blocks(tmp_path, fails):
    model = small_models.make(tmp_path / "m", "llama", config=dict(num_hidden_layers=3))
    small_models.edit_config(model, num_hidden_layers=4)
    fails(model, told=["its configuration has 4 blocks, its weights have 3"])
    small_models.edit_config(model, num_hidden_layers=3)

    def lose(tensors):
        for name in [n for n in tensors if n.startswith("model.layers.1.")]:
            del tensors[name]

    small_models.edit_weights(model, lose)
    fails(model, told=["blk.1.attn_q.weight, ", " missing, which the other blocks have"])


# ---- what the checkpoint says of itself ----


@pytest.mark.parametrize(
    "config, told",
    [
        (dict(group_size=64), ["sherry_config has group_size 64", "--group-size 128"]),
        (dict(group_size=96), ["sherry_config has group_size 96", "a multiple of 128"]),
        (dict(group_size="128"), ["sherry_config has group_size '128'"]),
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
def test_sherry_config(model, fails, config, told):
    small_models.edit_config(model, sherry_config=config)
    fails(model, told=told)


def test_config_of_another_kind(model, fails):
    small_models.edit_config(model, text_config=[1])
    fails(model, told=["config.json"])
    small_models.edit_config(model, text_config={"sherry_config": {"group_size": 64}})
    fails(model, told=["sherry_config has group_size 64"])
    small_models.edit_config(model, text_config=None, sherry_config=dict(n="3", m="4"))
    fails(model, told=["the sparsity '3':'4'; TQ1_25 stores 3:4"])
    small_models.edit_config(model, sherry_config=None, architectures="LlamaForCausalLM")
    fails(model, told=["\"architectures\" is 'LlamaForCausalLM', not a list of names"])


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
    small_models.edit_config(model, sherry_config=dict(group_size=64))
    done = sherry("convert", model, "--outfile", tmp_path / "x.gguf", "--group-size", "128")
    assert done.returncode == 0, done.stderr
    done = sherry("convert", model, "--outfile", tmp_path / "x.gguf", "--group-size", "100")
    assert done.returncode == 1 and "--group-size is given: group_size 100" in done.stderr


def test_per_tensor_of_a_split_tensor(tmp_path, fails):
    """A scale over one tensor of the checkpoint that becomes two of the file is lost, and told."""
    model = small_models.make(tmp_path / "m", "deepseek2", latent=True)
    fails(
        model,
        "--granularity",
        "per_tensor",
        "--tokenizer-pre",
        "gpt-2",
        told=[
            "only parts of the checkpoint's tensors",
            "blk.*.attn_v_b.weight (2 blocks)",
            "--keep attn_v_b",
            "--granularity per_channel",
        ],
    )


# ---- flags ----


def test_flags(model, fails, tmp_path):
    fails(model, "--token-embedding-type", "Q9", told=["unknown tensor type Q9: choose from F32, F16"])
    fails(model, "--keep", "(", told=["--keep (: not a regular expression"])
    fails(model, "--metadata", tmp_path / "none.json", told=["cannot read", "none.json: "])
    fails(model, "--mtp", told=["--mtp and --no-nextn are not for LlamaForCausalLM"])
    fails(model, "--mtp", "--no-nextn", code=2, told=["argument --no-nextn/--no-mtp: not allowed with argument --mtp"])
    fails(model, "--split-max-size", "1T", code=2, told=["not a number"])
    fails(model, "--split-max-tensors", "-1", code=2, told=["not a number"])
    for text, told in ('{"general.author": 5}', "general.author cannot be 5: "), ("[1]", "does not hold a JSON object"):
        (tmp_path / "meta.json").write_text(text)
        fails(model, "--metadata", tmp_path / "meta.json", told=[told])


# ---- the target ----


def test_no_target_directory(model, fails, tmp_path):
    fails(model, "--outfile", tmp_path / "none" / "x.gguf", told=["cannot write", "none does not exist. Create it first"])
    fails(model, "--outfile", tmp_path / "out.gguf" / "x.gguf", told=["cannot write", "out.gguf is not a directory"])


def test_unwritable_target(model, fails):
    fails(model, "--outfile", "/proc/x.gguf", told=["cannot write /proc/x.gguf", "Choose another place for it"])
    fails(model, "--outfile", "/dev/null", told=["cannot write /dev/null: it exists and is not an ordinary file"])


def test_unusable_target_names(model, fails, tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop2")
    (tmp_path / "loop2").symlink_to(tmp_path / "loop")
    (tmp_path / "away").symlink_to(tmp_path / "none" / "x")
    for name in "loop", "away", "x" * 300:
        fails(model, "--outfile", tmp_path / name, told=["error: cannot write"])


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
def test_every_file_of_a_split_is_checked(model, fails, tmp_path, flags):
    shards = [tmp_path / f"out-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    flags = [*flags, "--split-max-tensors", 8]
    shards[1].mkdir()
    (shards[1] / "precious").write_text("x")
    fails(model, *flags, told=["out-00002-of-00003.gguf: it exists and is not an ordinary file"])
    shutil.rmtree(shards[1])
    os.link(model / "config.json", shards[1])
    fails(model, *flags, told=["out-00002-of-00003.gguf: it is a file of the checkpoint itself"])
    shards[1].unlink()
    for i in 0, 2:
        shards[i].symlink_to(tmp_path / "same")
    fails(model, *flags, told=["two files of the split are symbolic links to the same place"])


@contextlib.contextmanager
def mounted(directory, options):
    """An empty file system of its own; a test that needs one is skipped where that is not allowed."""
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", directory]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    try:
        yield directory
        assert not list(directory.iterdir())
    finally:
        subprocess.run(["umount", directory], check=True)


def test_read_only(model, fails, tmp_path):
    if os.geteuid():
        (tmp_path / "ro").mkdir(mode=0o500)
        fails(model, "--outfile", tmp_path / "ro" / "x.gguf", told=["cannot write", "Permission denied"])
        return
    with mounted(tmp_path / "ro", "ro") as directory:
        fails(model, "--outfile", directory / "x.gguf", told=["cannot write", "Read-only file system"])


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_target_is_input(model, fails, file):
    fails(model, "--outfile", model / file, told=[f"{file}: it is a file of the checkpoint itself"])
    (model.parent / "link.gguf").symlink_to(model / file)
    fails(model, "--outfile", model.parent / "link.gguf", told=[f"{file}: it is a file of the checkpoint itself"])


def test_disk_full_while_writing(model, fails):
    """A file size limit stops the write where a full disk would."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    fails(model, told=["no room for", "it takes 0.7 MB", "Nothing was written"], preexec_fn=limit)


def test_disk_full(model, fails, tmp_path):
    """A file system that really is too small: told before anything is written."""
    with mounted(tmp_path / "small", "size=300k") as directory:
        fails(model, "--outfile", directory / "x.gguf", told=["no room for", "0.3 MB are free"])


# ---- interruptions ----


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """A model that takes seconds to write: 60 million weights."""
    config = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=3)
    return small_models.make(tmp_path_factory.mktemp("slow") / "m", "llama", config=config, latent=True, dtype=torch.float32)


# Each chunk waits a little, so that the signal surely meets a half-written file.
SLOW = """
import sys, time
from sherry_gguf import cli
from sherry_gguf.convert import encode, rows
rows.CHUNK = 1 << 18
load = encode.load_chunk
encode.load_chunk = lambda *args: time.sleep(0.02) or load(*args)
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
@pytest.mark.parametrize("split", [False, True])
def test_interrupted(slow, tmp_path, number, code, split):
    (tmp_path / "out.gguf").write_bytes(b"an older target")
    (tmp_path / "out-00001-of-00006.gguf").write_bytes(b"an older target")
    before, input_before = small_models.snapshot(tmp_path), sorted(p.name for p in slow.iterdir())
    process = conftest.python(SLOW, "convert", slow, "--outfile", tmp_path / "out.gguf", *(["--split-max-tensors", 5] if split else []))
    deadline = time.monotonic() + 100
    while sum(p.stat().st_size for p in tmp_path.glob(".sherry*/*")) < 2_000_000:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code, output
    assert "interrupted: no half-written file is left" in output and "Traceback" not in output
    assert small_models.snapshot(tmp_path) == before and sorted(p.name for p in slow.iterdir()) == input_before


@pytest.mark.parametrize(
    "error, code, told",
    [('OSError(5, "Input/output error")', 1, "Input/output error"), ("KeyboardInterrupt()", 130, "interrupted")],
)
def test_interrupted_commit(good, tmp_path, error, code, told):
    """A split that cannot be put in place as a whole is not put in place at all."""
    patch = f"""
import os
rename, calls = os.rename, []
def failing(a, b):
    calls.append(b)
    if len(calls) == 4:
        raise {error}
    rename(a, b)
os.rename = failing
"""
    for i in (1, 2, 3):
        (tmp_path / f"x-0000{i}-of-00003.gguf").write_bytes(b"older %d" % i)
    before = small_models.snapshot(tmp_path)
    done = sherry("convert", good, "--outfile", tmp_path / "x.gguf", "--split-max-tensors", 8, patch=patch)
    assert done.returncode == code and told in done.stderr, done.stderr
    assert small_models.snapshot(tmp_path) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_at_the_worst_moments(good, tmp_path, number):
    """While the staging directory is made: it goes again. While a split is put in place: all of it comes first."""
    patch = """
import os, signal, tempfile
def raising(function, call):
    calls = []
    def wrapped(*args, **kwargs):
        result = function(*args, **kwargs)
        calls.append(args)
        if len(calls) == call:
            signal.raise_signal(NUMBER)
        return result
    return wrapped
""".replace("NUMBER", str(int(number)))
    shards = [tmp_path / f"x-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for shard in shards:
        shard.write_bytes(b"older")
    before = small_models.snapshot(tmp_path)
    arguments = ["convert", good, "--outfile", tmp_path / "x.gguf", "--split-max-tensors", 8]
    for where, call in ("tempfile.mkdtemp", 1), ("os.rename", 3):
        done = sherry(*arguments, patch=f"{patch}\n{where} = raising({where}, {call})")
        assert done.returncode == 128 + number and "Traceback" not in done.stderr, done.stderr
        if call == 1:
            assert small_models.snapshot(tmp_path) == before
    assert sorted(tmp_path.iterdir()) == shards
    assert all(shard.read_bytes()[:4] == b"GGUF" for shard in shards)


def test_killed(slow, good, tmp_path):
    """What a killed conversion left is removed by the next one; what another one is writing is not."""
    import fcntl

    convert = ["convert", good, "--outfile", tmp_path / "x.gguf"]
    assert sherry(*convert).returncode == 0  # the first one takes long, maybe longer than the slow one
    process = conftest.python(SLOW, "convert", slow, "--outfile", tmp_path / "out.gguf")
    deadline = time.monotonic() + 100
    while not (left := list(tmp_path.glob(".sherry*/out.gguf"))):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.01)
    old = left[0].parent
    assert sherry(*convert).returncode == 0 and old.is_dir()  # it is at work
    process.kill()
    process.communicate()
    others = [tmp_path / f".sherry-gguf-{name}" for name in ("abcdefgh.staging", "a_split_.staging", "notes", "earlier_")]
    for other in others:
        other.mkdir()
    (others[1] / "set-aside.old").mkdir()
    (others[1] / "set-aside.old" / "0.old").write_bytes(b"the only copy of an older file")
    (others[3] / "0.old").write_bytes(b"the same, as earlier versions kept it")
    lock = os.open(others[0], os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert sherry(*convert).returncode == 0
    os.close(lock)
    assert sorted(tmp_path.iterdir()) == sorted([*others, tmp_path / "x.gguf"])


@pytest.mark.parametrize("name", ["m.old", "0.old", "set-aside.old", ".staging"])
def test_names_that_could_be_taken_for_set_aside_files(good, tmp_path, name):
    """A conversion that fails, or is killed, leaves nothing under them; one that succeeds writes them."""
    failing = """
import os
def failing(fd):
    raise OSError(5, "Input/output error")
os.fsync = failing
"""
    command = ["convert", good, "--outfile", tmp_path / name]
    done = sherry(*command, patch=failing)
    assert done.returncode == 1 and "Input/output error" in done.stderr and not list(tmp_path.iterdir()), done.stderr
    killed = failing.replace('raise OSError(5, "Input/output error")', "os.kill(os.getpid(), 9)")
    assert sherry(*command, patch=killed).returncode == -9
    assert [p.name for p in tmp_path.glob(".sherry-gguf-*/*")] == [name]
    assert sherry(*command).returncode == 0
    assert [p.name for p in tmp_path.iterdir()] == [name] and (tmp_path / name).read_bytes()[:4] == b"GGUF"


@pytest.mark.parametrize(
    "where, error, told",
    [
        ("check_checkpoint", "MemoryError()", "error: not enough memory: MemoryError"),
        ("make_plan", 'RuntimeError("can\'t start new thread")', "error: can't start new thread"),
        ("write", 'OSError(24, "Too many open files")', "error: [Errno 24] Too many open files"),
    ],
)
def test_whatever_else(good, tmp_path, where, error, told):
    """One line, and a traceback only where it is asked for."""
    patch = f"""
from sherry_gguf import convert
def failing(*args, **kwargs):
    raise {error}
convert.{where} = failing
"""
    for flags in [], ["--verbose"]:
        done = sherry("convert", good, "--outfile", tmp_path / "x.gguf", *flags, patch=patch)
        assert done.returncode == 1 and ("Traceback" in done.stderr) == bool(flags), done.stderr
        assert flags or done.stderr == told + "\n"
    assert not list(tmp_path.iterdir())


def test_damage_on_the_way_to_the_disk(good, tmp_path):
    """What is read back must be what was written."""
    patch = """
import os
fsync = os.fsync
def damaging(fd):
    os.pwrite(fd, bytes([os.pread(fd, 1, 500_000)[0] ^ 1]), 500_000)
    fsync(fd)
os.fsync = damaging
"""
    done = sherry("convert", good, "--outfile", tmp_path / "x.gguf", patch=patch)
    assert done.returncode == 1 and "read back is not what was written" in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())


def test_not_built(good, fails, tmp_path):
    fails(
        good,
        told=["llama.cpp", "is not there: run scripts/build_llama_cpp.py"],
        env=conftest.ENV | {"SHERRY_BUILD_DIR": str(tmp_path / "none")},
    )


def test_verbose_shows_the_traceback(tmp_path):
    done = sherry("convert", tmp_path / "none", "--verbose")
    assert done.returncode == 1 and "Traceback" in done.stderr and "does not exist" in done.stderr


def test_output_that_cannot_be_shown(good, tmp_path):
    """A terminal's encoding that lacks the path's letters; a full device behind standard output."""
    target = tmp_path / "\u00f6 \u6a21.gguf"
    command = [sys.executable, "-m", "sherry_gguf.cli", "convert", str(good), "--outfile", str(target)]
    env = conftest.ENV | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and r"\xf6 \u6a21.gguf" in done.stdout, done.stderr
    target.unlink()
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, env=conftest.ENV, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and done.stderr == "error: [Errno 28] No space left on device\n", done.stderr
    assert target.stat().st_size > 500_000


def test_runs_without_a_terminal(good, tmp_path):
    """Output into a pipe that is closed early is no failure of the file."""
    process = subprocess.Popen(
        [sys.executable, "-m", "sherry_gguf.cli", "convert", str(good), "--outfile", str(tmp_path / "x.gguf")],
        env=conftest.ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    _, errors = process.communicate()
    assert b"Traceback" not in errors and (tmp_path / "x.gguf").stat().st_size > 500_000


# ---- tokens and embeddings ----


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
@pytest.mark.parametrize("rows", [small_models.VOCAB + 64, small_models.VOCAB - 64])
def test_embeddings_of_other_tokens(model, fails, rows, name):
    """llama.cpp refuses such a file, and so does the converter."""

    def change(tensors):
        tensors[name] = tensors[name].repeat(2, 1)[:rows].clone()

    small_models.edit_weights(model, change)
    fails(model, told=[f"{name} has {rows} rows", f"has {small_models.VOCAB} tokens", f"set vocab_size to {rows}"])


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
        told=["1 token beyond", "'<|pad|>' with id 512", "vocab_size 512", "resize_token_embeddings(513)"],
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
    fails(model, "--tokenizer-pre", "gpt-2", told=["AssertionError at qwen.py, line ", "(assert ", "pass --no-nextn"])
    done = sherry("convert", model, "--outfile", tmp_path / "x.gguf", "--tokenizer-pre", "gpt-2", "--no-nextn")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "error, told",
    [
        ("AssertionError()", "AssertionError at <string>, line"),
        ("KeyError()", "KeyError at <string>, line"),
        ("RuntimeError('')", "RuntimeError at <string>, line"),
        ("AssertionError('the shape')", "AssertionError the shape at <string>, line"),
    ],
)
def test_no_error_without_text(model, fails, error, told):
    """What an upstream class raises without a word: the line, and the tensor that it was at."""
    patch = f"""
from sherry_gguf.convert.upstream import upstream
upstream()
from conversion.llama import LlamaModel
def modify_tensors(self, data_torch, name, bid):
    raise {error}
LlamaModel.modify_tensors = modify_tensors
"""
    done = fails(model, patch=patch, told=["llama.cpp's conversion, LlamaModel, failed: " + told, ", tensor lm_head.weight"])
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
            told=[f"{name}.weight (model.", "llama.cpp's conversion failed: IndexError: out of range"],
        )


# ---- rows that do not fit ----


def test_all_misfits_are_listed_once(tmp_path, fails):
    """With the flags that convert what fits, as a line to copy."""
    model = small_models.make(tmp_path / "m", "llama", config=dict(intermediate_size=640))
    small_models.edit_config(model, sherry_config=dict(group_size=256))
    done = fails(model, told=["2 of 14 matrices have rows of 640, not a multiple of the group size, 256: blk.*.ffn_down.weight (2 blocks)"])
    flags = done.stderr[done.stderr.index("--keep") :].splitlines()[0].split()
    assert sherry("convert", model, "--outfile", tmp_path / "x.gguf", *flags).returncode == 0
    small_models.edit_config(model, sherry_config=dict(group_size=512))
    done = fails(model, "--keep", "attn_q", told=["12 of 12 matrices have rows of 256, 640"])
    assert "--keep attn_q --keep" in done.stderr


def test_fallback_types(tmp_path, fails):
    """Rows that no block of 128 fits: Q4_0, shown with what other types would take."""
    model = small_models.make(tmp_path / "m", "llama", config=dict(hidden_size=192, num_attention_heads=3, num_key_value_heads=1))
    out = tmp_path / "x.gguf"
    sizes = {}
    for flags, kind in (
        ([], "Q4_0"),
        (["--fallback-type", "q8_0"], "Q8_0"),
        (["--fallback-type", "F16"], "F16"),
        (["--fallback-type", "Q6_K"], "F16"),
    ):
        planned = sherry("convert", model, "--outfile", out, "--dry-run", *flags).stdout
        done = sherry("convert", model, "--outfile", out, *flags)
        assert done.returncode == 0, done.stderr
        for text in planned, done.stdout:
            nor = " nor of 256, which Q6_K needs" if "Q6_K" in flags else ""
            assert f" {kind}, rows of 192, not a multiple of 128{nor}: " in text
            line = next(line for line in text.splitlines() if line.startswith("blk.*.attn_q.weight"))
            assert line.split()[1] == kind and line.endswith("fallback")
        assert sherry("verify", out, model, *flags).returncode == 0
        told = done.stdout[done.stdout.index("by --fallback-type: ") :].splitlines()[0]
        sizes[kind] = sum(int(line.split()[4].replace(",", "")) for line in done.stdout.splitlines() if line.endswith("fallback"))
        assert f"{kind} {sizes[kind] / 1e6:.1f} MB" in told
    assert sizes["Q4_0"] * 8.5 == sizes["Q8_0"] * 4.5 and sizes["Q4_0"] * 16 == sizes["F16"] * 4.5
    # what training kept in full precision stays so, if nothing else is asked for
    kept = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(2)]
    small_models.edit_config(model, sherry_config=dict(kept=kept))
    for flags, kind in ([], "F16"), (["--fallback-type", "Q8_0"], "Q8_0"):
        done = sherry("convert", model, "--outfile", out, *flags)
        assert next(line for line in done.stdout.splitlines() if line.startswith("blk.*.ffn_up.weight")).split()[1] == kind
    small_models.edit_config(model, sherry_config=None)
    out.unlink()
    fails(model, "--require-exact", told=["tensors would be stored as Q4_0, with loss", "Pass --fallback-type F16 as well"])
    assert sherry("convert", model, "--outfile", out, "--require-exact", "--fallback-type", "F16").returncode == 0
    fails(model, "--fallback-type", "Q5", told=["unknown tensor type Q5"])
    fails(model, "--fallback-type", "tq1_25", told=["--fallback-type"])


# ---- the Hugging Face cache ----


def test_a_snapshot_of_the_cache_is_named_after_its_repository(good, tmp_path):
    repository = tmp_path / "models--some-org--Tiny-Llama-1M"
    snapshot = repository / "snapshots" / ("0123456789" * 4)
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, path in enumerate(sorted(good.iterdir())):
        shutil.copy(path, repository / "blobs" / str(i))
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    (tmp_path / "link").symlink_to(snapshot)
    for directory in snapshot, tmp_path / "link":
        done = sherry("convert", directory)
        target = snapshot / "Tiny-Llama-1M-TQ1_25.gguf"
        assert done.returncode == 0 and target.is_file(), done.stderr
        assert "general.name                                  Tiny Llama 1M" in sherry("inspect", target).stdout
        target.unlink()
