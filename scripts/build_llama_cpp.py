#!/usr/bin/env python3
"""Fetch the pinned llama.cpp, patch it with TQ1_25, and build its tools and libraries.

Fills build/llama.cpp (patched source), build/bin (tools) and build/lib (shared libraries). Skips steps that are done, so that
an interrupted run continues where it stopped. Uses ccache or sccache if one is installed.

environment:
  LLAMA_CPP_SRC     copy this llama.cpp checkout instead of fetching the
                    pinned one; it stays unchanged
  SHERRY_BUILD_DIR  the build directory (default: build)
  SHERRY_VULKAN     1: as --vulkan, also for scripts that call this one;
                    0: without, unless --vulkan is given
"""

import argparse
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
    from filelock import FileLock, Timeout
    from tqdm import tqdm

    from sherry_gguf.errors import Stop
    from sherry_gguf.programs import Help, compiler_cache, run
except ImportError as error:
    sys.exit(f"build_llama_cpp.py: {error}: run scripts/setup.sh, then .venv/bin/python scripts/build_llama_cpp.py")

REPO = Path(__file__).resolve().parent.parent
sys.path.append(str(REPO / "scripts" / "build"))
import vulkan

PATCH = REPO / "ggml_patch"
BUILD = Path(os.environ.get("SHERRY_BUILD_DIR") or REPO / "build").resolve()
SOURCE = BUILD / "llama.cpp"
NAMES = (
    "llama-cli llama-completion llama-bench llama-quantize llama-perplexity llama-imatrix llama-server test-backend-ops test-quantize-fns"
)
TOOLS = {name: name for name in NAMES.split()} | {"rpc-server": "ggml-rpc-server"}  # in build/bin: upstream's CMake target


def say(message: str) -> None:
    print(f"llama.cpp: {message}", flush=True)


def environment() -> dict[str, str]:
    """The environment of every tool we run; cmake and ninja are this Python environment's, activated or not."""
    env = {k: v for k, v in os.environ.items() if k not in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")}
    # Without the ceiling git would think the tree is part of this repository: it would patch nothing, and llama.cpp would report this
    # repository's commit.
    env["GIT_CEILING_DIRECTORIES"] = str(BUILD)
    env.setdefault("CCACHE_BASEDIR", str(BUILD))  # cache hits in any build directory
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)])
    return env


def upstream() -> dict[str, str]:
    lines = (PATCH / "UPSTREAM").read_text().splitlines()
    return dict(re.split(r"\s*=\s*", line, maxsplit=1) for line in lines if line and not line.startswith("#"))


