"""A decoder that hangs, for a process of its own."""

from __future__ import annotations

import time

import numpy as np

from discovla.data.dali.pipeline import PipelineConfig, Plan


def hang_at(item: tuple[PipelineConfig, tuple[Plan | None, ...]]) -> tuple[np.ndarray, list[str | None]]:
    """Decode a batch of plans to white frames, but hang at a clip with the id `hang`."""
    config, plans = item
    if any(plan is not None and plan.id == "hang" for plan in plans):
        time.sleep(60)
    frames = np.zeros((len(plans), config.frames, config.image_size, config.image_size, 3), np.uint8)
    for row, plan in enumerate(plans):
        frames[row] = 0 if plan is None else 255
    return frames, [None] * len(plans)
