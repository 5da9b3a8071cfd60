"""What the documents name exists: links and anchors, paths, programs, and flags, by each program's own --help."""

import functools
import json
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ENV
from real_models_report import table

from sherry_gguf import llama_cpp
from sherry_gguf.cli import VERBS
from sherry_gguf.gguf_tools import TOOLS

REPO = Path(__file__).parents[2]
PLACES = "*.md", "docs/**/*.md", "examples/**/*.md", "ggml_patch/*.md", ".github/**/*.md"
DOCUMENTS = sorted(p for place in PLACES for p in REPO.glob(place))
TABLES = sorted(REPO.glob("scripts/results/*.md"))
# Programs whose --help is not asked, and the flags of theirs that the documents may name.
FOREIGN = {
    "accelerate": {"--config_file"},  # one launcher of many, not installed
    "test.sh": {"--fast"},  # takes pytest's flags too, and sets everything up first
    "setup.sh": set(),  # takes none
    "pip": {"--no-index", "--find-links", "--no-cache-dir"},
    **dict.fromkeys(("adb", "apt-get", "cd", "clang-format", "git", "pytest", "ruff", "mypy"), set()),
}
FLAG = re.compile(r"--[a-zA-Z][\w-]*")
FENCE = re.compile(r"^ *```[^\n]*\n.*?^ *```$", re.M | re.S)


def texts() -> dict[str, str]:
    return {str(p.relative_to(REPO)): p.read_text("utf-8") for p in DOCUMENTS}


def test_the_documents_are_there():
    assert {"README.md", "CONTRIBUTING.md", "docs/format.md", "ggml_patch/README.md"} <= texts().keys()
    assert (REPO / "README.md").read_text("utf-8").count("\n") <= 200
    assert FOREIGN["test.sh"] <= set(FLAG.findall((REPO / "scripts" / "test.sh").read_text("utf-8")))


def test_the_speeds_of_the_front_page():
    """README's table and chart show the run in scripts/results/llama-1b.json."""
    report = json.loads((REPO / "scripts" / "results" / "llama-1b.json").read_text())
    readme, chart = (REPO / "README.md").read_text("utf-8"), (REPO / "docs" / "speed.svg").read_text("utf-8")
    for name, facts in report["models"]["1b"]["types"].items():
        row = next(line.replace("*", "") for line in readme.splitlines() if line.replace("*", "").startswith(f"| {name} |"))
        rates = [statistics.median(e["rates"]) for kind in ("pp", "tg") for e in report["speed"] if (e["type"], e["kind"]) == (name, kind)]
        bits, size, *shown = (float(cell) for cell in row.split("|")[2:-1])
        assert (bits, size) == (round(facts["bits_per_weight"], 3), round(facts["bytes"] / 2**20)) and len(rates) == 2
        assert shown == [float(f"{rate:.3g}") for rate in rates]
        assert all(f"> {rate:.0f}</text>" in chart for rate in rates) and f">{name}, {bits:.4g} bits</text>" in chart


def test_the_table_of_the_real_model():
    """docs/benchmarks.md and the study's own table show scripts/results/real-gemma.json."""
    results = REPO / "scripts" / "results" / "real-gemma.json"
    shown = table(json.loads(results.read_text()))
    assert results.with_suffix(".md").read_text("utf-8") == shown
    section = (REPO / "docs" / "benchmarks.md").read_text("utf-8").partition("\n### A real model\n")[2].partition("\n#")[0]
    documented, wanted = ([line.split(" | ") for line in text.splitlines() if line.startswith("| ")][1:] for text in (section, shown))
    assert len(documented) == len(wanted)
    for cells, (*facts, _, decode, prompt) in zip(documented, wanted, strict=True):
        assert cells == [*facts, decode, prompt]


# ---- links ----


def anchors(text: str) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    found: set[str] = set()
    for title in re.findall(r"^#+ (.*?)#*$", FENCE.sub("", text), re.M):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        found.add(next(s for s in (slug, *(f"{slug}-{i}" for i in range(1, 99))) if s not in found))
    return found


