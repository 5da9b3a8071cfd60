#!/usr/bin/env python3
"""Convert a Hugging Face model directory to a ternary GGUF: `sherry-gguf convert` under llama.cpp's customary name."""

import sys
from pathlib import Path

from sherry_gguf.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]], prog=Path(__file__).name))
