"""Decoding of whole batches by NVIDIA DALI."""
