"""Floating-point checkpoints, read lazily: safetensors folders, Hub repositories, GGUF files."""
