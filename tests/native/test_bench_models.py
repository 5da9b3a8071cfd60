"""scripts/bench/models.py makes models that llama-bench takes, and computes figures right; no test asks how fast anything is."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import common
import gguf
import model_files
import pytest
from bench import models as bench
from conftest import squeezed

from sherry_gguf import gguf_type, llama_cpp, signals

SCRIPTS = Path(__file__).parents[2] / "scripts"
QUICK = ["--vocab", "512", "--threads", "1", "--prompt", "32", "--generate", "8", "--depth", "0"]

MADE = f".v{model_files.FILE_VERSION}.gguf"  # ends a model's name


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def arguments(models, out, *more, model="tiny"):
    files = ["--dir", models, "--json", out / "r.json", "--markdown", out / "r.md"]
    return [str(a) for a in ["--models", model, *QUICK, *files, *more]]


def run(*args):
    return subprocess.run([sys.executable, SCRIPTS / "bench" / "models.py", *args], capture_output=True, text=True)


@pytest.fixture(scope="session")
def measured(models, tmp_path_factory):
    """One round of every default type on the tiny shape: (report, Markdown, what was printed)."""
    out = tmp_path_factory.mktemp("out")
    result = run(*arguments(models, out, "--rounds", "2", "--load-rounds", "1"))
    assert result.returncode == 0, result.stderr
    return json.loads((out / "r.json").read_text()), (out / "r.md").read_text(), result.stdout


@pytest.fixture
def made_up(monkeypatch):
    """Nothing is measured: the list of what was asked for, (label, threads, test); rates count up."""
    calls = []

    def measure(files, label, threads, test, against):
        for file in files:
            kind = file.name.removesuffix(MADE).rpartition("-")[2]
            calls.append((kind + bench.BEFORE * label.endswith(bench.BEFORE), threads, str(test)))
            yield {"avg_ts": float(len(calls)), "build_commit": "abc"}

    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(bench, "memory_bandwidth", lambda threads, rounds: [10.0 * threads] * rounds)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    return calls


# ---- models ----


def test_every_type_runs_and_is_reported(measured, models):
    report, text, printed = measured
    speed = {(e["type"], e["kind"]): e for e in report["speed"]}
    assert set(speed) == {(label, kind) for label in bench.TYPES for kind in ("pp", "tg")}
    for e in speed.values():
        assert len(e["rates"]) == 2 and min(e["rates"]) > 0
        assert (e["model"], e["threads"], e["depth"]) == ("tiny", 1, 0)
        assert e["ours_ratio"] > 0 and (e["of_limit"] > 0 if e["kind"] == "tg" else "of_limit" not in e)
    assert {label: e["ours_ratio"] for (label, _), e in speed.items()}[model_files.OURS] == 1
    assert len(report["bandwidth"]["1"]) == 3 * (2 + 1) and report["llama_cpp"] and report["cpu"]
    assert report["complete"] and "Ended early" not in text
    assert text == printed and "| TQ1_25 plain | 1.375 |" in squeezed(text)
    for type_name, file in report["models"]["tiny"]["types"].items():
        assert file["stored"] == {type_name: 1} and file["kept_rows"] == []
        size = (models / f"tiny-512-Q4_0-{type_name}{MADE}").stat().st_size
        assert 0 < size - file["bytes"] < 10_000  # keys and names


@pytest.mark.skipif(sys.platform != "linux", reason="measured on Linux only")
def test_loading_is_measured(measured):
    load = {e["type"]: e for e in measured[0]["load"]}
    assert list(load) == bench.LOAD_TYPES and "| Q4_0 |" in squeezed(measured[1].partition("Loading ")[2])
    for e in load.values():
        assert len(e["rounds"]) == 1
        assert 0 < e["load_seconds"] and 0 < e["token_seconds"]
        assert 0 < e["load_anon"] < e["load_peak"] and 0 < e["load_file"] < e["load_peak"]
        assert e["load_anon"] < e["token_anon"]


def test_files_are_what_they_say_and_are_made_once(measured, models, tmp_path, made_up):
    gguf_type.register()
    before = {path: path.stat().st_mtime_ns for path in models.iterdir()}
    assert len(before) == len(set(map(model_files.base, bench.TYPES)))
    bench.main(arguments(models, tmp_path, "--load-rounds", "0"))
    assert {path: path.stat().st_mtime_ns for path in models.iterdir()} == before
    reader = gguf.GGUFReader(models / f"tiny-512-Q4_0-TQ1_25{MADE}")
    tensors = {t.name: t for t in reader.tensors}
    assert len(tensors) == 2 + 2 * 9 and reader.fields["llama.block_count"].contents() == 2
    down = tensors["blk.1.ffn_down.weight"]
    assert down.tensor_type.name == "TQ1_25" and down.shape.tolist() == [512, 256] and down.data.any()
    assert tensors["token_embd.weight"].tensor_type.name == "Q4_0"


def test_rows_that_do_not_fit_fall_back_and_the_tables_say_so(models, tmp_path, monkeypatch):
    shape = model_files.Shape("odd", "qwen2", 384, 2, 6, 2, 64, 512, 1e6, qkv_bias=True)
    monkeypatch.setitem(model_files.SHAPES, "odd", shape)
    bench.main(arguments(models, tmp_path, "--types", "tq1_25,tq1_0,iq1_s", "--rounds", "1", model="odd"))
    report, text = json.loads((tmp_path / "r.json").read_text()), squeezed((tmp_path / "r.md").read_text())
    files = report["models"]["odd"]["types"]
    attention, down = 2 * 384 * 384 + 2 * 128 * 384, 512 * 384
    share = (attention + 2 * down) / (attention + 3 * down)
    assert files["TQ1_25"]["stored"] == {"TQ1_25": 1}
    assert files["TQ1_0"]["stored"] == pytest.approx({"Q4_0": share, "TQ1_0": 1 - share})
    assert files["TQ1_0"]["bits_per_weight"] == pytest.approx(4.5 * share + 1.6875 * (1 - share))
    assert files["TQ1_0"]["kept_rows"] == [384] and list(files["IQ1_S"]["stored"]) == ["IQ4_NL", "IQ1_S"]
    assert f"| TQ1_0 [1] | {files['TQ1_0']['bits_per_weight']:.3f} |" in text
    assert f"[1] {100 * share:.0f} % of the block weights are Q4_0: rows of 384 are not a multiple of TQ1_0's block" in text
    assert all(e["rates"] for e in report["speed"])


def test_fallbacks_are_those_of_llama_quantize():
    source = (llama_cpp.source_dir() / "src" / "llama-quant.cpp").read_text()
    source = source[source.index("static ggml_type tensor_type_fallback(") :]
    source = source.replace("SHERRY_TYPES(SHERRY_CASE)", "".join(f"case GGML_TYPE_{name}:\n" for name in gguf_type.TYPES))
    theirs, waiting = {}, []
    for case, other in re.findall(r"case GGML_TYPE_(\w+):(?:[^\n]*return_type = GGML_TYPE_(\w+))?", source.partition("\n}")[0]):
        waiting.append(case)
        if other:
            theirs |= dict.fromkeys(waiting, other)
            waiting = []
    assert model_files.FALLBACK == theirs


def test_the_papers_3b_model_has_the_size_that_its_table_gives():
    """712.40 MiB in the Sherry paper's Table 4, whose ffn_down must have had a coarser scale: 1.25 bits a weight instead of 1.5."""
    facts = model_files.facts(model_files.SHAPES["3b-bitnet"], "TQ1_25", "F16")
    down = 26 * 3200 * 8640
    assert facts["bytes"] - down * (1.5 - 1.25) / 8 == pytest.approx(712.40 * 2**20, rel=2e-3)  # norms: 0.65 MiB
    assert facts["bytes"] <= 735 * 2**20 and set(facts["stored"]) == {"TQ1_25", "TQ1_25_64"}


