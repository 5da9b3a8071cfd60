#!/usr/bin/env python3
"""Count the instructions of matrix x vector shaders for a weight and a vector, as Mesa's driver compiles them for AMD's GPUs.

It counts instead of timing, and needs no GPU: RADV compiles for any of AMD's that RADV_FORCE_FAMILY names. Counted is the
loop over a row, from the driver's assembly: all blocks of one iteration, loops inside it as often as they run, for all
threads, divided by the weights that they multiply. Waits are left out. Rows and workgroups are those that llama.cpp's
Vulkan backend chooses for RDNA: waves of 64 threads, each a workgroup. What runs around the loop (the table of codes, the
sum over the threads) is counted on the shortest way through the shader.

Shaders are compiled from the patched llama.cpp. Those that multiply integers (activations of Q8_1) need a glslc that knows
GL_EXT_integer_dot_product; without it they are left out.

Needs scripts/build_llama_cpp.py, glslc, a C compiler, Vulkan's headers and loader (libvulkan-dev), and Mesa's driver for AMD
(mesa-vulkan-drivers).
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import amd_isa

from sherry_gguf import llama_cpp
from sherry_gguf.errors import Stop
from sherry_gguf.programs import Help, call, run
from sherry_gguf.report import markdown_table

GPUS = {"RDNA 2": ["navi21"], "RDNA 3": ["navi31", "gfx1100"]}  # the driver's names; Mesa 23 changed the second
DRIVERS = [Path("/usr/share/vulkan/icd.d"), Path("/etc/vulkan/icd.d")]
WAVE = 64  # threads
BINDINGS, PUSH_BYTES = 5, 52  # mul_mat_vec_num_bindings, vk_mat_vec_push_constants
ROWS = [4096, 2048]  # lengths
OURS = "../../sherry/vulkan/mul_mat_vec_sherry.comp"
COMMON = {"D_TYPE": "float", "FLOAT_TYPE": "float", "FLOAT_TYPEV2": "vec2", "FLOAT_TYPEV4": "vec4", "USE_SUBGROUP_ADD_NO_SHMEM": "1"}
FLOATS = {"B_TYPE": "float", "B_TYPEV2": "vec2", "B_TYPEV4": "vec4"}
KINDS = "vector", "scalar", "shared memory", "memory"


@dataclasses.dataclass(frozen=True)
class Shader:
    """A shader and its loop over a row.

    Attributes:
        type: of the weights.
        size, bytes: weights and bytes of a block.
        rows: rows of a workgroup (NUM_ROWS).
        weights: those of a thread and row in an iteration of the loop.
        source: its file.
        defines: as vulkan-shaders-gen.cpp compiles it, but for the type and COMMON.
        trips: how often the loops inside it run, in order.
        rows_at_once: whether an iteration multiplies all rows.
    """

    type: str
    size: int
    bytes: int
    rows: int
    weights: int
    source: str
    defines: dict[str, str]
    trips: tuple[int, ...] = ()
    rows_at_once: bool = True

    @property
    def activations(self) -> str:
        return "f32" if "B_TYPE" in self.defines else "q8_1"

    @property
    def multiplied(self) -> int:
        """Weights of a thread in an iteration."""
        return self.weights * (self.rows if self.rows_at_once else 1)


INTEGERS = {"SHERRY_INTEGERS": "1"}
SHADERS = [
    Shader("TQ1_25", 128, 22, 4, 32, OURS, FLOATS),
    Shader("TQ1_25_64", 64, 12, 4, 32, OURS, FLOATS),
    Shader("STQ1_0", 256, 42, 4, 32, OURS, FLOATS),
    # a row at a time; a thread takes every eighth of 32, of 16 and of 4 bytes
    Shader("TQ1_0", 256, 54, 2, 32, "mul_mat_vec_tq1_0.comp", FLOATS, trips=(4, 2, 1), rows_at_once=False),
    Shader("TQ2_0", 256, 66, 2, 16, "mul_mat_vec_tq2_0.comp", FLOATS),
    Shader("Q2_K", 256, 84, 2, 16, "mul_mat_vec_q2_k.comp", FLOATS),
    Shader("Q4_0", 32, 18, 2, 4 * 8, "mul_mat_vec.comp", FLOATS),  # four iterations of the source in one
    Shader("TQ1_25", 128, 22, 8, 32, OURS, INTEGERS),
    Shader("TQ1_25_64", 64, 12, 8, 32, OURS, INTEGERS),
    Shader("STQ1_0", 256, 42, 8, 32, OURS, INTEGERS),
    Shader("Q2_K", 256, 84, 2, 4 * 16, "mul_mat_vecq.comp", {"ACC_TYPE": "float"}),
    Shader("Q4_0", 32, 18, 1, 4 * 8, "mul_mat_vecq.comp", {"ACC_TYPE": "float"}),
]


# ---- the compilers ----


def driver() -> dict[str, str]:
    """The environment in which Vulkan's loader takes RADV. Raises Stop."""
    if "VK_ICD_FILENAMES" in os.environ or "VK_DRIVER_FILES" in os.environ:
        return dict(os.environ)  # another Mesa
    found = next((file for folder in DRIVERS for file in sorted(folder.glob("radeon_icd*.json"))), None)
    if not found:
        raise Stop("Mesa's Vulkan driver for AMD is missing: apt-get install mesa-vulkan-drivers")
    return {**os.environ, "VK_ICD_FILENAMES": str(found)}


