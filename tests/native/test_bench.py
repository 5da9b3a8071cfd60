"""scripts/bench/kernels.py and `sherry-gguf bench` measure what they say; no test asks how fast anything is."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from bench import kernels as bench_kernels
from model_files import SHAPES, plan, write_model

from sherry_gguf import bench, kernels, llama_cpp

BENCH = Path(__file__).parents[2] / "scripts" / "bench" / "kernels.py"
OURS = {"tq1_25": "1.375", "tq1_25_64": "1.500", "stq1_0": "1.312"}  # bits a weight


def test_every_kernel_and_type_is_measured(tmp_path):
    out = tmp_path / "rates.json"
    command = [sys.executable, BENCH, "-n", "1024", "--rounds", "3", "--matmul-rounds", "2", "--mib", "4", "--json", out]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = json.loads(out.read_text())
    rates, printed = found["rates"], re.sub(" +", " ", result.stdout)
    assert {name for name in rates if "-" in name} == {f"{kind}-{isa}" for kind in OURS for isa in kernels.available()}
    assert {"tq1_0", "tq2_0", "q1_0", "q4_0", "q8_0"} <= rates.keys()
    assert all(len(rounds) == 3 and min(rounds) > 0 for rounds in rates.values())
    assert all(f"| {kind}, scalar | {bits} |" in printed for kind, bits in OURS.items()) and printed.count("| 1.00 |\n") >= 1
    products = found["matmul"]
    assert all(len(rounds) == 2 and min(rounds) > 0 for rounds in products.values())
    assert {"memory", *(f"vector {kind}" for kind in OURS), "vector tq2_0", "vector q4_0"} <= products.keys()
    for isa, kind in itertools.product(kernels.available_repacked(), OURS):
        columns = f"columns {kind} {isa}"
        assert {f"vector {kind}-{isa}", f"{columns} tables 1", f"{columns} codes 512", f"peak {isa}"} <= products.keys()
        assert (f"{columns} panels 512" in products) == (isa in kernels.available_panels())
        assert (f"{columns} wide 512" in products) == (isa in kernels.available_wide())
        assert f"| {kind} repacked, {isa} | {OURS[kind]} |" in printed and f"| {kind} | {isa} |" in printed


def test_without_a_known_peak_no_share_is_shown(capsys):
    """As on ARM, where bench_matmul prints 0; and a CPU without repacked kernels has no columns at all."""
    rates = {"columns tq1_25 neon codes 512": [3.0, 4.0], "tables neon": [12.0], "codes neon": [512.0], "peak neon": [0.0, 0.0]}
    bench_kernels.show_columns(rates)
    assert re.sub(" +", " ", capsys.readouterr().out).endswith("| tq1_25 | neon | **4** | | |\n")
    bench_kernels.show_columns(rates | {"peak neon": [7.0, 8.0]})
    assert re.sub(" +", " ", capsys.readouterr().out).endswith("| tq1_25 | neon | **4** | 8 | 46 % |\n")
    bench_kernels.show_columns({"memory": [1.0]})
    assert capsys.readouterr().out == ""


def test_rows_that_are_no_whole_blocks_are_an_error():
    program = llama_cpp.root() / "bench_kernels"  # made by the test above
    result = subprocess.run([program, "100", "1", "tq1_25"], capture_output=True, text=True)
    assert result.returncode == 1 and "tq1_25: no such type, or rows of 100 are not whole blocks" in result.stderr


# ---- sherry-gguf bench ----


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two tiny models, TQ1_25 and Q4_0."""
    directory, shape = tmp_path_factory.mktemp("two"), SHAPES["tiny"]
    for name in "TQ1_25", "Q4_0":
        write_model(directory / f"{name}.gguf", shape, plan(shape, name, "Q4_0"), lambda size: None)
    return directory / "TQ1_25.gguf", directory / "Q4_0.gguf"


def verb(*args, **kwargs):
    return subprocess.run([sys.executable, "-m", "sherry_gguf.cli", "bench", *map(str, args)], capture_output=True, text=True, **kwargs)


