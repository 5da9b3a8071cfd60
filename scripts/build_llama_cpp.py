#!/usr/bin/env python3
"""Fetch the pinned llama.cpp, patch it with TQ1_25, configure it and build its tools.

usage: scripts/build_llama_cpp.py [CMAKE_ARG ...]      such as -DGGML_NATIVE=OFF

Fills build/llama.cpp (patched source), build/bin (tools) and build/lib (shared libraries). Every step is skipped where
its result is there already, and an interrupted run goes on where it stopped.

Compilations are kept by ccache or sccache where one is installed.

environment:
  LLAMA_CPP_SRC     a llama.cpp checkout to copy instead of fetching the pinned one; it is not changed
  SHERRY_BUILD_DIR  the build directory, instead of build/
"""

from __future__ import annotations

import fcntl
import filecmp
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

try:
    from tqdm import tqdm
except ImportError:
    sys.exit(
        "build_llama_cpp: the Python environment is not set up: run scripts/setup.sh, then .venv/bin/python scripts/build_llama_cpp.py"
    )

REPO = Path(__file__).resolve().parent.parent
PATCH = REPO / "ggml_patch"
BUILD = Path(os.environ.get("SHERRY_BUILD_DIR") or REPO / "build").resolve()
SOURCE = BUILD / "llama.cpp"
TOOLS = {  # in build/bin: upstream's CMake target
    name: name
    for name in (
        "llama-cli llama-completion llama-bench llama-quantize llama-perplexity llama-imatrix llama-server "
        "test-backend-ops test-quantize-fns"
    ).split()
} | {"rpc-server": "ggml-rpc-server"}


class Failure(Exception):
    """What stopped the build, for the user."""


def say(message: str) -> None:
    print(f"llama.cpp: {message}", flush=True)


def environment() -> dict[str, str]:
    """For the tools that are run. Their cmake and ninja are this Python environment's, whether or not it is activated."""
    env = {k: v for k, v in os.environ.items() if k not in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")}
    # Without the ceiling git would take the tree for a part of this repository: it would patch nothing, and llama.cpp
    # would show this repository's commit as its own.
    env["GIT_CEILING_DIRECTORIES"] = str(BUILD)
    env.setdefault("CCACHE_BASEDIR", str(BUILD))  # so that a file is the same in any build directory
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)])
    return env


def upstream() -> dict[str, str]:
    lines = (PATCH / "UPSTREAM").read_text().splitlines()
    return dict(re.split(r"\s*=\s*", line, maxsplit=1) for line in lines if line and not line.startswith("#"))


def fetch(pin: dict[str, str]) -> Path:
    """The source distribution, downloaded once and checked every time."""
    folder = BUILD / "download"
    archive = folder / f"{pin['package'].replace('-', '_')}-{pin['version']}.tar.gz"
    if not archive.exists():
        say(f"downloading {pin['package']} {pin['version']} (73 MB)")
        partial = folder / "partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        wanted = partial / "requirement.txt"  # with the hash, so that pip checks it before it runs any of it
        wanted.write_text(f"{pin['package']}=={pin['version']} --hash=sha256:{pin['sha256']}\n")
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-qq",
            "--disable-pip-version-check",
            "--no-deps",
            "--no-binary",
            pin["package"],
            "-d",
            str(partial),
            "--require-hashes",
            "-r",
            str(wanted),
        ]
        if subprocess.run(command).returncode:
            raise Failure(f"pip could not download {pin['package']} {pin['version']}: see its message above")
        (partial / archive.name).rename(archive)
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != pin["sha256"]:
        archive.unlink()
        raise Failure(f"{archive.name} has sha256 {digest}, ggml_patch/UPSTREAM says {pin['sha256']}; removed it, run again")
    return archive


