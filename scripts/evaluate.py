#!/usr/bin/env python3
"""Compare Hugging Face checkpoints and GGUFs: `sherry-gguf evaluate` as a file."""

import sys
from pathlib import Path

# Some of lm-eval's tasks import another package named `evaluate`, and must not find this file.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]

from sherry_gguf.evaluation.command import main

if __name__ == "__main__":
    sys.exit(main())
