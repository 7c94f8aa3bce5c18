"""A bundle, written back for other programs: transformers, vLLM, llama.cpp."""

import sys

from uq.stage import Stage

sys.modules[__name__].__class__ = Stage
