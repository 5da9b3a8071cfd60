"""scripts/bench/kernels.py measures what it says, once; how fast anything is is not for tests."""

import json
import subprocess
import sys
from pathlib import Path

from sherry_gguf import kernels, llama_cpp

BENCH = Path(__file__).parents[2] / "scripts" / "bench" / "kernels.py"


def test_every_kernel_and_type_is_measured(tmp_path):
    out = tmp_path / "rates.json"
    command = [sys.executable, BENCH, "-n", "1024", "--rounds", "3", "--matmul-rounds", "2", "--mib", "4", "--json", out]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = json.loads(out.read_text())
    rates = found["rates"]
    assert {name for name in rates if name.startswith("tq1_25-")} == {f"tq1_25-{isa}" for isa in kernels.available()}
    assert {"tq1_0", "tq2_0", "q1_0", "q4_0", "q8_0"} <= rates.keys()
    assert all(len(rounds) == 3 and min(rounds) > 0 for rounds in rates.values())
    assert "| tq1_25, scalar | 1.375 |" in result.stdout and result.stdout.count("| 1.00 |\n") >= 1
    products = found["matmul"]
    assert all(len(rounds) == 2 and min(rounds) > 0 for rounds in products.values())
    assert {"memory", "vector tq1_25", "vector tq2_0", "vector q4_0"} <= products.keys()
    for isa in kernels.available_repacked():
        assert {f"vector tq1_25-{isa}", f"columns {isa} tables 1", f"columns {isa} codes 512", f"peak {isa}"} <= products.keys()
        assert (f"columns {isa} panels 512" in products) == (isa in kernels.available_panels())
        assert f"| tq1_25 repacked, {isa} | 1.375 |" in result.stdout


def test_rows_that_are_no_whole_blocks_are_an_error():
    program = llama_cpp.root() / "bench_kernels"  # made by the test above
    result = subprocess.run([program, "100", "1", "tq1_25"], capture_output=True, text=True)
    assert result.returncode == 1 and "tq1_25: no such type, or rows of 100 are not whole blocks" in result.stderr
