"""Captions of frames: made by a captioner, kept, and read."""
