"""scripts/bench/count_vulkan.py: its reading of AMD's assembly, and the published counts."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import amd_isa
import count_vulkan
import pytest

REPO = Path(__file__).parents[2]
LISTING = """
	s_mov_b32 s0, 0                                             ; be800080
BB1:
	ds_write_b32 v3, v2
	s_cbranch_scc0 BB1
BB2:
	s_cmp_lg_i32 s5, 0
	s_cbranch_scc0 BB4
BB3:
	v_rcp_f32_e32 v3, v3
	(then repeated 3 times)
BB4:
	buffer_load_dwordx4 v[28:31], v9, s[20:23], 0 offen
	s_waitcnt vmcnt(0)
BB5:
	v_fmac_f32_e32 v36, v27, v30
	v_add_f32_e32 v1, v2, v3
BB6:
	v_dot4c_i32_i8_e32 v36, v27, v30
	s_cbranch_scc1 BB6
BB7:
	s_cbranch_scc1 BB5
BB8:
	s_cbranch_scc0 BB9
	s_branch BB4
BB9:
	buffer_store_dword v0, off, s[12:15], s0
	s_endpgm
	s_code_end
"""


def test_loops_of_a_listing():
    program = amd_isa.parse(LISTING)
    assert program.blocks["BB3"] == ["v_rcp_f32_e32 v3, v3"] * 4
    first, second = amd_isa.loops(program)
    assert (first.blocks, first.inner) == ({"BB1"}, [])
    assert second.blocks == {f"BB{i}" for i in range(4, 9)}
    assert [loop.blocks for loop in second.inner] == [{"BB5", "BB6", "BB7"}]
    assert [loop.blocks for loop in second.inner[0].inner] == [{"BB6"}]
    assert amd_isa.reading(amd_isa.parse(LISTING.replace("BB5:", "buffer_load_ushort v1, v2, s[0:3], 0\n" * 2 + "BB5:"))) == second
    counts = amd_isa.iteration(program, second, (2, 5))
    assert counts == Counter({"memory": 1, "waits": 1, "vector": 2 * (2 + 5), "scalar": 2 * (5 + 1) + 2})
    assert amd_isa.iteration(program, second, (2, 5), amd_isa.products)["products"] == 2 * (1 + 5)
    assert amd_isa.around(program, second) == 1 + 2 + 2 + 2  # not BB3's four, which a branch skips


def test_the_loop_that_reads_memory():
    program = amd_isa.parse(LISTING)
    with pytest.raises(ValueError, match="no loop reads memory"):
        amd_isa.reading(program)
    program.blocks["BB6"] += program.blocks.pop("BB4") * 3
    program.blocks["BB4"] = ["s_nop 0"]
    assert amd_isa.reading(program).blocks == {"BB6"}


@pytest.mark.parametrize("trips", [(), (2,), (2, 5, 1)])
def test_another_number_of_loops_is_an_error(trips):
    program = amd_isa.parse(LISTING)
    with pytest.raises(ValueError, match=f"the loop has 2 loops inside, {len(trips)} are expected"):
        amd_isa.iteration(program, amd_isa.loops(program)[1], trips)


def test_what_a_listing_may_not_hold():
    with pytest.raises(ValueError, match="block BB1 jumps to BB7, which the listing lacks"):
        amd_isa.parse("BB1:\ns_branch BB7\n")
    with pytest.raises(ValueError, match="what kind of instruction is 'image_load v1'"):
        amd_isa.kind("image_load v1")


@pytest.mark.parametrize("instruction, kind", [
    ("v_fma_mix_f32 v1, v2, v3, v4", "vector"), ("s_lshr_b32 s6, s6, 7", "scalar"), ("s_wait_loadcnt 0x0", "waits"),
    ("s_load_dwordx4 s[4:7], s[2:3], 0x40", "memory"), ("ds_load_b64 v[1:2], v3", "shared memory"),
])  # fmt: skip
def test_kinds(instruction, kind):
    assert amd_isa.kind(instruction) == kind


def test_what_the_page_shows():
    """docs/kernels.md has the published counts."""
    published = REPO / "scripts" / "results" / "vulkan.json"
    result = json.loads(published.read_text())
    assert published.with_suffix(".md").read_text() == "\n".join(count_vulkan.tables(result)) + "\n"
    assert len(result["shaders"]) == len(count_vulkan.SHADERS)
    page = (REPO / "docs" / "kernels.md").read_text("utf-8")
    assert f"({result['driver'].removeprefix('radv ')}, raw data" in page
    for shader in result["shaders"]:
        cells = [shader["type"], {"f32": "floats", "q8_1": "Q8_1"}[shader["activations"]], f"{shader['bytes']:.3f}"]
        for gpu in count_vulkan.GPUS:
            counts = shader["counts"][gpu]
            figures = counts["vector"], count_vulkan.all_kinds(counts), count_vulkan.with_the_rest(shader, counts, 4096)
            cells += [f"{figure:.2f}" for figure in figures]
        assert f"| {' | '.join(cells)} |" in page


@pytest.mark.slow
def test_published_counts(tmp_path):
    """Nothing is timed, so the same compilers give the same figures."""
    for program in "glslc", "cc":
        if not shutil.which(program):
            pytest.skip(f"{program} is missing")
    if not any(folder.glob("radeon_icd*.json") for folder in count_vulkan.DRIVERS):
        pytest.skip("Mesa's Vulkan driver for AMD is missing")
    if not Path("/usr/include/vulkan/vulkan.h").exists():
        pytest.skip("Vulkan's headers are missing")
    out, published = tmp_path / "vulkan.json", REPO / "scripts" / "results" / "vulkan.json"
    script = REPO / "scripts" / "bench" / "count_vulkan.py"
    done = subprocess.run([sys.executable, script, "--json", out], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counted, before = json.loads(out.read_text()), json.loads(published.read_text())
    for shaders in counted["shaders"], before["shaders"]:
        for gpu in count_vulkan.GPUS:
            floats = {shader["type"]: count_vulkan.all_kinds(shader["counts"][gpu]) for shader in shaders if shader["activations"] == "f32"}
            assert 0 < floats["TQ1_25"] < floats["TQ2_0"] < floats["TQ1_0"]
    if counted["driver"] != before["driver"]:
        pytest.skip(f"published figures are of {before['driver']}")
    same = {(s["type"], s["activations"]): s for s in before["shaders"]}
    assert counted["shaders"] and all(same[s["type"], s["activations"]] == s for s in counted["shaders"])
