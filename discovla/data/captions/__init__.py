"""Captions of video frames, made by a vision-language model."""