def test_types_without_a_fallback():
    assert model_files.stored_type("Q4_0", 100) == model_files.stored_type("TQ1_0", 100) == "F16"
    with pytest.raises(ValueError, match="rows of 192 weights are not a multiple of Q1_0's block"):
        model_files.stored_type("Q1_0", 192)


def test_shapes_are_the_published_ones():
    parameters = {"135m": 134_515_008, "270m": 268_098_176, "0.5b": 494_032_768, "0.7b": 728_842_752, "1b": 1_235_814_400,
                  "1.5b": 1_543_714_304, "3b": 3_212_749_824}  # fmt: skip
    parameters["0.7b"] -= 24 * (1536 + 4096)  # BitNet's inner norms, which the llama architecture has not
    for key, wanted in parameters.items():
        shape = model_files.SHAPES[key]
        assert sum(math.prod(t.shape) for t in model_files.plan(shape, "F16", "F16")) == wanted


def test_keys_and_values_that_a_token_reads():
    assert model_files.SHAPES["1b"].cache_bytes(1024) == 1024 * 2 * 2 * 512 * 16
    gemma = model_files.SHAPES["270m"]
    assert gemma.cache_bytes(100) == 100 * 2 * 2 * 256 * 18
    assert gemma.cache_bytes(2048) == 2 * 2 * 256 * (15 * 512 + 3 * 2048)  # three layers see everything


