#!/usr/bin/env bash
# From a bare machine to text from llama-cli: set up, train a small Sherry checkpoint, convert it, prove it, run it.
# Steps whose result exists are skipped; after an interruption, run it again to resume.
set -euo pipefail

if [[ $# -gt 0 ]]; then
    echo "usage: scripts/demo.sh    (no arguments; scripts/build_llama_cpp.py lists the environment variables)" >&2
    [[ $1 == -h || $1 == --help ]] && exit 0 || exit 2
fi

if [[ -n ${SHERRY_BUILD_DIR:-} ]]; then
    SHERRY_BUILD_DIR=$(realpath -m -- "$SHERRY_BUILD_DIR") # relative to the caller's directory
    export SHERRY_BUILD_DIR
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
build=${SHERRY_BUILD_DIR:-build}
bin=$build/bin
hf=$build/demo/hf
gguf=$build/demo/demo-TQ1_25.gguf
prompt='def read(self, size):'
threads=$(getconf _NPROCESSORS_ONLN)
# By default, OpenMP's threads spin while they wait, and keep each other off the cores where other programs run. Beside two busy loops on
# two cores of a Zen 4, waiting without spinning makes training 2.5 times as fast, and llama.cpp over 100 times with so small a model.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
name=start

step() { # step NAME WHAT COMMAND...: announce, run and time it
    name=$1
    echo "==> $name: $2"
    shift 2
    local began=$SECONDS
    "$@"
    echo "    $name took $((SECONDS - began)) s"
}
trap 'code=$?; [[ $code == 0 ]] || echo "demo: stopped in step $name (status $code): see above; run it again" >&2' EXIT

convert() {
    if [[ $gguf -nt $hf/demo.json ]]; then
        echo "    $gguf is up to date"
    else
        .venv/bin/python scripts/convert_hf_to_sherry_gguf.py "$hf" --outfile "$gguf" --model-name "Sherry demo" --require-exact
    fi
}

text() {
    # llama-cli is a chat program; the checkpoint's chat template makes it continue the prompt. -st: one answer, then exit.
    # The sed drops its banner.
    local answer
    answer=$("$bin/llama-cli" -m "$gguf" -st -p "$prompt" -n 160 -c 256 -t "$threads" --seed 3 --temp 0.6 \
        --simple-io --color off --log-verbosity 1 </dev/null | sed -n '/^> /,$p')
    echo "$answer"
    # its exit status is 0 even without an answer
    if [[ $answer == *"Error:"* || $(wc -l <<<"$answer") -lt 4 ]]; then
        echo "llama-cli gave no answer: run $bin/llama-cli -m $gguf to see why" >&2
        return 1
    fi
}

sizes() {
    .venv/bin/python - "$hf" "$gguf" <<'PYTHON'
import sys
from pathlib import Path

from gguf import GGUFReader

from sherry_gguf import gguf_type, tq1_25

gguf_type.register()
hf, gguf = map(Path, sys.argv[1:])
tensors = GGUFReader(gguf).tensors
ternary = [t for t in tensors if t.tensor_type == tq1_25.TYPE_ID]
weights, stored = (int(sum(getattr(t, k) for t in ternary)) for k in ("n_elements", "n_bytes"))
rows = [
    ("checkpoint, safetensors", sum(p.stat().st_size for p in hf.glob("*.safetensors"))),
    ("model, GGUF", gguf.stat().st_size),
    ("its ternary matrices as F16", 2 * weights),
    ("its ternary matrices as TQ1_25", stored),
]
for what, size in rows:
    print(f"    {what:32}{size / 2**20:8.2f} MiB")
print(f"    {8 * stored / weights:.3f} bits a weight, {weights / 1e6:.2f} M weights in {len(ternary)} ternary matrices")
PYTHON
}

speed() {
    "$bin/llama-bench" -m "$gguf" -p 128 -n 64 -r 3 -t "$threads"
}

step setup "Python environment in .venv" ./scripts/setup.sh
step llama.cpp "fetch, patch and build it in $build" .venv/bin/python scripts/build_llama_cpp.py
step train "a small Sherry checkpoint in $hf, on this Python's standard library" \
    .venv/bin/python scripts/make_demo_checkpoint.py --out "$hf"
step convert "$hf to $gguf, every ternary block bit for bit" convert
step verify "each tensor of $gguf against $hf" .venv/bin/sherry-gguf verify "$gguf" "$hf"
step text "llama-cli goes on with \"$prompt\"" text
step sizes "what is stored" sizes
step speed "tokens a second, $threads threads" speed
echo "demo: done in $SECONDS s"