def fetch(pin: dict[str, str]) -> Path:
    """Download the source distribution once; check its hash every time. Raises Stop."""
    folder = BUILD / "download"
    archive = folder / f"{pin['package'].replace('-', '_')}-{pin['version']}.tar.gz"
    if not archive.exists():
        say(f"downloading {pin['package']} {pin['version']} (73 MB)")
        partial = folder / "partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        wanted = partial / "requirement.txt"  # has the hash, which pip checks before it runs any of the package
        wanted.write_text(f"{pin['package']}=={pin['version']} --hash=sha256:{pin['sha256']}\n")
        pip = [sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check", "--no-deps", "--no-binary", pin["package"]]
        if subprocess.run([*pip, "-d", str(partial), "--require-hashes", "-r", str(wanted)]).returncode:
            raise Stop(f"pip could not download {pin['package']} {pin['version']}: see its message above")
        (partial / archive.name).rename(archive)
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != pin["sha256"]:
        archive.unlink()
        raise Stop(f"{archive.name} has sha256 {digest}, ggml_patch/UPSTREAM says {pin['sha256']}; removed it, run again")
    return archive


def unpack(pin: dict[str, str], target: Path) -> str:
    """Put pristine llama.cpp into `target` and return its origin. Raises Stop."""
    if own := os.environ.get("LLAMA_CPP_SRC"):
        if not (Path(own) / "ggml" / "include" / "ggml.h").is_file():
            raise Stop(f"LLAMA_CPP_SRC={own} is not a llama.cpp checkout: it has no ggml/include/ggml.h")
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
            if member.name == ".git":  # a submodule's pointer to a missing repository
                continue
            if ".." in Path(member.name).parts or Path(member.name).is_absolute():
                raise Stop(f"{archive.name} holds the path {member.name}, which leads out of it")
            tar.extract(member, target, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return f"{pin['package']} {pin['version']}"


def apply_hooks(pin: dict[str, str], tree: Path, origin: str) -> None:
    result = subprocess.run(["git", "apply", str(PATCH / "hooks.patch")], cwd=tree, env=environment(), capture_output=True, text=True)
    if result.returncode == 0:
        return
    hunks = "".join(f"\n  {file}, the hunk at line {line}" for file, line in re.findall(r"patch failed: (.*):(\d+)", result.stderr))
    raise Stop(
        f"ggml_patch/hooks.patch does not apply to {origin}:{hunks or ' ' + result.stderr.strip()}\n"
        f"  It was made for llama.cpp {pin['commit'][:9]} (ggml {pin['ggml']}). ggml_patch/README.md says how to move it."
    )


def kind(path: Path) -> str:
    return "link" if path.is_symlink() else "directory" if path.is_dir() else "file" if path.exists() else ""


def sync(source: Path, target: Path) -> None:
    """Make `target` equal to `source` without touching equal files, so that ninja rebuilds only what changed."""
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
    """A hash of every file's name, size and time, which changes when somebody edits the tree."""
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
    # a user's own checkout may have changed since
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


def first_error(log: Path, count: int = 25) -> str:
    """The lines from the first failure on, or the last ones."""
    lines = log.read_text(errors="replace").splitlines()
    failed = next((i for i, line in enumerate(lines) if line.startswith(("FAILED:", "CMake Error"))), None)
    return "\n".join(lines[failed : failed + count] if failed is not None else lines[-count:])


def configuration(arguments: list[str], env: dict[str, str]) -> tuple[list[str], str]:
    """The command that configures the build, and what its result depends on, which the stamp keeps."""
    pin = upstream()
    command = [
        "cmake", "-G", "Ninja", "-S", str(SOURCE), "-B", str(BUILD / "cmake"), "-DCMAKE_BUILD_TYPE=Release",
        "-DCMAKE_BUILD_RPATH_USE_ORIGIN=ON", "-DBUILD_SHARED_LIBS=ON", "-DGGML_RPC=ON", "-DGGML_CCACHE=OFF",
        "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_APP=OFF", "-DLLAMA_USE_PREBUILT_UI=OFF",
        f"-DLLAMA_BUILD_COMMIT={pin['commit'][:9]}", "-DLLAMA_BUILD_NUMBER=0",
        *compiler_cache(env), *arguments,
    ]  # fmt: skip
    names = ("CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS", "VULKAN_SDK")
    variables = [f"{k}={v}" for k, v in sorted(env.items()) if k.startswith("CMAKE_") or k in names]
    shaders = [compiler] if (compiler := vulkan.shader_compiler(arguments, env)) else []
    return command, "\n".join([shutil.which("cmake", path=env["PATH"]) or "cmake", *command, *variables, *shaders])


def is_configured(arguments: list[str], env: dict[str, str]) -> bool:
    stamp = BUILD / "cmake.stamp"
    return (BUILD / "cmake" / "build.ninja").exists() and stamp.exists() and stamp.read_text() == configuration(arguments, env)[1]


def configure(arguments: list[str], env: dict[str, str]) -> None:
    say("configuring")
    command, wanted = configuration(arguments, env)
    stamp = BUILD / "cmake.stamp"
    if vulkan.shader_compiler(arguments, env) not in (stamp.read_text() if stamp.exists() else ""):
        vulkan.forget_shaders(BUILD / "cmake")
    stamp.unlink(missing_ok=True)
    (BUILD / "cmake" / "CMakeCache.txt").unlink(missing_ok=True)
    for library in (BUILD / "cmake" / "bin").glob("libggml-*"):  # perhaps a variant that nobody wants any more
        library.unlink()
    log = BUILD / "configure.log"
    with log.open("w") as output:
        if subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=env).returncode:
            raise Stop(f"cmake failed ({log}):\n{first_error(log)}")
    stamp.write_text(wanted)


def build(tools: dict[str, str], env: dict[str, str]) -> None:
    log = BUILD / "build.log"
    command = ["cmake", "--build", str(BUILD / "cmake"), "--target", "llama", *tools.values()]
    env = env | {"NINJA_STATUS": "[%f/%t] "}
    started = time.monotonic()
    with log.open("w") as output, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env) as ninja:
        bar = tqdm(desc="llama.cpp: building", unit="step", disable=None, mininterval=1)
        tenths = 0
        for line in ninja.stdout:
            output.write(line)
            done = re.match(r"\[(\d+)/(\d+)\]", line)
            if done and int(done[2]) * 2 > (bar.total or 0):  # far fewer steps: another ninja, which makes a program for this build
                bar.total = int(done[2])
                bar.update(int(done[1]) - bar.n)
                if bar.disable and int(done[1]) * 10 // bar.total > tenths:  # no terminal: a line for each tenth
                    tenths = int(done[1]) * 10 // bar.total
                    say(f"building, {done[1]} of {done[2]} steps, {time.monotonic() - started:.0f} s")
        bar.close()
    if ninja.returncode:
        raise Stop(f"the build failed ({log}):\n{first_error(log)}")


