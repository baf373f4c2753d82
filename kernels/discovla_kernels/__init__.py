"""Triton kernels of discovla, one op per file. They know torch and triton and nothing of discovla."""