def broken_links(path: Path, text: str) -> list[str]:
    """Relative links of a document to a file or an anchor that is not there."""
    prose = re.sub(r"(`+)[^`\n]*\1", "", FENCE.sub("", text))
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose) + re.findall(r"^\[[^]]+\]: (\S+)", prose, re.M):
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        if re.match(r"\w+:", link):
            continue
        if target != path and not (target.exists() and target.is_relative_to(REPO)):
            broken.append(f"{path.relative_to(REPO)}: {link} is not there")
        elif anchor and anchor not in anchors(text if target == path else target.read_text("utf-8")):
            broken.append(f"{path.relative_to(REPO)}: {link} has no such heading")
    return broken


def test_links():
    assert not [line for p in DOCUMENTS + TABLES for line in broken_links(p, p.read_text("utf-8"))]


@pytest.mark.parametrize(
    "text, count",
    [
        ("[a](README.md) [b](docs/) [c](https://x.y/z) `[d](no)` ![e](docs/speed.svg)", 0),
        ("# A b: `c`-d\n[a](#a-b-c-d) [b](#a-b)", 1),
        ("# A\n# A\n```\n# B\n```\n[a](#a-1) [b](#b)", 1),
        ("[a](nothing.md) [b](docs/format.md#nothing) [c](../outside)", 3),
    ],
)
def test_a_broken_link_is_found(text, count):
    assert len(broken_links(REPO / "a.md", text)) == count


# ---- commands and paths ----


def command_lines(text: str) -> list[tuple[int, str]]:
    """(line, command) of each command block. A block without a language holds commands, or a session that marks them by "$ "."""
    found = []
    for block in FENCE.finditer(text):
        language, _, body = block[0].partition("\n")
        if language.strip() != "```":
            continue
        first = text.count("\n", 0, block.start()) + 2
        session = re.search(r"^ *\$ ", body, re.M)
        for line in re.finditer(r"(?:[^\n]*\\\n)*[^\n]*\n", body.rpartition("\n")[0] + "\n"):
            command = line[0].replace("\\\n", " ").partition(" # ")[0].strip()
            if command.startswith("$ ") or (command and not session and not command.startswith("#")):
                found.append((first + body.count("\n", 0, line.start()), command.removeprefix("$ ")))
    return found


def missing(where: str, word: str) -> list[str]:
    """`word` if it names a file of this repository or of its .venv and build that is not there."""
    path = word.removeprefix("./").rstrip(".,:")
    if path.startswith(".venv/bin/"):
        there = (Path(sys.executable).parent / path.removeprefix(".venv/bin/")).exists() or path.endswith("/accelerate")
    elif path.startswith("build/bin/"):
        there = (llama_cpp.tool("llama-cli").parent / path.removeprefix("build/bin/")).exists()
    elif re.match(r"(sherry_gguf|ggml_patch|scripts|tests|examples|docs|\.ci|\.github)/", path):
        path = re.sub(r"(?<![A-Z])(NAME|ARCH|BACKEND)(?![A-Z])", "*", re.sub(r"::.*|:\d+$", "", path))  # the checklists' placeholders
        places = REPO, llama_cpp.source_dir()  # as ggml_patch/README.md names upstream's; --out takes a name without its ending
        there = any(True for place in places for name in (path, f"{path}.md") for _ in place.glob(name.rstrip("/")))
    else:
        return []
    return [] if there else [f"{where}: {word} is not there"]