def build_printer(work: Path) -> Path:
    """The program that shows a driver's assembly."""
    source, program = Path(__file__).with_suffix(".c"), work / "count_vulkan"
    call(os.environ.get("CC", "cc"), "-std=c11", "-O1", source, "-o", program, "-lvulkan")
    return program


def knows_integers(glslc: str, folder: Path) -> bool:
    test = folder / "feature-tests" / "integer_dot.comp"
    command = [glslc, "-fshader-stage=compute", "--target-env=vulkan1.3", test, "-o", os.devnull]
    return subprocess.run(command, capture_output=True).returncode == 0


def compile_shader(shader: Shader, glslc: str, folder: Path, out: Path) -> None:
    defines = {**COMMON, **shader.defines, f"DATA_A_{shader.type}": "1"}
    flags = ["-fshader-stage=compute", "--target-env=vulkan1.2", "-O", *(f"-D{name}={value}" for name, value in defines.items())]
    call(glslc, *flags, shader.source, "-o", out, cwd=folder)


def assembly(program: Path, spirv: Path, shader: Shader, family: str, env: dict[str, str]) -> tuple[str, str, dict[str, int], str] | None:
    """Device, driver, statistics and assembly; None if the driver knows no such GPU. Raises Stop."""
    command = [program, spirv, BINDINGS, PUSH_BYTES, WAVE, WAVE, shader.rows, 1]
    env = {**env, "RADV_FORCE_FAMILY": family, "MESA_SHADER_CACHE_DISABLE": "true"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=env)
    if "Unknown family" in done.stderr:
        return None
    head, _, listing = done.stdout.partition("\n\n")
    if done.returncode or not listing.strip():
        raise Stop(f"no assembly of {shader.type}, {shader.activations} for {family}:\n{done.stderr or done.stdout}")
    device, name, *lines = head.splitlines()
    statistics = {key: int(value) for key, _, value in (line.rpartition(" = ") for line in lines)}
    return device, name, statistics, listing


# ---- the counts ----