def test_a_model_that_is_not_finished_leaves_nothing(tmp_path):
    def stop(size):
        raise KeyboardInterrupt

    shape = model_files.SHAPES["tiny"]
    with pytest.raises(KeyboardInterrupt):
        model_files.write_model(tmp_path / "m.gguf", shape, model_files.plan(shape, "TQ1_25", "Q4_0"), stop)
    assert list(tmp_path.iterdir()) == []


# ---- runs ----


def test_types_take_turns_in_another_order_each_round(models, tmp_path, made_up):
    bench.main(arguments(models, tmp_path, "--types", "tq1_25,tq2_0,q4_0", "--rounds", "2", "--load-rounds", "0",
                         "--longest", "0", "--depth", "0,16", "--prompt-depth", "0,16", "--generate", "8,4", "--ubatch", "16"))  # fmt: skip
    assert made_up[:6] == [(label, 1, test) for label in ("TQ1_25", "TQ2_0", "Q4_0") for test in ("pp32", "tg4")]
    empty, filled = ["pp32 b2048 ub16", "tg8", "tg4"], ["pp32 b2048 ub16 @ d16", "tg8 @ d16", "tg4 @ d16"]
    rounds = [("TQ1_25", "TQ2_0", "Q4_0"), ("TQ2_0", "Q4_0", "TQ1_25")]
    wanted = [(label, 1, test) for order in rounds for test in empty for label in order]
    assert made_up[6:] == wanted + [(label, 1, test) for test in filled for order in rounds for label in order]


def test_builds_take_turns_and_share_a_process_where_a_context_is_filled(models, tmp_path, monkeypatch, made_up):
    processes = []
    whole = bench.measure

    def measure(files, *args):
        processes.append(len(files))
        return whole(files, *args)

    monkeypatch.setattr(bench, "measure", measure)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "llama-bench").touch()
    bench.main(arguments(models, tmp_path, "--types", "tq1_25,q4_0", "--rounds", "3", "--load-rounds", "0", "--longest", "0",
                         "--depth", "0,16", "--prompt", "4", "--against", tmp_path))  # fmt: skip
    rows = ["TQ1_25", "TQ1_25-before", "Q4_0", "Q4_0-before"]
    empty = [call[0] for call in made_up if call[2] == "tg8"]
    assert empty == rows + rows[1:] + rows[:1] + rows[2:] + rows[:2]
    filled = [label.endswith("-before") for label, _, test in made_up if test == "tg8 @ d16"]
    assert filled == [False] * 2 + [True] * 4 + [False] * 4 + [True] * 2 and processes[-4:] == [2, 4, 4, 2]
    report, text = json.loads((tmp_path / "r.json").read_text()), squeezed((tmp_path / "r.md").read_text())
    speed = {(e["type"], e["test"]): e for e in report["speed"]}
    new, old = (speed[label, "tg8 @ d16"]["rates"] for label in ("Q4_0", "Q4_0-before"))
    assert speed["Q4_0", "tg8 @ d16"]["reference_ratio"] == sorted(a / b for a, b in zip(new, old))[1]
    assert speed["Q4_0-before", "tg8 @ d16"]["reference_ratio"] is None and speed["Q4_0-before", "tg8 @ d16"]["ours_ratio"]
    assert "tg8 @ d16 t/s | TQ1_25 × | × before | GB/s | of limit |" in text and "| Q4_0 before | 4.500 |" in text