def unknown(name: str, text: str) -> list[str]:
    """Programs of command blocks, and paths there and in code spans, that are not there: a line each."""
    found = []
    for line, command in command_lines(text):
        where = f"{name}:{line}"
        words = [w for w in re.split(r"[\s'\"]+", re.sub(r"^([A-Z_]+=\S+ +)+", "", command)) if w]  # what it sets may be anywhere
        program = words[0].rpartition("/")[2]
        if "/" not in words[0] and program not in (*FOREIGN, "sherry-gguf"):  # which a wheel brings
            found.append(f"{where}: {words[0]} is not a program that the documents may name")
        if program == "sherry-gguf" and words[1] not in {*VERBS, "--help"}:
            found.append(f"{where}: sherry-gguf has no {words[1]}")
        for word in words:
            found += missing(where, word)
    prose = FENCE.sub(lambda block: "\n" * block[0].count("\n"), text)
    for span in re.finditer(r"`([^`\n]+)`", prose):
        for word in span[1].split():
            found += missing(f"{name}:{prose.count(chr(10), 0, span.start()) + 1}", word)
    return found


def test_programs_and_paths():
    assert not [line for name, text in texts().items() for line in unknown(name, text)]


@pytest.mark.parametrize(
    "text, said",
    [
        ("```\n.venv/bin/python scripts/fuzz.py\n./scripts/test.sh  # all\n```\n", []),
        ("```\n$ .venv/bin/sherry-gguf verify a b\nanything\n```\n", []),
        ("```text\nno-such-program\n```\n", []),
        ("1. a\n\n   ```\n   no-such-program a\n   ```\n", ["a.md:4: no-such-program is not a program that the documents may name"]),
        ("```\nsherry-gguf verify a b\nverify a b\n```\n", ["a.md:3: verify is not a program that the documents may name"]),
        ("```\n.venv/bin/sherry-gguf evict a\n```\n", ["a.md:2: sherry-gguf has no evict"]),
        ("```\n\nbuild/bin/llama-nothing a\n```\n", ["a.md:3: build/bin/llama-nothing is not there"]),
        ("```\nCC=gcc .venv/bin/python \\\n  scripts/nothing.py\n```\n", ["a.md:2: scripts/nothing.py is not there"]),
        ("see `tests/nothing/test_a.py`, `docs/*.md`", ["a.md:1: tests/nothing/test_a.py is not there"]),
    ],
)
def test_an_unknown_program_is_found(text, said):
    assert unknown("a.md", text) == said


# ---- flags ----


@functools.cache
def commands() -> dict[str, list]:
    """The programs that the documents may name: how each is run."""
    python = [sys.executable]
    scripts = {p.name: p for suffix in ("py", "sh") for p in sorted((REPO / "scripts").rglob(f"*.{suffix}"))}
    return {
        **{p.name: [p] for p in llama_cpp.tool("llama-cli").parent.iterdir()},
        **{name: [p] if p.suffix == ".sh" else [*python, p] for name, p in scripts.items() if name not in FOREIGN},
        **{f"sherry-gguf {verb}": [*python, "-m", "sherry_gguf.cli", verb] for verb in VERBS},
        **{f"sherry-gguf gguf {tool}": [*python, "-m", "sherry_gguf.cli", "gguf", tool] for tool in TOOLS},
        "sherry-gguf run": [*python, "-m", "sherry_gguf.cli", "run", "model.gguf", "-p", "x"],  # both show their tool's help
        "sherry-gguf serve": [*python, "-m", "sherry_gguf.cli", "serve", "model.gguf"],
        "convert_hf_to_gguf.py": [*python, llama_cpp.source_dir() / "convert_hf_to_gguf.py"],
        "torchrun": [*python, "-m", "torch.distributed.run"],
    }


@functools.cache
def flags_of(program: str) -> set[str]:
    """What its --help lists as options: where a line begins with them, or in the brackets of its usage."""
    command = [
        *commands()[program],
        "--help-all" if program in ("train_sherry.py", "sherry-gguf train", "sherry-gguf finetune") else "--help",
    ]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=ENV)
    text = done.stdout + done.stderr
    assert len(text) > 20, f"{program} --help says {text!r}, exit code {done.returncode}"
    lines = re.findall(r"^ {0,4}(-[^ ].*?)(?=:| {2,}(?!the argument has been removed)|$)", text, re.M)
    return {"--help", *FLAG.findall("\n".join([*lines, *re.findall(r"\[[^]]*", text)]))}


