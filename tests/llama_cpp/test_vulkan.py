"""llama.cpp's tools with the Vulkan backend on TQ1_25, TQ1_25_64 and STQ1_0, on the device that GGML_VK_VISIBLE_DEVICES names.

test_vulkan_shaders.py compares each shader with NumPy.
"""

import collections
import re

import pytest
from conftest import LONG, greedy, run_backend_ops

from sherry_gguf import gguf_type

pytestmark = pytest.mark.slow

# Upstream's cases by which software's compilation of shaders does not take minutes, and at least how many of each operation there are.
CASES = [
    r"type={},n=256",
    r"type_src={},",
    r"type_a={},type_b=f32,m=[0-9]+,n=(1|2|8|9|16|64),",
    r"type_a={},type_b=f32,n_mats=[0-9]+,.*,n=(1|4|5|16|17|32),",
]
LEAST = {"GET_ROWS": 8, "CPY": 5, "MUL_MAT": 20, "MUL_MAT_ID": 60}


@pytest.mark.parametrize("name", gguf_type.TYPES)
def test_backend_ops(vulkan_build, name):
    """Vulkan gives what the CPU gives, within upstream's bounds."""
    which = "|".join(CASES).replace("{}", name.lower())
    text = run_backend_ops([vulkan_build.tool("test-backend-ops")], LEAST, which, backend="Vulkan0", env=vulkan_build.env)
    for op, least in LEAST.items():
        assert len(re.findall(rf"^ *{op}\(.*OK", text, re.M)) >= least, (op, text[-3000:])


# ---- the demo model ----


PROMPTS = "def read(self):", LONG, "class Reader:\n    def __init__(self", "import os\nimport ", "for line in"
LAYERS = 4  # of it, with seven matrices each


@pytest.fixture(scope="module")
def texts(vulkan_build, demo):
    """By prompt, how the CPU continues it with upstream's F32 file: it rounds activations to 8 bits for ours, but the device need not."""
    return {prompt: text(vulkan_build, demo[1], prompt, "--device", "none") for prompt in PROMPTS}


def text(build, model, prompt, *args, **env):
    return greedy(model, *args, prompt=prompt, command=[build.tool("llama-cli")], env=build.env | env)


def same_text(build, model, texts, *args, **env):
    """Whether the continuations are these. One may part from its own, where two tokens are nearly as likely."""
    return sum(text(build, model, prompt, *args, **env) == texts[prompt] for prompt in PROMPTS) >= len(PROMPTS) - 1


class Placement:
    """Where a model's layers and their products are in a run that reads a short prompt and generates three tokens.

    Attributes:
        offloaded: layers on the device, and how many there are; the output is one.
        buffers: MiB of weights by where they are.
        products: how often the device multiplies TQ1_25 matrices, by (rows, inputs).
        log: all that the tool says.
    """

    GRAPHS = 4  # one warms up, one reads the prompt, two follow the first tokens

    def __init__(self, build, model, *args, **env):
        self.log = build.run("llama-completion", "-m", model, "-p", PROMPTS[0], "-n", 3, "--temp", 0, "-no-cnv", "-t", 2, "-v", *args,
                             env={"GGML_VK_PERF_LOGGER": "1"} | env)  # fmt: skip
        *_, (some, all_) = re.findall(r"offloaded (\d+)/(\d+) layers to GPU", self.log)
        self.offloaded = int(some), int(all_)
        self.buffers = {name: float(size) for name, size in re.findall(r"(\S+) model buffer size = +([0-9.]+) MiB", self.log)}
        self.products = collections.Counter()
        for rows, inputs, count in re.findall(r"MUL_MAT\S* tq1_25 m=(\d+) n=\d+ k=(\d+): (\d+) x", self.log):
            self.products[int(rows), int(inputs)] += int(count)

    def layers(self, matrices):
        """How many layers the device multiplies, if it multiplies so many matrices of each."""
        return self.products.total() / self.GRAPHS / matrices


def test_all_layers_on_the_device(vulkan_build, demo, texts):
    placed = Placement(vulkan_build, demo[2], "-ngl", 99, "-c", 256)
    assert placed.offloaded == (LAYERS + 1, LAYERS + 1) and "CPU_REPACK" not in placed.buffers, placed.log
    assert placed.buffers["Vulkan0"] > 0.5 and placed.layers(7) == LAYERS, placed.log
    assert same_text(vulkan_build, demo[2], texts, "-ngl", 99)


