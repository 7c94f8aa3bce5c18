"""The CPU backend: numba kernels that compute on packed codes."""
