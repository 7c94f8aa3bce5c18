"""The architectures of Gemma, one file each: its config.json, and its table of tensors.

A new one is such a file and a line in `registry.py`.
"""