@pytest.mark.parametrize("flags, repacked", [("", False), ("--no-host", True), ("--no-host --no-repack", False)])
def test_layers_on_both(vulkan_build, demo, texts, flags, repacked):
    """The last layer and the output on the device. Beside one, llama.cpp repacks the CPU's layers only with --no-host."""
    args = ["-ngl", 2, *flags.split()]
    placed = Placement(vulkan_build, demo[2], "-c", 256, *args)
    assert placed.offloaded == (2, LAYERS + 1) and placed.layers(7) == 1 and ("CPU_REPACK" in placed.buffers) == repacked, placed.log
    assert same_text(vulkan_build, demo[2], texts, *args)


def test_some_matrices_on_the_cpu(vulkan_build, demo, texts):
    """Those of the feed-forward networks, whose other side is longer."""
    args = ["-ngl", 99, "--override-tensor", "ffn_.*=CPU"]
    placed = Placement(vulkan_build, demo[2], "-c", 256, *args)
    assert placed.offloaded == (LAYERS + 1, LAYERS + 1) and placed.layers(4) == LAYERS, placed.log
    assert max(max(matrix) for matrix in placed.products) == 256
    assert same_text(vulkan_build, demo[2], texts, *args)


def test_logits(vulkan_build, demo, tmp_path):
    """KL divergence from upstream's F32 file, nats a token, on held-out text. Measured: 4e-5 for whole prompts, whose sums are float16, and
    less than 1e-6 for eight tokens at a time."""
    hf, f32, ours = demo
    (tmp_path / "text.txt").write_text((hf / "held_out.txt").read_text()[:12000])

    def perplexity(model, *args):
        return vulkan_build.run("llama-perplexity", "-m", model, "-f", tmp_path / "text.txt", "-c", 256, "-t", 2, "--kl-divergence-base",
                                tmp_path / "kld", "--chunks", 4, *args)  # fmt: skip

    perplexity(f32, "--device", "none")
    for args, most in ([], 2e-4), (["-b", 8, "--chunks", 1], 1e-5):
        text = perplexity(ours, "-ngl", 99, "--kl-divergence", *args)
        mean, top = (float(re.search(what + r" +([-0-9.e]+)", text)[1]) for what in ("Mean +KLD:", "Same top p:"))
        print(f"mean KL divergence {mean:.2e}, same top token {top:.2f} %")
        assert abs(mean) <= most and top >= 97, text


# ---- a device without enough memory ----


def test_layers_that_do_not_fit_stay_on_the_cpu(vulkan_build, demo, texts):
    """Unless -ngl says how many. A context of 8192 tokens needs 4 MiB a layer, beside 14 MiB."""
    (free,) = re.findall(r"Vulkan0: .*, (\d+) MiB free", vulkan_build.run("llama-completion", "--list-devices"))
    args = ["-c", 8192, "--fit-target", int(free) - 22]
    placed = Placement(vulkan_build, demo[2], *args)
    assert 0 < placed.offloaded[0] < LAYERS + 1 and placed.layers(7) == placed.offloaded[0] - 1, placed.log
    assert re.search(r"cannot meet free memory target of \d+ MiB, need to reduce device memory by \d+ MiB", placed.log)
    assert same_text(vulkan_build, demo[2], texts, *args)


def test_layers_that_were_asked_for_and_do_not_fit(vulkan_build, demo):
    """The tool ends with a message that names the device."""
    said = vulkan_build.run("llama-completion", "-m", demo[2], "-p", "def", "-n", 1, "-no-cnv", "-c", 8192, "-ngl", 99, code=1,
                            env={"GGML_VK_FORCE_MAX_BUFFER_SIZE": "8000000"})  # fmt: skip
    assert "ErrorOutOfDeviceMemory" in said and re.search(r"failed to allocate Vulkan0 buffer of size \d+", said), said


def test_matrices_too_large_for_a_buffer_stay_on_the_cpu(vulkan_build, demo, texts):
    """So do those whose results for 512 tokens, which llama.cpp reckons with, are too large: here the output and the networks'. With so
    small a limit flash attention crashes, whatever the type."""
    args, env = ["-ngl", 99, "-ub", 16, "-fa", "off"], {"GGML_VK_FORCE_MAX_BUFFER_SIZE": "1000000"}
    placed = Placement(vulkan_build, demo[2], "-c", 256, *args, **env)
    assert re.search(r"\(and 13 others\) cannot be used with preferred buffer type Vulkan\S*, using CPU instead", placed.log), placed.log
    assert placed.layers(4) == LAYERS and max(max(matrix) for matrix in placed.products) == 256, placed.log
    assert same_text(vulkan_build, demo[2], texts, *args, **env)
