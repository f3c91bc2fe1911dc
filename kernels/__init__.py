"""Triton kernels; importing this package imports no triton."""
