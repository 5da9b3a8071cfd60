#!/usr/bin/env python3
"""Compare Hugging Face checkpoints and GGUFs: `sherry-gguf evaluate` as a file."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Without this directory, since some tasks of lm-eval import another package named `evaluate`.
sys.path[:] = [str(HERE.parent), *(p for p in sys.path if Path(p or ".").resolve() != HERE)]

from sherry_gguf.evaluation.command import main

if __name__ == "__main__":
    sys.exit(main())
