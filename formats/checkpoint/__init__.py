"""Floating-point checkpoints, read lazily: safetensors folders, Hub repositories, GGUF files."""

from uq.formats.checkpoint.checkpoint import Checkpoint, Source
from uq.formats.checkpoint.opening import open_checkpoint
from uq.formats.checkpoint.tensors import TensorInfo

__all__ = ["Checkpoint", "Source", "TensorInfo", "open_checkpoint"]
