"""llama.cpp's own tools and tests on TQ1_25, and the demo model from training to logits."""

import json
import re
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import gguf
import numpy as np
import pytest
import small_models
from built_tools import run, run_for
from conftest import ENV, Logits, backend_ops, check_same_sums, divergence, greedy, sherry, upstream_f32

from sherry_gguf import cli, gguf_type, kernels, llama_cpp, stq1_0, tq1_25

pytestmark = pytest.mark.slow

gguf_type.register()
HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """One small exact model: (checkpoint, its TQ1_25 GGUF)."""
    root = tmp_path_factory.mktemp("llama")
    small_models.make(root / "hf", "llama")
    result = sherry("convert", root / "hf", "--outfile", root / "model.gguf")
    assert result.returncode == 0, result.stderr
    return root / "hf", root / "model.gguf"


# ---- upstream's own tests ----


def test_quantize_fns():
    code, text = run("test-quantize-fns", "-v")
    assert code == 0, text
    assert all(len(re.findall(rf"\b{kind.lower()} .*ok", text)) == 3 for kind in gguf_type.TYPES), text


@pytest.mark.parametrize("isa", kernels.available())  # it shows that they run; tests/llama_cpp/test_ops.py, that they are right
def test_backend_ops(isa):
    backend_ops([llama_cpp.tool("test-backend-ops")], env=ENV | {"SHERRY_ISA": isa})


# ---- the type by name ----


def test_quantize_names_the_type():
    text = run("llama-quantize", "--help")[1]
    assert all(re.search(rf"{kind.file_type} +or +{name} ", text) for name, kind in gguf_type.TYPES.items()), text


def test_bench_names_the_type(llama):
    code, text = run("llama-bench", "-m", llama[1], "-p", 8, "-n", 4, "-r", 1, "-t", 2, "-o", "json")
    rows = json.loads(text[text.index("[") : text.rindex("]") + 1])
    assert code == 0 and "TQ1_25" in rows[0]["model_type"] and all(row["avg_ts"] > 0 for row in rows)


@pytest.mark.parametrize("name", small_models.MODELS)
def test_every_model_of_the_zoo_runs_in_llama_cli(zoo, name):
    """It answers; the test below shows that the answer is right."""
    root, _ = zoo
    code, text = run("llama-cli", "-m", root / f"{name}.gguf", "-p", "def read", "-n", 8, "--temp", 0, "-st", "-t", 2,
                     "-c", 128, "--simple-io", "--log-verbosity", 1)  # fmt: skip
    assert code == 0 and "Error" not in text, text
    generated = re.search(r"> def read\n(.+)\[ Prompt: .* Generation: ([0-9.]+) t/s", text, re.S)
    assert generated and float(generated[2]) > 0, text


def perplexity(model, text):
    return float(run_for(r"Final estimate: PPL = ([0-9.]+)", "llama-perplexity", "-m", model, "-f", text, "-c", 128,
                         "--chunks", 4, "-t", 2)[1][1])  # fmt: skip


@pytest.mark.parametrize("name", small_models.MODELS)
def test_every_model_of_the_zoo_computes_what_upstreams_f32_file_does(zoo, name, tmp_path):
    root, _ = zoo
    (tmp_path / "text.txt").write_text(small_models.corpus()[:4000])
    theirs = perplexity(root / f"{name}.f32.gguf", tmp_path / "text.txt")
    ours = perplexity(root / f"{name}.gguf", tmp_path / "text.txt")
    print(f"{name}: {theirs:.2f} {ours:.2f}")
    assert ours == pytest.approx(theirs, rel=2e-3)


# ---- llama-quantize ----


def tensors(path):
    return {t.name: t for t in gguf.GGUFReader(path).tensors}