def test_embeddings_are_compared_with_the_first(models, tmp_path, made_up):
    bench.main(arguments(models, tmp_path, "--types", "tq1_25", "--embeddings", "F16,q6_k", "--vocab", "real", "--load-rounds", "0"))
    report, text = json.loads((tmp_path / "r.json").read_text()), squeezed((tmp_path / "r.md").read_text())
    files = report["models"]["tiny"]["types"]
    assert list(files) == ["TQ1_25+F16", "TQ1_25+Q6_K"] and report["models"]["tiny"]["vocab"] == 512
    matrix = 512 * 256 * 2
    assert files["TQ1_25+F16"]["output_share"] == pytest.approx(matrix / files["TQ1_25+F16"]["bytes"])
    assert files["TQ1_25+F16"]["bytes"] - files["TQ1_25+Q6_K"]["bytes"] == matrix - 512 * 210
    tg = {e["type"]: e for e in report["speed"] if e["kind"] == "tg"}
    assert tg["TQ1_25+F16"]["reference_ratio"] == 1 and tg["TQ1_25+Q6_K"]["reference_ratio"] > 1
    share = f"{100 * files['TQ1_25+Q6_K']['output_share']:.0f} %"
    assert f"| TQ1_25, Q6_K embeddings | 1.375 | {files['TQ1_25+Q6_K']['bytes'] / 2**20:.2f} | Q6_K | {share} |" in text
    assert "| × F16 embeddings |" in text and "TQ1_25 ×" not in text.partition("## tiny")[2] and "a vocabulary of 512" in text


def test_keys_and_values_count_as_read(models, tmp_path, made_up):
    bench.main(arguments(models, tmp_path, "--types", "tq1_25", "--depth", "0,100", "--load-rounds", "0", "--longest", "0"))
    report = json.loads((tmp_path / "r.json").read_text())
    size = report["models"]["tiny"]["types"]["TQ1_25"]["bytes"]
    for e in report["speed"]:
        if e["kind"] == "tg":
            cache = 2 * 2 * 2 * 64 * 2 * (e["depth"] + 4.5)  # 8 tokens, the first of which sees itself
            assert e["gb_per_s"] == pytest.approx(e["median"] * (size + cache) / 1e9)


