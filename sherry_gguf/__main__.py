"""`python -m sherry_gguf`, the same as `sherry-gguf`."""

import sys

from .cli import main

sys.exit(main())
