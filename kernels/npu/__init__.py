"""Designs for the NPU in the dialects of mlir-aie: read, print and verify them."""
