"""Drives mlir-aie and Peano: a design in MLIR and its kernels in C++ become an xclbin."""
