"""Frames of video files: which decode, by whom, and what is wrong with files that give none."""