def mentions(text: str) -> list[tuple[int, str | None, str]]:
    """(line, program or None, flag) for each flag in command blocks and code spans; a program stands before its flags."""
    found = []

    def read(words: str, at: int):
        program = None
        for word in re.finditer(r"[^\s'\"`,;()=]+", words):
            name = word[0].rpartition("/")[2]
            if (program, name) == ("torchrun", "sherry_gguf"):  # torchrun -m sherry_gguf VERB
                name = "sherry-gguf"
            if program in ("sherry-gguf", "sherry-gguf gguf"):
                name = f"{program} {name}"
            if name in commands() or name in FOREIGN or name == "sherry-gguf":
                program = name
            elif FLAG.fullmatch(word[0]):
                found.append((text.count("\n", 0, at + word.start()) + 1, program, word[0]))

    at = 0
    for part in re.split(rf"({FENCE.pattern})", text, flags=re.M | re.S):
        if not part.lstrip(" ").startswith("```"):
            for span in re.finditer(r"`([^`]+)`", part):
                read(span[1], at + span.start(1))
        elif part.lstrip(" ").startswith("```\n"):
            for line in re.finditer(r"(?:[^\n]*\\\n)*[^\n]*\n", part):  # a command may go on
                read(line[0], at + line.start())
        at += len(part)
    return found


def wrong(texts: dict[str, str]) -> list[str]:
    """Of documents by name, the flags that their program does not take, or no program that they name: a line each."""
    found = [(f"{name}:{line}", *rest) for name, text in texts.items() for line, *rest in mentions(text)]
    programs = {p for _, p, _ in found if p in commands()}
    with ThreadPoolExecutor(2) as pool:  # some import PyTorch for it, which takes seconds
        known = dict(zip(programs, pool.map(flags_of, programs))) | FOREIGN | {"sherry-gguf": {"--help"}}
    lone = {flag for _, p, flag in found if p is None}.difference(*known.values())
    everything = "\n".join(texts.values())
    for program in commands():  # the quick ones are first, and mostly enough
        name = re.escape(program.split()[-1])
        if lone and program not in known and re.search(rf"(?<![\w-]){name}(?![\w-])", everything):
            lone -= flags_of(program)
    return [
        f"{where}: {f'{program} does not take' if program else 'no program that the documents name takes'} {flag}"
        for where, program, flag in found
        if (flag not in known[program] if program else flag in lone)
    ]


@pytest.mark.slow
def test_the_documents_flags():
    assert not wrong(texts())


@pytest.mark.parametrize(
    "text, says",
    [
        ("`--no-such-flag`", "no program that the documents name takes --no-such-flag"),
        ("`llama-cli`, `--perplexity`", "no program that the documents name takes --perplexity"),
        ("`llama-cli -m x --pure`", "llama-cli does not take --pure"),
        ("in `build/bin/llama-quantize --pure\n--mlock a`", "llama-quantize does not take --mlock"),
        ("```\n$ .venv/bin/sherry-gguf retag a b --to x   # too\n```\n", "sherry-gguf retag does not take --to"),
        ("```\n$ build/bin/llama-cli -m a \\\n  --seconds 5\n```\n", "llama-cli does not take --seconds"),
        ("```\n$ build/bin/llama-cli --no-mmap 5\n```\n", "llama-cli does not take --no-mmap"),
        ("```\n$ accelerate launch --cpu scripts/fuzz.py --seconds 1\n```\n", "accelerate does not take --cpu"),
        ("```\n$ build/bin/llama-cli --no-repack 5\n$ scripts/fuzz.py --no-repack\n```\n", "fuzz.py does not take --no-repack"),
    ],
)
def test_a_wrong_flag_is_found(text, says):
    """After a right one, and with the number of its line."""
    text = "`scripts/fuzz.py --seconds 3`\n\n" + text
    lines = [i for i, line in enumerate(text.splitlines(), 1) if says.rpartition(" ")[2] in line]
    assert wrong({"a.md": text}) == [f"a.md:{lines[-1]}: {says}"]