def test_an_interrupted_run_is_resumed(models, tmp_path, monkeypatch, made_up):
    whole, flags = bench.measure, ["--types", "tq1_25,q4_0", "--depth", "0,16", "--rounds", "2", "--load-rounds", "0"]

    def measure(*args):
        for record in whole(*args):
            if len(made_up) == 4 + 8 + 4:  # two types were looked at; then came depth 0; of depth 16 the last is lost
                raise signals.Interrupted(15)
            yield record

    monkeypatch.setattr(bench, "measure", measure)
    with pytest.raises(SystemExit, match="143"):
        bench.main(arguments(models, tmp_path, *flags))

    def broken(*args):
        raise OSError("llama-bench broke")

    monkeypatch.setattr(bench, "measure", broken)
    with pytest.raises(OSError, match="llama-bench broke"):  # before anything new: nothing old is lost
        bench.main(arguments(models, tmp_path, *flags, "--resume"))
    monkeypatch.setattr(bench, "measure", whole)
    before, done = json.loads((tmp_path / "r.json").read_text()), len(made_up)
    bench.main(arguments(models, tmp_path, *flags, "--resume"))
    after = json.loads((tmp_path / "r.json").read_text())
    assert made_up[done + 4 :] == made_up[done - 1 : done]
    assert all(b["rates"] == a["rates"][: len(b["rates"])] and len(a["rates"]) == 2 for a, b in zip(after["speed"], before["speed"]))
    monkeypatch.setattr(bench, "measure", None)
    bench.main(arguments(models, tmp_path, *flags, "--resume"))  # nothing is left to measure
    again = json.loads((tmp_path / "r.json").read_text())
    assert again["speed"] == after["speed"] and again["bandwidth"] == after["bandwidth"]
    assert after["complete"] and not before["complete"] and len(after["bandwidth"]["1"]) > len(before["bandwidth"]["1"])


def test_a_run_is_resumed_with_its_settings_only(models, tmp_path, monkeypatch, made_up, capsys):
    flags = ["--types", "tq1_25,q4_0", "--rounds", "1", "--load-rounds", "0"]
    with pytest.raises(SystemExit, match="2"):
        bench.main(arguments(models, tmp_path, *flags, "--resume"))
    assert "r.json is not there: pass the --json of the interrupted run" in capsys.readouterr().err
    old = tmp_path / "old"
    (old / "bin").mkdir(parents=True)
    (old / "bin" / "llama-bench").write_text("one")
    bench.main(arguments(models, tmp_path, *flags, "--against", old))
    before = (tmp_path / "r.json").read_text()

    def refused(what, *more, against=old):
        with pytest.raises(ValueError, match=rf"r.json was measured with different settings \({what}\): pass the same flags with the same"):
            bench.main(arguments(models, tmp_path, *flags, *["--against", against] * bool(against), *more, "--resume"))
        assert (tmp_path / "r.json").read_text() == before

    refused("rounds", "--rounds", "3")
    refused("threads", "--threads", "1,2")
    refused("longest", "--longest", "7")
    refused("models", "--types", "tq1_25")
    refused("against, reference", against=None)
    (old / "bin" / "llama-bench").write_text("another")
    refused("against")
    (old / "bin" / "llama-bench").write_text("one")
    with monkeypatch.context() as patch:
        patch.setattr(bench, "fingerprint", lambda build, real=bench.fingerprint: real(build) if build == old else "rebuilt")
        refused("build")
    bench.main(arguments(models, tmp_path, *flags, "--against", old, "--resume"))
    report = json.loads(before)
    for damaged in "", before[:-9], "[]", "{}", json.dumps(report | {"speed": None}), json.dumps(report | {"bandwidth": None}):
        (tmp_path / "r.json").write_text(damaged)
        with pytest.raises(ValueError, match="r.json is not a report of this program, or is damaged: start anew without --resume"):
            bench.main(arguments(models, tmp_path, *flags, "--against", old, "--resume"))
        assert (tmp_path / "r.json").read_text() == damaged


def test_a_build_is_told_from_others_by_what_it_runs(tmp_path):
    for name in "bin/llama-bench", "bin/llama-cli", "lib/libggml-cpu.so":
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("one")
    first = bench.fingerprint(tmp_path)
    (tmp_path / "bin" / "llama-cli").write_text("two")
    assert bench.fingerprint(tmp_path) == first
    for name in "bin/llama-bench", "lib/libggml-cpu.so":
        (tmp_path / name).write_text("two")
        assert bench.fingerprint(tmp_path) != first
        first = bench.fingerprint(tmp_path)


