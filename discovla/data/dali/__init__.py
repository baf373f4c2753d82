"""Frames of whole batches by NVIDIA DALI's graph."""
