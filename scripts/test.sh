#!/usr/bin/env bash
# All set-up, then every test. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
./scripts/setup.sh
.venv/bin/python scripts/build_llama_cpp
# sentencepiece warns once more when Python ends, after pytest has summed up
exec .venv/bin/python -W "ignore:builtin type swig:DeprecationWarning" -m pytest "$@"