def test_the_estimate_counts_filled_contexts(models, tmp_path, made_up, capsys):
    flags = ["--types", "tq1_25,q4_0", "--rounds", "3", "--load-rounds", "0", "--depth", "0,16384", "--generate", "8,4"]

    def estimate(*more):
        return bench.Run(bench.parse(arguments(models, tmp_path, *flags, *more))).estimate()

    total, filling = estimate()
    parameters = 512 * 256 + 2 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 256 * 512) + 5 * 256
    assert filling == pytest.approx(2 * 16384 * parameters / 50e9) and total > filling
    assert estimate("--depth", "0")[1] == 0
    assert estimate("--types", "tq1_25,tq1_25-plain")[1] == pytest.approx(4 * filling)  # three rounds, from one to the other and back
    bench.main(arguments(models, tmp_path, *flags, "--rounds", "1"))
    assert re.search(r"about \d+ min, \d+ of them to fill contexts \(--depth 0: none\); ", capsys.readouterr().err)
    assert "@ d: after so many tokens." in (tmp_path / "r.md").read_text()


def test_loading_takes_the_labels_as_they_are(models, tmp_path, monkeypatch, made_up):
    loaded = []

    def load(file, label, threads):
        loaded.append(label)
        return {what: {"seconds": 1.0, "anon": 1.0, "file": 1.0, "peak": 1.0} for what in ("load", "token")}

    monkeypatch.setattr(bench, "load", load)
    flags = ["--types", "tq1_25,tq1_25-plain", "--rounds", "1", "--load-rounds", "2"]
    bench.main(arguments(models, tmp_path, *flags))
    assert loaded == ["TQ1_25", "TQ1_25-plain", "TQ1_25-plain", "TQ1_25"]
    bench.main(arguments(models, tmp_path, *flags, "--resume"))
    report = json.loads((tmp_path / "r.json").read_text())
    assert len(loaded) == 4 and [len(e["rounds"]) for e in report["load"]] == [2, 2]


def test_long_tests_are_shortened_alike_and_only_slow_types_more():
    tests = [bench.Test("pp", 512), bench.Test("tg", 128)]
    rates = {"a": {"pp": 200.0, "tg": 20.0}, "b": {"pp": 180.0, "tg": 40.0}, "slow": {"pp": 10.0, "tg": 1.0}}
    out = bench.lengths(tests, rates, 1, 2, 5.0)  # one thread: half the rates
    prompt, own = out[tests[0]]
    assert prompt.tokens == 256 and [own[t].tokens for t in rates] == [256, 256, 32]  # 90 and 5 tokens a second
    gen, own = out[tests[1]]
    assert gen.tokens == 32 and [own[t].tokens for t in rates] == [32, 32, 8]
    assert bench.lengths(tests, rates, 1, 2, 0)[tests[0]][0] == tests[0]  # no limit


@pytest.mark.parametrize("error, match", [(signals.Interrupted(15), "143"), (OSError("llama-bench broke"), "llama-bench broke")])
def test_what_was_measured_before_an_end_is_written(models, tmp_path, monkeypatch, made_up, error, match):
    whole = bench.measure

    def measure(*args):
        if len(made_up) == 4 + 5:  # two types were looked at, then came two tests and a half
            raise error
        return whole(*args)

    monkeypatch.setattr(bench, "measure", measure)
    with pytest.raises((SystemExit, OSError), match=match):
        bench.main(arguments(models, tmp_path, "--types", "tq1_25,q4_0", "--load-rounds", "0"))
    report, text = json.loads((tmp_path / "r.json").read_text()), squeezed((tmp_path / "r.md").read_text())
    assert [e["rates"] for e in report["speed"]] == [[5], [6, 9], [7], [8]] and not report["complete"]
    assert "| Q4_0 |" in text and "Ended early" in text


def test_an_interrupt_before_any_figure_writes_nothing(models, tmp_path, monkeypatch, capsys):
    def stop(*args):
        raise signals.Interrupted(2)

    monkeypatch.setattr(bench, "measure", stop)
    with pytest.raises(SystemExit, match="130"):
        bench.main(arguments(models, tmp_path, "--types", "q4_0"))
    assert not (tmp_path / "r.json").exists() and "nothing is written" in capsys.readouterr().err


