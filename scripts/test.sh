#!/usr/bin/env bash
# All set-up, then every test. Arguments go to pytest (-n 0: one test at a time).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
./scripts/setup.sh
.venv/bin/python scripts/build_llama_cpp.py
# Files take turns on two processes, in their order: the longest is one of the first.
# sentencepiece warns once more when Python ends, after pytest has summed up
exec .venv/bin/python -W "ignore:builtin type swig:DeprecationWarning" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
