"""discovla: a GPU-first engine for video-text retrieval."""

__version__ = "0.1.0"