def test_quantize_gives_what_the_reference_gives(tmp_path):
    small_models.make(tmp_path / "hf", "llama", latent=True)
    assert sherry("convert", tmp_path / "hf", "--outfile", tmp_path / "ours.gguf").returncode == 0
    upstream_f32(tmp_path / "hf", tmp_path / "f32.gguf")
    code, text = run("llama-quantize", tmp_path / "f32.gguf", tmp_path / "q.gguf", "TQ1_25", 2)
    assert code == 0, text
    ours, theirs = tensors(tmp_path / "ours.gguf"), tensors(tmp_path / "q.gguf")
    ternary = [name for name, t in ours.items() if t.tensor_type == tq1_25.TYPE_ID]
    assert len(ternary) == 14
    for name in ternary:
        assert theirs[name].tensor_type == tq1_25.TYPE_ID
        assert (theirs[name].data == ours[name].data).all(), name


def test_quantize_merges_the_files_of_a_split(llama, tmp_path):
    """COPY from the first file gives the same tensors and keys as the unsplit file, and it verifies."""
    result = sherry("convert", llama[0], "--outfile", tmp_path / "s.gguf", "--split-max-size", "200K")
    assert result.returncode == 0, result.stderr
    code, text = run("llama-quantize", tmp_path / "s-00001-of-00003.gguf", tmp_path / "merged.gguf", "COPY")
    assert code == 0, text
    merged, whole = (tensors(path) for path in (tmp_path / "merged.gguf", llama[1]))
    assert merged.keys() == whole.keys() and len(merged) == 21
    assert all(merged[name].data.tobytes() == whole[name].data.tobytes() for name in whole)
    result = sherry("verify", tmp_path / "merged.gguf", llama[0])
    assert result.returncode == 0 and "14 TQ1_25 tensors bit for bit" in result.stdout, result.stdout + result.stderr


def types_of(path):
    return {name: t.tensor_type.name for name, t in tensors(path).items()}


@pytest.mark.parametrize("flags, changed", [
    ([], {"token_embd.weight": "Q4_K", "output.weight": "Q6_K"}),
    (["--token-embedding-type", "tq1_25", "--output-tensor-type", "TQ1_25"], {"token_embd.weight": "TQ1_25", "output.weight": "TQ1_25"}),
    (["--pure"], {"token_embd.weight": "TQ1_25", "output.weight": "TQ1_25"}),
    (["--tensor-type", "attn_v=q8_0"], {"token_embd.weight": "Q4_K", "output.weight": "Q6_K", "blk.0.attn_v.weight": "Q8_0"}),
])  # fmt: skip
def test_quantize_flags_and_odd_rows(tmp_path_factory, tmp_path, flags, changed):
    """Rows of 352, not a multiple of the block, become Q4_0, as for upstream's ternary types."""
    root = Path(tmp_path_factory.getbasetemp()) / "odd-rows"
    if not root.exists():
        small_models.make(root / "hf", "llama", latent=True, config={"intermediate_size": 352})
        upstream_f32(root / "hf", root / "f32.gguf")
    code, text = run("llama-quantize", *flags, root / "f32.gguf", tmp_path / "q.gguf", "TQ1_25", 2)
    assert code == 0, text
    found = types_of(tmp_path / "q.gguf")
    assert found["blk.1.ffn_down.weight"] == "Q4_0" and "not divisible by 128" in text
    for name, wanted in (
        {"blk.0.ffn_up.weight": "TQ1_25", "blk.0.attn_v.weight": "TQ1_25", "blk.0.attn_norm.weight": "F32"} | changed
    ).items():
        assert found[name] == wanted, (name, found[name])
    assert perplexity(tmp_path / "q.gguf", HERE / "test_llama_tools.py") > 0


