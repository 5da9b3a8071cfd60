#!/usr/bin/env bash
# Makes .venv with the pinned requirements and this package, compiled and editable. Skips what is done.
#
# environment: PYTHON, the interpreter for .venv (default: python3)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { echo "setup: $*"; }
die() { echo "setup: $*" >&2; exit 1; }

python=${PYTHON:-python3}
command -v "$python" >/dev/null || die "$python is missing: install Python 3.10 or newer"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  die "$("$python" --version) is too old: use 3.10 or newer (PYTHON=/path/to/python3.12)"
for tool in git cc c++; do
  command -v "$tool" >/dev/null || die "$tool is missing: install git and a C and C++ compiler (Debian: apt-get install git build-essential)"
done

# One set-up at a time.
mkdir -p build
exec 9>build/setup.lock
if command -v flock >/dev/null && ! flock -n 9; then
  say "waiting for another set-up"
  flock 9
fi

# Each stamp records what its step was made from. It is written last, so an interrupted step runs again.
here=$(pwd)
version=$("$python" -c 'import sys; print(sys.version)')
wanted="$here
$version
$(cat requirements.txt)"
if [ "$(cat .venv/requirements.stamp 2>/dev/null)" != "$wanted" ]; then
  # Start over for another Python, or in another directory: the programs in .venv would not start there.
  if [ "$(.venv/bin/python -c 'import sys; print(sys.version)' 2>/dev/null)" != "$version" ] ||
    ! grep -qF "$here/.venv/bin/python" .venv/bin/pip 2>/dev/null; then
    say "making .venv with $("$python" --version)"
    "$python" -m venv --clear .venv || die "python's venv module failed (Debian: apt-get install python3-venv)"
  fi
  rm -f .venv/*.stamp
  say "installing the requirements (2 GB with a CPU build of torch; the default build adds several GB of GPU libraries)"
  .venv/bin/python -m pip install -qq --disable-pip-version-check -r requirements.txt ||
    die "pip failed (see above): fix that and run this again"
  printf '%s\n' "$wanted" >.venv/requirements.stamp
fi

# llama-cpp-python from the archive that brings llama.cpp, but without building it: sherry_gguf.Llama names the libraries. Nothing goes to
# pip's cache, which would offer it to other projects, and those need libraries.
wanted=$(cat ggml_patch/UPSTREAM)
if [ "$(cat .venv/llama.stamp 2>/dev/null)" != "$wanted" ]; then
  say "installing llama-cpp-python"
  sed -n 's/^version = /llama-cpp-python==/p; s/^sha256 = / --hash=sha256:/p' ggml_patch/UPSTREAM | tr -d '\n' >.venv/llama.txt
  SKBUILD_WHEEL_CMAKE=false .venv/bin/python -m pip install -qq --disable-pip-version-check --no-cache-dir --no-deps -r .venv/llama.txt ||
    die "pip failed (see above): fix that and run this again"
  printf '%s\n' "$wanted" >.venv/llama.stamp
fi

wanted=$(find setup.py pyproject.toml sherry_gguf/_kernels_build.py ggml_patch/src -type f | LC_ALL=C sort | xargs cksum; echo "${CC-} ${CFLAGS-} ${LDFLAGS-}")
if [ "$(cat .venv/package.stamp 2>/dev/null)" != "$wanted" ] || ! ls sherry_gguf/_kernels.*so >/dev/null 2>&1; then
  say "compiling the kernels and installing sherry-gguf"
  log=$(.venv/bin/python -m pip install --disable-pip-version-check --no-build-isolation --no-deps -e . 2>&1) ||
    die "the package did not build (Python's headers missing? Debian: apt-get install python3-dev):
$log"
  printf '%s\n' "$wanted" >.venv/package.stamp
fi
say "ready in .venv"
