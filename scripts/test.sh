#!/usr/bin/env bash
# Sets everything up, then runs every test. --fast runs those that take under three minutes. Other arguments go to pytest
# (-n 0: one test at a time).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
./scripts/setup.sh
.venv/bin/python scripts/build_llama_cpp.py
[[ ${1-} == --fast ]] && set -- -m "not slow and not emulated and not fuzz" "${@:2}"
# Two processes take the files in order. sentencepiece repeats a warning when Python ends, after pytest's summary.
exec .venv/bin/python -W "ignore:builtin type swig:DeprecationWarning" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