def test_quantize_weighs_by_an_importance_matrix(demo, tmp_path):
    _, f32, _ = demo
    (tmp_path / "text.txt").write_text(small_models.corpus()[:20000])
    code, text = run("llama-imatrix", "-m", f32, "-f", tmp_path / "text.txt", "-o", tmp_path / "im.gguf", "-c", 128, "-t", 2)
    assert code == 0, text
    # noise, or the demo's exact matrices would come out the same with and without
    name = "blk.0.ffn_up.weight"
    noisy = shutil.copy(f32, tmp_path / "noisy.gguf")
    reader = gguf.GGUFReader(noisy, "r+")
    tensor = next(t for t in reader.tensors if t.name == name)
    tensor.data[:] += 0.3 * np.abs(tensor.data).max() * small_models.random_rows(*tensor.data.shape)
    weights = tensor.data.copy()
    reader.data.flush()
    code, text = run("llama-quantize", "--pure", "--imatrix", tmp_path / "im.gguf", noisy, tmp_path / "q.gguf", "TQ1_25", 2)
    assert code == 0, text
    im = tensors(tmp_path / "im.gguf")
    importance = (im[f"{name}.in_sum2"].data / im[f"{name}.counts"].data).astype(np.float32).reshape(-1)
    packed = tensors(tmp_path / "q.gguf")[name].data
    assert (packed == kernels.quantize(weights, importance)).all()
    assert (packed != kernels.quantize(weights)).any()


@pytest.mark.parametrize("kind", ["TQ1_25", "STQ1_0"])
def test_quantize_mixes_types_where_there_is_an_importance_matrix(demo, tmp_path, kind):
    """For models quantized after training, the first layer's ffn_down and attn_v get more bits; not with --pure or for trained models."""
    _, f32, _ = demo
    (tmp_path / "text.txt").write_text(small_models.corpus()[:20000])
    code, text = run("llama-imatrix", "-m", f32, "-f", tmp_path / "text.txt", "-o", tmp_path / "im.gguf", "-c", 128, "-t", 2)
    assert code == 0, text
    found = {}
    for label, flags in {
        "mixed": ["--imatrix", tmp_path / "im.gguf"],
        "pure": ["--pure", "--imatrix", tmp_path / "im.gguf"],
        "plain": [],
    }.items():
        code, text = run("llama-quantize", *flags, f32, tmp_path / "q.gguf", kind, 2)
        assert code == 0, text
        found[label] = {
            name: qtype
            for name, qtype in types_of(tmp_path / "q.gguf").items()
            if re.match(r"blk\.\d+\.(attn|ffn)_\w+\.", name) and "norm" not in name
        }
    assert len(found["mixed"]) == 28
    assert set(found["pure"].values()) == set(found["plain"].values()) == {kind}
    for name, qtype in found["mixed"].items():
        assert qtype == ("Q2_K" if "attn_v" in name or name == "blk.0.ffn_down.weight" else kind), name


@pytest.mark.parametrize("value, message", [
    (np.nan, "tensor 'blk.1.attn_q.weight' has invalid data"),
    (1e8, "tq1_25: the scale of block 6 is nan.*quantized data validation failed"),
])  # fmt: skip
def test_quantize_refuses_what_no_block_can_hold(demo, tmp_path, value, message):
    broken = shutil.copy(demo[1], tmp_path / "broken.gguf")
    reader = gguf.GGUFReader(broken, "r+")
    next(t for t in reader.tensors if t.name == "blk.1.attn_q.weight").data[3, 5] = value
    reader.data.flush()
    code, text = run("llama-quantize", broken, tmp_path / "q.gguf", "TQ1_25", 2)
    assert code == 1 and re.search(message, text, re.S), text


# ---- files that must be refused ----


def set_type(path, tensor, type_id, was=tq1_25.TYPE_ID, table=None):
    """Change a tensor's type id in a GGUF. It precedes the offset, in the last 12 bytes of the table entry. If the reader refuses this
    file, `table` is one with the same tensors that it accepts."""
    field = next(t for t in gguf.GGUFReader(table or path).tensors if t.name == tensor).field
    end = field.offset + sum(part.nbytes for part in field.parts)
    with open(path, "r+b") as file:
        file.seek(end - 12)
        assert int.from_bytes(file.read(4), "little") == was
        file.seek(end - 12)
        file.write(type_id.to_bytes(4, "little"))


