"""Kernels for the NPU: a folder each with its design, its core program in C++ and its twin."""
