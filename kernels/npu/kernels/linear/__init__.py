"""y = x W^T with INT8 inputs and INT4 weights of a bundle: GEMV for one token, GEMM for many."""