def test_files_are_compared(two, tmp_path):
    out = tmp_path / "r.json"
    done = verb(*two, "--threads", "1", "--prompt", "20", "--generate", "4", "--rounds", "2", "--json", out)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert [(e["file"], e["test"]) for e in report["speed"]] == [(str(f), t) for t in ("pp20", "tg4") for f in two]
    assert all(len(e["rates"]) == 2 and min(e["rates"]) > 0 and e["threads"] == 1 for e in report["speed"])
    assert report["cpu"] == bench.cpu_name() and report["cpu"] in done.stdout and report["llama_cpp"]
    assert "TQ1_25" in report["files"][0]["type"] and report["files"][1]["bytes"] > report["files"][0]["bytes"]
    assert done.stdout == bench.tables(report)


def test_medians_and_ratios_to_the_first_file():
    file = {"type": "llama ?B Q4_0", "bytes": 3 << 20}
    rates = {"a": [100.0, 220.0, 90.0], "b": [50.0, 100.0, 60.0], "c": []}
    report = {"cpu": "c", "llama_cpp": "l", "date": "d", "rounds": 3, "files": [file | {"file": f} for f in rates],
              "speed": [{"file": f, "threads": 2, "test": "tg8", "rates": r} for f, r in rates.items()]}  # fmt: skip
    text = re.sub(" +", " ", bench.tables(report))
    assert "2 threads:" in text and "| file | model | MiB | tg8 | x |" in text
    assert "| a | llama ?B Q4_0 | 3.00 | 100 | 1.00 |" in text
    assert "| b | llama ?B Q4_0 | 3.00 | 60.0 | 0.50 |" in text  # of 0.50, 0.45 and 0.67; of the medians it would be 0.60
    assert "| c | llama ?B Q4_0 | 3.00 | | |" in text and "(pp: read a prompt, tg: generate)" in text
    for entry in report["speed"]:
        entry["test"] += " @ d16"
    assert "(pp: read a prompt, tg: generate, @ d: after so many tokens)" in bench.tables(report)


def test_files_take_turns(monkeypatch):
    calls = []

    def llama_bench(file, threads, test):
        calls.append((file.name, threads, str(test)))
        return {"avg_ts": 1.0, "build_commit": "l", "model_type": "t", "model_size": 1, "model_n_params": 1}

    monkeypatch.setattr(bench, "llama_bench", llama_bench)
    tests = [bench.Test("pp", 8), bench.Test("tg", 4)]
    steps = list(bench.compare([Path("a"), Path("b")], [1, 2], tests, 2, {}))
    assert len(steps) == len(calls) == 2 + 2 * 2 * 2 * 2
    assert calls[2:6] == [("a", 1, "pp8"), ("b", 1, "pp8"), ("a", 1, "tg4"), ("b", 1, "tg4")]
    assert calls[10:14] == [("b", 1, "pp8"), ("a", 1, "pp8"), ("b", 1, "tg4"), ("a", 1, "tg4")]


def test_a_filled_context_is_measured_in_one_process(two, monkeypatch):
    """With real models: both run, as often as asked, and the report has them in the rounds' order."""
    calls, each = [], bench.llama_bench_each

    def llama_bench_each(files, threads, test, *rest):
        calls.append(([f.name for f in files], str(test)))
        return each(files, threads, test, *rest)

    monkeypatch.setattr(bench, "llama_bench_each", llama_bench_each)
    report = {}
    steps = list(bench.compare(list(two), [1], [bench.Test("tg", 2), bench.Test("tg", 2, 32)], 2, report))
    names = [f.name for f in two]
    assert calls[-1] == (names + names[::-1], "tg2 @ d32") and len(steps) == 2 + 2 * 2 * 2
    assert [(e["test"], len(e["rates"])) for e in report["speed"]] == [("tg2", 2)] * 2 + [("tg2 @ d32", 2)] * 2
    assert all(min(e["rates"]) > 0 for e in report["speed"])


def test_a_model_that_breaks_after_another_is_named(two, tmp_path):
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF" + bytes(100))
    records = bench.llama_bench_each([two[0], bad], 1, bench.Test("tg", 2, 8))
    assert next(records)["avg_ts"] > 0
    with pytest.raises(OSError, match="llama-bench ended with 1 on bad.gguf, tg2 @ d8: "):
        next(records)


