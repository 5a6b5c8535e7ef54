"""Kernels for GPUs in Triton, an optional dependency: nothing here is imported without it."""