def publish(tools: dict[str, str]) -> None:
    """Link the tools and libraries from build/bin and build/lib."""
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help,
                                     usage="%(prog)s [--tools NAME,...] [--vulkan] [CMAKE_ARG ...]")  # fmt: skip
    parser.add_argument(
        "--tools", default=",".join(TOOLS), metavar="NAME,...", help="build only these tools of build/bin, none if empty (default: all)"
    )
    parser.add_argument("--vulkan", action="store_true", help="build the Vulkan backend too, for GPUs")
    parser.add_argument("others", nargs="*", metavar="CMAKE_ARG", help="an argument for CMake, such as -DGGML_NATIVE=OFF")
    ours = "-h", "--help", "--tools", "--vulkan"
    arguments = [a for a in sys.argv[1:] if a.startswith("-") and a.partition("=")[0] not in ours]
    args = parser.parse_args([a for a in sys.argv[1:] if a not in arguments])
    if args.others:
        raise Stop(f"unexpected arguments {args.others}; CMake's begin with a dash, see --help")
    names = args.tools.split(",") if args.tools else []
    if unknown := [name for name in names if name not in TOOLS]:
        raise Stop(f"--tools {','.join(unknown)}: no such tool; the tools are {', '.join(TOOLS)}")
    tools = {name: TOOLS[name] for name in names}
    if "-DGGML_BACKEND_DL=ON" in arguments:
        tools.pop("test-quantize-fns", None)  # it links to a single ggml-cpu, and this build has several
    if args.vulkan or vulkan.from_environment():
        arguments.insert(0, "-DGGML_VULKAN=ON")
    env = environment()
    for program in "git", "cmake", "ninja":
        if not shutil.which(program, path=env["PATH"]):
            raise Stop(f"{program} is missing: {'install it' if program == 'git' else 'run scripts/setup.sh'}")
    BUILD.mkdir(parents=True, exist_ok=True)
    lock = FileLock(BUILD / "lock")
    try:
        held = lock.acquire(blocking=False)
    except Timeout:
        say("waiting for another build in the same directory")
        held = lock.acquire()
    with held:
        if to_configure := not is_configured(arguments, env):
            vulkan.check(arguments, env)  # before anything that takes long
        patched_source()
        if to_configure:
            configure(arguments, env)
        build(tools, env)
        publish(tools)
    say(f"ready in {BUILD / 'bin'}")


if __name__ == "__main__":
    run(main, hint="; run it again to continue")
