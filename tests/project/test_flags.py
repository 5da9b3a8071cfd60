"""Every --flag that the documents name is one that its program takes: by the program's own --help."""

import functools
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ENV

from sherry_gguf import llama_cpp

REPO = Path(__file__).parents[2]
PLACES = "*.md", "docs/**/*.md", "examples/**/*.md", "ggml_patch/*.md"
DOCUMENTS = sorted(p for place in PLACES for p in REPO.glob(place))
VERBS = ("convert", "verify", "inspect", "retag", "transcode")
# Programs of which --help is not asked, and their flags that the documents may name.
FOREIGN = {
    "accelerate": {"--config_file"},  # one launcher of many, not installed
    "test.sh": set(),  # takes pytest's flags, and sets everything up first
    "setup.sh": set(),  # takes none
}
FLAG = re.compile(r"--[a-zA-Z][\w-]*")


@functools.cache
def commands() -> dict[str, list]:
    """The programs that the documents may name: how each is run."""
    python = [sys.executable]
    scripts = {p.name: p for p in (REPO / "scripts").rglob("*.py") if p.suffix in ("", ".py", ".sh") and p.is_file()}
    return {
        **{p.name: [p] for p in llama_cpp.tool("llama-cli").parent.iterdir()},
        **{name: [p] if p.suffix == ".sh" else [*python, p] for name, p in scripts.items() if name not in FOREIGN},
        **{f"sherry-gguf {verb}": [*python, "-m", "sherry_gguf.cli", verb] for verb in VERBS},
        "convert_hf_to_gguf.py": [*python, llama_cpp.source_dir() / "convert_hf_to_gguf.py"],
        "torchrun": [*python, "-m", "torch.distributed.run"],
    }


@functools.cache
def flags_of(program: str) -> set[str]:
    """What its --help lists as options: where a line begins with them, or in the brackets of its usage."""
    command = [*commands()[program], "--help-all" if program == "train_sherry.py" else "--help"]
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
            if program == "sherry-gguf":
                name = f"sherry-gguf {name}"
            if name in commands() or name in FOREIGN or name == "sherry-gguf":
                program = name
            elif FLAG.fullmatch(word[0]):
                found.append((text.count("\n", 0, at + word.start()) + 1, program, word[0]))

    at = 0
    for part in re.split(r"(^```[^\n]*\n.*?^```$)", text, flags=re.M | re.S):
        if not part.startswith("```"):
            for span in re.finditer(r"`([^`]+)`", part):
                read(span[1], at + span.start(1))
        elif not part.startswith("```python\n"):
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
    return [f"{where}: {f'{program} does not take' if program else 'no program that the documents name takes'} {flag}"
            for where, program, flag in found
            if (flag not in known[program] if program else flag in lone)]  # fmt: skip


def test_the_documents_flags():
    assert not wrong({str(p.relative_to(REPO)): p.read_text("utf-8") for p in DOCUMENTS})


@pytest.mark.parametrize(
    "text, told",
    [
        ("`--no-such-flag`", "no program that the documents name takes --no-such-flag"),
        ("`llama-cli`, `--perplexity`", "no program that the documents name takes --perplexity"),
        ("`llama-cli -m x --pure`", "llama-cli does not take --pure"),
        ("in `build/bin/llama-quantize --pure\n--mlock a`", "llama-quantize does not take --mlock"),
        ("```\n$ .venv/bin/sherry-gguf retag a b --to x   # too\n```\n", "sherry-gguf retag does not take --to"),
        ("```\n$ build/bin/llama-cli -m a \\\n  --seconds 5\n```\n", "llama-cli does not take --seconds"),
        ("```\n$ build/bin/llama-cli --no-mmap 5\n```\n", "llama-cli does not take --no-mmap"),
        ("```\n$ accelerate launch --cpu scripts/fuzz.py --seconds 1\n```\n", "accelerate does not take --cpu"),
        ("```\n$ build/bin/llama-cli --no-repack 5\n$ scripts/fuzz.py --no-repack\n```\n", "fuzz does not take --no-repack"),
    ],
)
def test_a_wrong_flag_is_found(text, told):
    """After a right one, and with the number of its line."""
    text = "`scripts/fuzz.py --seconds 3`\n\n" + text
    lines = [i for i, line in enumerate(text.splitlines(), 1) if told.rpartition(" ")[2] in line]
    assert wrong({"a.md": text}) == [f"a.md:{lines[-1]}: {told}"]