@pytest.mark.parametrize("type_id", [44, 77, 124, 127, 4, 2**31])
def test_an_unused_type_id_is_refused_with_a_message(llama, tmp_path, type_id):
    path = shutil.copy(llama[1], tmp_path / "odd.gguf")
    set_type(path, "blk.1.ffn_up.weight", type_id)
    for tool, *args in [("llama-cli", "-m", path, "-p", "x", "-st"), ("llama-bench", "-v", "-m", path),
                        ("llama-quantize", "--allow-requantize", path, tmp_path / "out.gguf", "Q8_0")]:  # fmt: skip
        code, text = run(tool, *args)
        assert code == 1, (tool, code, text)  # a crash is negative
        assert re.search(
            r"tensor 'blk.1.ffn_up.weight' (has ggml type \d+, which is not in use|has invalid ggml type|of type 4 \(DEPRECATED\))", text
        ), text
    assert not (tmp_path / "out.gguf").exists() or (tmp_path / "out.gguf").stat().st_size == 0


@pytest.mark.parametrize("d", [np.nan, -np.inf, -0.5])
def test_check_tensors_finds_a_bad_scale(llama, tmp_path, d):
    path = shutil.copy(llama[1], tmp_path / "odd.gguf")
    reader = gguf.GGUFReader(path, "r+")
    data = next(t for t in reader.tensors if t.name == "blk.1.ffn_up.weight").data
    data[7, 20:22] = np.frombuffer(np.float16(d).tobytes(), np.uint8)
    reader.data.flush()
    code, text = run("llama-cli", "-m", path, "-p", "x", "-n", 1, "-st", "--check-tensors")
    assert code == 1 and "the scale of block 14 is" in text and "blk.1.ffn_up.weight" in text, text


# ---- STQ1_0 ----


@pytest.fixture(scope="session")
def stq(demo, tmp_path_factory):
    """The demo's weights in STQ1_0, by llama-quantize; not exact, since its groups differ."""
    path = tmp_path_factory.mktemp("stq") / "stq.gguf"
    code, text = run("llama-quantize", demo[1], path, "STQ1_0", 2)
    assert code == 0, text
    return path


def test_quantize_to_stq1_0_gives_what_the_reference_gives(demo, stq):
    f32, found = tensors(demo[1]), tensors(stq)
    ternary = [name for name, t in found.items() if t.tensor_type == stq1_0.TYPE.type_id]
    assert len(ternary) == 28
    for name in ternary:
        assert (found[name].data == stq1_0.TYPE.quantize(f32[name].data)).all(), name


@pytest.mark.parametrize("batch", [1, 40, 150])
def test_stq1_0_with_and_without_repack(stq, logits, batch, demo, tmp_path):
    """Both round activations to Q8_0, but for repacked rows in another order: another 32 share a scale. So the two differ as much as each
    differs from the same weights in F16, which is measured here, and neither is further from those."""
    (tmp_path / "text.txt").write_text((demo[0] / "held_out.txt").read_text()[:3000])
    assert cli.main(["transcode", str(stq), str(tmp_path / "f16.gguf"), "--to", "f16", "--require-exact"]) == 0
    exact, _ = logits(tmp_path / "f16.gguf", tmp_path / "text.txt", batch, 0)
    plain, said = logits(stq, tmp_path / "text.txt", batch, 0)
    assert "CPU_REPACK" not in said
    repacked, said = logits(stq, tmp_path / "text.txt", batch, "default")
    assert re.search(r"CPU_REPACK model buffer size = +[0-9.]+ MiB", said), said
    of_plain, of_repacked, between = divergence(exact, plain), divergence(exact, repacked), divergence(plain, repacked)
    print(f"batches of {batch}: KL divergence from F16 {of_plain:.2e} plain, {of_repacked:.2e} repacked; of each other {between:.2e}")
    assert 0 < of_plain < 1e-3 and of_repacked < 1.5 * of_plain and between < 2 * (of_plain + of_repacked)