def unpack(pin: dict[str, str], target: Path) -> str:
    """Put pristine llama.cpp into `target`; return where it came from."""
    own = os.environ.get("LLAMA_CPP_SRC")
    if own:
        if not (Path(own) / "ggml" / "include" / "ggml.h").is_file():
            raise Failure(f"LLAMA_CPP_SRC={own} is not a llama.cpp checkout: it has no ggml/include/ggml.h")
        say(f"copying {own}")

        def not_source(folder: str, names: list[str]) -> set[str]:
            return {n for n in names if n == ".git" or (Path(folder) / n / "CMakeCache.txt").exists()}

        shutil.copytree(own, target, symlinks=True, ignore=not_source)
        return own
    archive = fetch(pin)
    say("unpacking")
    prefix = f"{archive.name.removesuffix('.tar.gz')}/{pin['path']}/"
    with tarfile.open(archive) as tar:
        members = [m for m in tar if m.name.startswith(prefix) and (m.isfile() or m.isdir())]
        for member in members:
            member.name = member.name.removeprefix(prefix)
            if member.name == ".git":  # a submodule's pointer to a repository that is not there
                continue
            if ".." in Path(member.name).parts or Path(member.name).is_absolute():
                raise Failure(f"{archive.name} holds the path {member.name}")
            tar.extract(member, target, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return f"{pin['package']} {pin['version']}"


def apply_hooks(pin: dict[str, str], tree: Path, origin: str) -> None:
    result = subprocess.run(["git", "apply", str(PATCH / "hooks.patch")], cwd=tree, env=environment(), capture_output=True, text=True)
    if result.returncode == 0:
        return
    hunks = "".join(f"\n  {file}, the hunk at line {line}" for file, line in re.findall(r"patch failed: (.*):(\d+)", result.stderr))
    raise Failure(
        f"ggml_patch/hooks.patch does not apply to {origin}:{hunks or ' ' + result.stderr.strip()}\n"
        f"  It is made for llama.cpp {pin['commit'][:9]} (ggml {pin['ggml']}). ggml_patch/README.md says how to move it."
    )


def kind(path: Path) -> str:
    return "link" if path.is_symlink() else "directory" if path.is_dir() else "file" if path.exists() else ""


def sync(source: Path, target: Path) -> None:
    """Make `target` equal to `source`, leaving files that are equal already untouched, so that ninja rebuilds no more than it must."""
    target.mkdir(parents=True, exist_ok=True)
    for entry in target.iterdir():
        if kind(entry) != kind(source / entry.name):
            shutil.rmtree(entry) if kind(entry) == "directory" else entry.unlink()
    for entry in source.iterdir():
        ours = target / entry.name
        if entry.is_symlink():
            ours.unlink(missing_ok=True)
            ours.symlink_to(os.readlink(entry))
        elif entry.is_dir():
            sync(entry, ours)
        elif not ours.exists() or not filecmp.cmp(entry, ours, shallow=False):
            partial = ours.with_name(ours.name + ".partial")
            shutil.copyfile(entry, partial)
            shutil.copymode(entry, partial)
            partial.replace(ours)


def state_of(tree: Path) -> str:
    """Every file of a tree with its size and time: what tells that somebody has been there."""
    digest = hashlib.sha256()
    for path in sorted(tree.rglob("*")):
        if not path.is_dir() and "__pycache__" not in path.parts:
            status = path.lstat()
            digest.update(f"{path.relative_to(tree)} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def patched_source() -> None:
    pin = upstream()
    wanted = hashlib.sha256()
    for file in PATCH / "UPSTREAM", PATCH / "hooks.patch", *sorted(path for path in (PATCH / "src").rglob("*") if path.is_file()):
        wanted.update(str(file.relative_to(PATCH)).encode() + b"\0" + file.read_bytes() + b"\0")
    own = os.environ.get("LLAMA_CPP_SRC", "")
    stamp = BUILD / "llama.cpp.stamp"
    # one's own checkout is looked at anew each time: it may have changed
    if not own and stamp.exists() and stamp.read_text() == f"{wanted.hexdigest()} {state_of(SOURCE)}":
        say("the patched source is up to date")
        return
    stamp.unlink(missing_ok=True)
    fresh = BUILD / "llama.cpp.fresh"
    shutil.rmtree(fresh, ignore_errors=True)
    origin = unpack(pin, fresh)
    say("patching")
    apply_hooks(pin, fresh, origin)
    shutil.copytree(PATCH / "src", fresh / "ggml" / "src" / "sherry")
    sync(fresh, SOURCE)
    shutil.rmtree(fresh)
    if not own:
        stamp.write_text(f"{wanted.hexdigest()} {state_of(SOURCE)}")


def last_lines(log: Path, count: int = 25) -> str:
    lines = log.read_text(errors="replace").splitlines()
    failed = next((i for i, line in enumerate(lines) if line.startswith(("FAILED:", "CMake Error"))), None)
    return "\n".join(lines[failed : failed + count] if failed is not None else lines[-count:])


def configure(arguments: list[str], env: dict[str, str]) -> None:
    pin = upstream()
    command = [
        "cmake", "-G", "Ninja", "-S", str(SOURCE), "-B", str(BUILD / "cmake"), "-DCMAKE_BUILD_TYPE=Release",
        "-DCMAKE_BUILD_RPATH_USE_ORIGIN=ON", "-DBUILD_SHARED_LIBS=ON", "-DGGML_RPC=ON", "-DGGML_CCACHE=OFF",
        "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_APP=OFF", "-DLLAMA_USE_PREBUILT_UI=OFF",
        f"-DLLAMA_BUILD_COMMIT={pin['commit'][:9]}", "-DLLAMA_BUILD_NUMBER=0",
        *arguments,
    ]  # fmt: skip
    stamp = BUILD / "cmake.stamp"
    if cache := next(filter(None, (shutil.which(name, path=env["PATH"]) for name in ("ccache", "sccache"))), ""):
        command.append(f"-DCMAKE_C_COMPILER_LAUNCHER={cache}")
        command.append(f"-DCMAKE_CXX_COMPILER_LAUNCHER={cache}")
    heeded = [f"{k}={v}" for k, v in sorted(env.items()) if k.startswith("CMAKE_") or k in ("CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS")]
    wanted = "\n".join([shutil.which("cmake", path=env["PATH"]) or "cmake", *command, *heeded])
    if (BUILD / "cmake" / "build.ninja").exists() and stamp.exists() and stamp.read_text() == wanted:
        return
    say("configuring")
    stamp.unlink(missing_ok=True)
    (BUILD / "cmake" / "CMakeCache.txt").unlink(missing_ok=True)
    for library in (BUILD / "cmake" / "bin").glob("libggml-*"):  # maybe of variants that are no longer asked for
        library.unlink()
    log = BUILD / "configure.log"
    with log.open("w") as output:
        if subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=env).returncode:
            raise Failure(f"cmake failed ({log}):\n{last_lines(log)}")
    stamp.write_text(wanted)


def build(tools: dict[str, str], env: dict[str, str]) -> None:
    log = BUILD / "build.log"
    command = ["cmake", "--build", str(BUILD / "cmake"), "--target", *tools.values()]
    env = env | {"NINJA_STATUS": "[%f/%t] "}
    started = time.monotonic()
    with log.open("w") as output, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env) as ninja:
        bar = tqdm(desc="llama.cpp: building", unit="step", disable=None, mininterval=1)
        told = 0
        for line in ninja.stdout:
            output.write(line)
            done = re.match(r"\[(\d+)/(\d+)\]", line)
            if done:
                bar.total = int(done[2])
                bar.update(int(done[1]) - bar.n)
                if bar.disable and int(done[1]) * 10 // bar.total > told:  # no terminal: a line each tenth
                    told = int(done[1]) * 10 // bar.total
                    say(f"building, {done[1]} of {done[2]} steps, {time.monotonic() - started:.0f} s")
        bar.close()
    if ninja.returncode:
        raise Failure(f"the build failed ({log}):\n{last_lines(log)}")


