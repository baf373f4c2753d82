"""Tiny towers, noise batches and error measures for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from discovla.batch import Batch
from discovla.nn.rotation import Rotation
from discovla.ops.mlp import Activation
from discovla.towers.architecture import Architecture, CaptionTokens, FrameTokens, TowerShape


def tiny_architecture(activation: Activation = "quick_gelu") -> Architecture:
    """Return a CLIP with two layers per tower, 16-pixel images, 12 text positions and 50 token ids."""
    return Architecture(
        embed_dim=16,
        image_size=16,
        patch_size=8,
        context_length=12,
        vocab_size=50,
        activation=activation,
        vision=TowerShape(width=32, layers=2, heads=2, mlp_width=128),
        text=TowerShape(width=24, layers=2, heads=2, mlp_width=96),
    )


def tiny_towers() -> dict[str, Architecture]:
    """Return towers of every kind in the sizes of `tiny_architecture`, by the name of a family."""
    clip = tiny_architecture("gelu")
    vision, pool = clip.vision, {"pool": "attention", "pool_heads": 2, "pool_mlp_width": 64}
    pe = FrameTokens(rotation=Rotation(grid=2, offset=1.0, order="xy"), projection_bias=True, **pool)
    siglip = FrameTokens(
        class_row=False, class_position=False, norm_before=False, patch_bias=True, projection=False, **pool
    )
    eva = {"activation": "swiglu", "key_bias": False, "inner_norm": True, "eps": 1e-6}
    return {
        "clip": clip,
        "pe": replace(clip, frames=pe),
        "siglip": replace(
            clip,
            embed_dim=vision.width,
            vision=replace(vision, activation="gelu_tanh"),
            frames=siglip,
            captions=CaptionTokens(
                causal=False, readout="last", projection_bias=True, tokenizer="gemma", start_token=False
            ),
            logit_bias=True,
        ),
        "eva": replace(
            clip,
            vision=replace(vision, **eva),
            frames=FrameTokens(rotation=Rotation(grid=2), norm_before=False, patch_bias=True),
        ),
        "mobileclip": replace(
            clip,
            image_size=32,
            patch_size=16,
            frames=FrameTokens(class_position=False, norm_before=False, stem=True),
        ),
        "coca": replace(
            clip,
            frames=FrameTokens(pool="latent", pool_heads=2),
            captions=CaptionTokens(readout="class"),
        ),
        "clipa": replace(
            clip,
            vision=replace(vision, layer_scale=True),
            frames=FrameTokens(norm_before=False, pool="mean"),
            captions=CaptionTokens(causal=False, readout="last"),
        ),
        "metaclip": replace(clip, captions=CaptionTokens(readout="end", end_id=clip.vocab_size - 1)),
    }


def noise_batch(architecture: Architecture, *, size: int = 4, frames: int = 3, seed: int = 0) -> Batch:
    """Return a batch of noise frames and random captions of random lengths, each ending in end-of-text."""
    generator = torch.Generator().manual_seed(seed)
    pixels = (size, frames, architecture.image_size, architecture.image_size, 3)
    text_ids, text_mask = random_captions(architecture, size, generator)
    frame_ids, frame_mask = random_captions(architecture, size * frames, generator)
    return Batch(
        text_ids=text_ids,
        text_mask=text_mask,
        frames=torch.randint(0, 256, pixels, generator=generator, dtype=torch.uint8),
        frame_mask=torch.ones(size, frames, dtype=torch.bool),
        frame_text_ids=frame_ids.unflatten(0, (size, frames)),
        frame_text_mask=frame_mask.unflatten(0, (size, frames)),
        video_index=torch.arange(size),
        valid=torch.ones(size, dtype=torch.bool),
    )


def random_captions(architecture: Architecture, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return ids n l and mask n l of random captions: start-of-text, words, end-of-text, padding."""
    length, vocab = architecture.context_length, architecture.vocab_size
    words = torch.randint(0, length - 1, (n,), generator=generator)
    ids = torch.randint(1, vocab - 2, (n, length), generator=generator)
    position = torch.arange(length)
    ids[:, 0] = vocab - 2
    ids[torch.arange(n), words + 1] = vocab - 1
    mask = position <= (words + 1)[:, None]
    return ids * mask, mask


def relative_error(got: Tensor, want: Tensor) -> float:
    """Return max |got - want| / max |want|."""
    return ((got.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1e-300)).item()


def peak_bytes(function: Callable[[], object]) -> int:
    """Return the peak bytes of CPU tensors that `function` allocates, counted by torch's profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = function()
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    events: Any = recorded.profiler.kineto_results.events()
    memory = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    del result
    return int(max(np.cumsum([size for _, size in memory]), default=0))


def exponent(sizes: Sequence[int], figures: Sequence[float]) -> float:
    """Return the least-squares slope of log(figures) over log(sizes): 2 for quadratic growth."""
    return float(np.polyfit(np.log(sizes), np.log(figures), 1)[0])