@pytest.mark.parametrize("depth", [0, 64])
def test_a_few_tokens_warm_up_before_a_prompt(depth, tmp_path, monkeypatch):
    """Also where a context is restored: nothing else has touched the mapped file."""
    tool = tmp_path / "llama-bench"
    tool.write_text(f"""#!{sys.executable}
import json, sys
print(json.dumps(dict(n_prompt=16, n_gen=0, avg_ts=1.0)))
print(json.dumps(dict(n_prompt=100, n_gen=0, avg_ts=2.0, args=sys.argv[1:])))
""")
    tool.chmod(0o755)
    monkeypatch.setattr(bench.llama_cpp, "tool", lambda name: tool)
    (record,) = bench.llama_bench_each([Path("m.gguf")], 1, bench.Test("pp", 100, depth))
    args = record["args"]
    assert record["avg_ts"] == 2 and args[args.index("-p") + 1] == "16,100" and "--no-warmup" in args


def test_tests_of_the_command_line():
    tests = bench.parse(["a", "--prompt", "512,4096", "--generate", "64", "--depth", "0,1024"], None).tests
    assert list(map(str, tests)) == ["pp512", "pp4096", "tg64", "tg64 @ d1024"]
    assert list(map(str, bench.parse(["a", "--prompt", "0"], None).tests)) == ["tg128"]


def test_an_interrupt_shows_what_was_measured(monkeypatch, capsys, tmp_path):
    (tmp_path / "a.gguf").touch()
    calls = iter(range(3))

    def llama_bench(file, threads, test):
        if next(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return {"avg_ts": 7.0, "build_commit": "l", "model_type": "t", "model_size": 1, "model_n_params": 1}

    monkeypatch.setattr(bench, "llama_bench", llama_bench)
    code = bench.main([str(tmp_path / "a.gguf"), "--threads", "1", "--json", str(tmp_path / "r.json")])
    shown = capsys.readouterr()
    assert code == 143 and "interrupted" in shown.err and "| 7.00 | 1.00 |" in re.sub(" +", " ", shown.out)
    assert [e["rates"] for e in json.loads((tmp_path / "r.json").read_text())["speed"]] == [[7.0], []]


def test_what_cannot_be_measured(tmp_path):
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF" + bytes(100))
    done = verb(bad, "--json", tmp_path / "r.json")
    assert (
        done.returncode == 1 and "error: llama-bench ended with 1 on bad.gguf, tg1: " in done.stderr and not (tmp_path / "r.json").exists()
    )
    done = verb(bad, env=os.environ | {"SHERRY_BUILD_DIR": str(tmp_path)})
    assert done.returncode == 1 and "run scripts/build_llama_cpp.py" in done.stderr and "Traceback" not in done.stderr
    done = verb("nowhere.gguf", bad)
    assert done.returncode == 1 and done.stderr == "error: no such file: nowhere.gguf\n"
    for args, message in ([bad, "--rounds", "0"], "--rounds at least 1"), (
        [bad, "--prompt", "0", "--generate", "0"], "not both 0"), (
        [bad, "--threads", "0"], "argument --threads: not a list of numbers from 1 on: '0'"), (
        [bad, "--prompt", "abc"], "argument --prompt: not a list of numbers from 0 on: 'abc'"), (
        [bad, "--depth", "-1"], "argument --depth: not a list of numbers from 0 on: '-1'"), (
        [bad, "--depth", "9" * 20], "99999999999999999999 is more than llama-bench takes, 2147483647"), (
        [bad, "--depth", "1024", "--generate", "0"], "--depth is for generating: it needs --generate"):  # fmt: skip
        done = verb(*args)
        assert done.returncode == 2 and message in done.stderr, done.stderr


def test_what_is_refused_before_anything_is_measured(two, tmp_path):
    comma = tmp_path / "a,b.gguf"
    comma.symlink_to(two[0])
    for args, message in (
        ([two[0], "--json", tmp_path / "none" / "r.json"], "r.json: it is a directory, or its directory does not exist"),
        ([two[0], "--json", tmp_path], "it is a directory"),
        ([comma], f"takes a comma for the end of a file's name: rename {comma}"),
    ):
        done = verb(*args)
        assert done.returncode == 1 and message in done.stderr and not done.stdout and "Traceback" not in done.stderr, done.stderr


def test_nobody_reads_the_table(two):
    bench = f"{sys.executable} -m sherry_gguf.cli bench {two[0]} --threads 1 --prompt 8 --generate 0 --rounds 1"
    done = subprocess.run(f"{bench} | true", shell=True, capture_output=True, text=True)
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr, done.stderr