def test_a_file_with_the_old_number_is_told_what_to_do(stq, tmp_path):
    """The first files of Sherry's authors have 42 for STQ1_0. After the command that llama-cli names, it runs and says the same."""
    old = shutil.copy(stq, tmp_path / "old.gguf")
    for name, t in tensors(stq).items():
        if t.tensor_type == stq1_0.TYPE.type_id:
            set_type(old, name, stq1_0.OLD_TYPE_ID, stq1_0.TYPE.type_id, table=stq)
    reader = gguf.GGUFReader(stq)
    field = reader.fields["general.file_type"]
    with open(old, "r+b") as file:  # as the first files have it
        file.seek(field.offset + sum(part.nbytes for part in field.parts[:-1]))
        file.write((41).to_bytes(4, "little"))
    code, text = run("llama-cli", "-m", old, "-p", "x", "-n", 1, "-st")
    assert code == 1 and "is STQ1_0, with the number that this type had once: run `sherry-gguf retag IN OUT`" in text, text
    result = sherry("retag", old, tmp_path / "new.gguf")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "new.gguf").read_bytes() == stq.read_bytes()
    assert greedy(tmp_path / "new.gguf") == greedy(stq)


def test_check_tensors_finds_a_bad_scale_of_stq1_0(stq, tmp_path):
    path = shutil.copy(stq, tmp_path / "odd.gguf")
    reader = gguf.GGUFReader(path, "r+")
    next(t for t in reader.tensors if t.name == "blk.1.ffn_up.weight").data[7, 40:42] = np.frombuffer(np.float16(-1).tobytes(), np.uint8)
    reader.data.flush()
    code, text = run("llama-cli", "-m", path, "-p", "x", "-n", 1, "-st", "--check-tensors")
    assert code == 1 and "stq1_0: the scale of block 7 is -1" in text and "blk.1.ffn_up.weight" in text, text


# ---- other ways to run a model ----


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for(process, port):
    for _ in range(300):
        assert process.poll() is None, "the server ended"
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError("the server did not open its port")


def test_server(demo):
    port = free_port()
    server = subprocess.Popen([llama_cpp.tool("llama-server"), "-m", demo[2], "--port", str(port), "-t", "2", "-c", "256"],
                              stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        wait_for(server, port)
        for _ in range(100):
            try:
                body = json.dumps({"prompt": "def read(self):", "n_predict": 16, "temperature": 0}).encode()
                request = urllib.request.Request(f"http://127.0.0.1:{port}/completion", body, {"Content-Type": "application/json"})
                content = json.load(urllib.request.urlopen(request, timeout=60))["content"]
                break
            except urllib.error.HTTPError as error:  # 503 while it loads
                assert error.code == 503
                time.sleep(0.1)
        models = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=60))
    finally:
        server.kill()
        server.wait()
    assert content.strip() == greedy(demo[2]).strip()
    assert models["data"][0]["meta"]["n_params"] > 0