def count(shader: Shader, listing: str) -> dict:
    """Instructions for a weight, by kind, and those around the loop. Raises Stop if the loop isn't the expected one."""
    program = amd_isa.parse(listing)
    try:
        loop = amd_isa.reading(program)  # a second one is for the last rows, if they are fewer
        instructions = amd_isa.iteration(program, loop, shader.trips)
        products = amd_isa.iteration(program, loop, shader.trips, amd_isa.products)["products"]
        each = 1 if shader.activations == "f32" else 4
        if not shader.multiplied <= each * products <= 4 * shader.multiplied:
            raise ValueError(f"{products} products of {each} for {shader.multiplied} weights")
        around = amd_isa.around(program, loop)
    except ValueError as error:
        raise Stop(f"{shader.source} for {shader.type} is not the shader that this script knows: {error}") from error
    return {kind: instructions[kind] / shader.multiplied for kind in KINDS} | {"around": around}


def measure(glslc: str) -> dict:
    folder = llama_cpp.source_dir() / "ggml" / "src" / "ggml-vulkan" / "vulkan-shaders"
    if not (ours := (folder / OURS).resolve()).exists():
        raise Stop(f"{ours} is not there: run scripts/build_llama_cpp.py")
    env, integers = driver(), knows_integers(glslc, folder)
    result = {"glslc": " ".join(call(glslc, "--version").split("\n")[0].split()), "driver": "", "shaders": []}
    with tempfile.TemporaryDirectory() as work:
        program, spirv = build_printer(Path(work)), Path(work) / "shader.spv"
        for shader in SHADERS:
            if shader.activations == "q8_1" and not integers:
                continue
            compile_shader(shader, glslc, folder, spirv)
            counts = {}
            for name, families in GPUS.items():
                for family in families:
                    if found := assembly(program, spirv, shader, family, env):
                        _, result["driver"], statistics, listing = found
                        counts[name] = count(shader, listing) | {"registers": statistics["VGPRs"]}
                        break
            facts = {"type": shader.type, "activations": shader.activations, "rows": shader.rows}
            result["shaders"].append({**facts, "bytes": shader.bytes / shader.size, "counts": counts})
    return result


def all_kinds(counts: dict) -> float:
    return sum(counts[kind] for kind in KINDS)


def with_the_rest(shader: dict, counts: dict, length: int) -> float:
    """Instructions for a weight of rows of `length`, with those around the loop: a thread has rows x length / WAVE weights."""
    return all_kinds(counts) + counts["around"] * WAVE / (shader["rows"] * length)


def tables(result: dict) -> list[str]:
    lines = [
        f"Instructions for a weight, counted in the assembly of {result['driver']}, not timed ({result['glslc']}).",
        "",
        "Rows of 4096 and of 2048: with what runs around the loop. Bytes: a block's, for each of its weights.",
    ]
    head = ["type", "activations", "rows", *KINDS, "all", *(f"rows of {length}" for length in ROWS), "registers", "bytes"]
    for gpu in GPUS:
        body = []
        for shader in result["shaders"]:
            if counts := shader["counts"].get(gpu):
                figures = [*(counts[kind] for kind in KINDS), all_kinds(counts), *(with_the_rest(shader, counts, n) for n in ROWS)]
                start = [shader["type"], shader["activations"], str(shader["rows"])]
                body.append([*start, *(f"{x:.2f}" for x in figures), str(counts["registers"]), f"{shader['bytes']:.3f}"])
        if body:
            lines += ["", f"{gpu}:", "", markdown_table(head, body)]
    return lines


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    p.add_argument("--glslc", default="glslc", metavar="PROGRAM", help="shader compiler (default: glslc)")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the counts to FILE")
    p.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables to FILE, too")
    a = p.parse_args()
    result = measure(a.glslc)
    text = "\n".join(tables(result)) + "\n"
    print(text, end="")
    if len(result["shaders"]) < len(SHADERS):
        print("count_vulkan.py: this glslc knows no integer dot products; --glslc takes a newer one", file=sys.stderr)
    if a.json:
        a.json.write_text(json.dumps(result, indent=1) + "\n")
    if a.markdown:
        a.markdown.write_text(text)


if __name__ == "__main__":
    run(main)
