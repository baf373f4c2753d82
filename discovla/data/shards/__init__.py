"""Clips decoded once into WebDataset tars, and read from them."""