def test_rpc_server_and_no_repack_give_the_same_text(demo):
    port = free_port()
    server = subprocess.Popen([llama_cpp.tool("rpc-server"), "-H", "127.0.0.1", "-p", str(port)],
                              stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        wait_for(server, port)
        remote = greedy(demo[2], "--rpc", f"127.0.0.1:{port}", "-ngl", 99)
    finally:
        server.kill()
        server.wait()
    assert remote == greedy(demo[2], "--no-repack") == greedy(demo[2])


def test_a_draft_model_needs_the_type_of_speculation(llama):
    """Without it the draft is loaded and not used. The draft is the model itself, so its tokens are accepted."""
    args = ["llama-cli", "-m", llama[1], "-md", llama[1], "-p", "def read(self):", "-n", 24, "--temp", 0, "-st", "-t", 2, "-c", 256,
            "--simple-io", "--chat-template", "chatml", "-lv", 4]  # fmt: skip
    text, _ = run_for("no implementations specified for speculative decoding", *args)
    assert "draft acceptance" not in text
    _, match = run_for(r"draft acceptance = \S+ +\( *(\d+) accepted / +(\d+) generated\)", *args, "--spec-type", "draft-simple")
    assert int(match[1]) > 0.5 * int(match[2]) > 4


# ---- repacked and plain weights ----


@pytest.fixture(scope="session")
def logits(tmp_path_factory):
    return Logits(tmp_path_factory.mktemp("logits"), llama_cpp.library("llama").parent)


def check_repack_changes_little(logits, model, text, batch):
    """The integers are equal, and float sums differ only in their order (tests/llama_cpp/test_ops.py, exactly)."""
    plain, said = logits(model, text, batch, 0)
    assert "CPU_REPACK" not in said
    repacked, said = logits(model, text, batch, "default")
    assert re.search(r"CPU_REPACK model buffer size = +[0-9.]+ MiB", said), said
    check_same_sums(plain, repacked, f"batches of {batch}")


@pytest.mark.parametrize("batch", [1, 40, 150])  # by tables, experts by either, by panels
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_logits_with_and_without_repack(zoo, logits, name, batch, tmp_path):
    (tmp_path / "text.txt").write_text(small_models.corpus()[:3000])
    check_repack_changes_little(logits, zoo[0] / f"{name}.gguf", tmp_path / "text.txt", batch)


@pytest.mark.parametrize("batch", [1, 40, 150])
def test_logits_of_the_demo_model_with_and_without_repack(demo, logits, batch, tmp_path):
    (tmp_path / "text.txt").write_text((demo[0] / "held_out.txt").read_text()[:3000])
    check_repack_changes_little(logits, demo[2], tmp_path / "text.txt", batch)


def test_tools_repack_unless_told_not_to(llama):
    common = "llama-completion", "-m", llama[1], "-p", "def", "-n", 2, "-no-cnv", "-v", "--temp", 0
    buffers = r"model buffer size = "
    assert "CPU_REPACK" in run_for(r"CPU_REPACK " + buffers, *common)[0]
    assert "CPU_REPACK" not in run_for(r"CPU\w* " + buffers, *common, "--no-repack")[0]


# ---- the demo model ----


def test_logits_of_the_demo_model(demo, tmp_path):
    """KL divergence between upstream's F32 file and ours, from the same exact checkpoint, on held-out text."""
    hf, f32, ours = demo
    held_out = tmp_path / "held-out.txt"
    held_out.write_text((hf / "held_out.txt").read_text()[:60000])
    common = "-f", held_out, "-c", 256, "-t", 2, "--kl-divergence-base", tmp_path / "kld"
    code, text = run("llama-perplexity", "-m", f32, *common)
    assert code == 0, text
    text, top = run_for(r"Same top p: +([0-9.]+)", "llama-perplexity", "-m", ours, *common, "--kl-divergence")
    mean, top = float(re.search(r"Mean +KLD: +([-0-9.e]+)", text)[1]), float(top[1])
    print(f"mean KL divergence {mean:.2e}, same top token {top:.2f} %")
    assert 0 <= mean < 1e-3 and top >= 99


def test_text_of_the_demo_model_is_python(demo):
    """It continues a class like Python: an indented block with keywords."""
    text = greedy(demo[2], prompt="class Reader:\n    def __init__(self", count=96)
    assert re.search(r"^ {4,}\S", text, re.M), text
    assert len(re.findall(r"\b(self|def|return|if|for|in|None|not|is|class|import|raise|else)\b", text)) >= 5, text
