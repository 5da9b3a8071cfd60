#!/usr/bin/env bash
# All set-up, then every test. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
./scripts/setup.sh
.venv/bin/python scripts/build_llama_cpp
exec .venv/bin/python -m pytest "$@"