def test_llama_bench_that_fails_is_an_error(tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(OSError, match="llama-bench ended with 1 on bad.gguf, tg4: "):
        list(bench.measure([tmp_path / "bad.gguf"], "Q4_0", 1, bench.Test("tg", 4), None))


def test_a_disk_that_is_too_small_is_an_error_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(bench.shutil, "disk_usage", lambda path: type("usage", (), {"free": 10**6}))
    with pytest.raises(OSError, match=r"the models need [\d.]+ GB, 0.0 GB are free"):
        bench.main(arguments(tmp_path / "models", tmp_path, model="3b"))
    assert list((tmp_path / "models").iterdir()) == []


@pytest.mark.parametrize("args, message", [
    (["--models", "7b"], "no model '7b': there are 135m, 270m, 0.5b, 0.7b, 1b, 1.5b, 3b, 3b-bitnet, tiny"),
    (["--types", "TQ1_25,NOPE"], "NOPE is not a type of the built ggml, which has F32,"),
    (["--types", "I8"], "weights cannot be quantized to I8"),
    (["--embeddings", "NOPE-plain"], "NOPE-PLAIN is not a type"),
    (["--threads", "0"], "--threads"),
    (["--depth", "-1"], "--depth"),
    (["--vocab", "0"], "--vocab"),
    (["--prompt", "0", "--generate", "0"], "must not both be 0"),
    (["--against", "nowhere"], "nowhere/bin/llama-bench is not there"),
    (["--against", ".", "--embeddings", "F16,Q8_0"], "--against takes one type of --embeddings"),
    (["--rounds", "0"], "--rounds must be at least 1"),
])  # fmt: skip
def test_bad_arguments(capsys, args, message):
    with pytest.raises(SystemExit, match="2"):
        bench.parse(args)
    assert message in capsys.readouterr().err


def test_arguments():
    args = bench.parse(["--types", "q4_0-plain,tq1_25", "--threads", "all,1", "--depth", "0,4096"])
    assert args.types == ["Q4_0-plain", "TQ1_25"] and args.threads[0] == 1 and args.depth == [0, 4096]
    assert (args.models, args.prompt, args.generate, args.rounds) == (bench.MODELS, [512], [128], 3)
    quick = bench.parse(["--quick", "--rounds", "2"])
    assert (quick.models, quick.prompt, quick.depth, quick.rounds) == (["0.5b"], [128], [0], 2)
    assert bench.parse([]).depth == [0, 1024, 4096, 16384] and bench.parse(["--depth", "0"]).depth == [0]


def test_a_plot_without_matplotlib(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert bench.parse([]).plot is None and "no plot" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        bench.parse(["--plot", "x.png"])
    assert "--plot needs matplotlib" in capsys.readouterr().err


# ---- the C programs ----


def test_memory_bandwidth():
    program = common.program("bench_memory")
    result = subprocess.run([program, "3", "2"], capture_output=True, text=True)  # shares that are not alike
    assert result.returncode == 0 and re.fullmatch(r"(3 \d+\.\d\d\n){2}", result.stdout)
    assert min(bench.memory_bandwidth(1, 2)) > 0.1
    for bad in (["0", "1"], ["1", "0"], ["1"], []):
        result = subprocess.run([program, *bad], capture_output=True, text=True)
        assert result.returncode == 2 and "usage: " in result.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="measured on Linux only")
def test_loading_what_is_no_model_is_an_error(tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(OSError, match=r"bench_load ended with 1: (.|\n)*bad.gguf: llama.cpp cannot load it"):
        bench.load(tmp_path / "bad.gguf", "Q4_0", 1)
    program = common.program("bench_load", *bench.LOAD_LIBRARIES)
    result = subprocess.run([program, "x.gguf", "2", "1"], capture_output=True, text=True)
    assert result.returncode == 2 and "usage: " in result.stderr
