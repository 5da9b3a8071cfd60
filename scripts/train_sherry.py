#!/usr/bin/env python3
"""`sherry-gguf train` as a file, which torchrun and accelerate launch need."""

import signal
import sys

from sherry_gguf.qat.command import main

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell makes background programs ignore it
    sys.exit(main())