def publish(tools: dict[str, str]) -> None:
    """Give the tools and libraries their fixed places, as relative links."""
    made = BUILD / "cmake" / "bin"
    libraries = [p.name for p in made.iterdir() if re.search(r"\.(so|dylib)(\.|$)", p.name)]
    for folder, names in ("bin", tools), ("lib", {name: name for name in libraries}):
        (BUILD / folder).mkdir(exist_ok=True)
        for old in (BUILD / folder).iterdir():
            if old.is_symlink() and old.name not in names:
                old.unlink()
        for name, target in names.items():
            link, to = BUILD / folder / name, Path("..", "cmake", "bin", target)
            if not (link.is_symlink() and Path(os.readlink(link)) == to):
                link.unlink(missing_ok=True)
                link.symlink_to(to)


def main() -> None:
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        print(__doc__.strip())
        return
    if any(not a.startswith("-") for a in arguments):
        raise Failure(f"unexpected arguments {arguments}; CMake's begin with a dash, --help says more")
    tools = dict(TOOLS)
    if "-DGGML_BACKEND_DL=ON" in arguments:
        del tools["test-quantize-fns"]  # it links to ggml-cpu, which there is one of many that are loaded
    env = environment()
    for program in "git", "cmake", "ninja":
        if not shutil.which(program, path=env["PATH"]):
            raise Failure(f"{program} is not there: {'install it' if program == 'git' else 'run scripts/setup.sh'}")
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another build in the same directory")
            fcntl.flock(lock, fcntl.LOCK_EX)
        patched_source()
        configure(arguments, env)
        build(tools, env)
        publish(tools)
    say(f"ready in {BUILD / 'bin'}")


if __name__ == "__main__":
    try:
        main()
    except Failure as failure:
        sys.exit(f"build_llama_cpp: {failure}")
    except OSError as error:
        sys.exit(f"build_llama_cpp: {error}")
    except KeyboardInterrupt:
        sys.exit("build_llama_cpp: interrupted; run it again to go on")
