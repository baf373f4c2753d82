"""Embed complete sets of captions and videos batch by batch; the embeddings are kept on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace

import torch
from torch import Tensor

from discovla.batch import Embedding
from discovla.methods.base import Method

Inputs = Iterable[tuple[Tensor, Tensor]]


def embed_texts(method: Method, batches: Inputs, device: torch.device | str) -> Embedding:
    """Embed all captions, in order, onto the CPU.

    Args:
        method: on `device`; it runs in evaluation mode and returns to the mode it was in.
        batches: ids (n l, int64) and mask (n l, bool).

    Raises:
        ValueError: no batch.
    """
    return _embed(method, method.encode_text, batches, device)


def embed_videos(
    method: Method, batches: Inputs, device: torch.device | str, *, frames: bool = False
) -> Embedding:
    """Embed all videos, as `embed_texts`, from frames (n f y x c, uint8) and mask (n f, bool).

    Args:
        frames: keep a feature of each frame, `Embedding.frames`, which no similarity compares.
    """
    return _embed(method, method.encode_video, batches, device, frames=frames)


def embed_frames(method: Method, features: Inputs, device: torch.device | str) -> Embedding:
    """Embed all videos, as `embed_videos`, from features of their frames (n f d) and mask (n f, bool)."""
    return _embed(method, method.embed_frames, features, device)


def encode_frames(
    method: Method, batches: Inputs, device: torch.device | str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the features of frames, n f d, and their mask n f, batch by batch, on the CPU."""
    for frames, mask in batches:
        with evaluating(method):
            features = method.encode_frames(frames.to(device), mask.to(device)).cpu()
        yield features, mask


def concatenate(parts: Sequence[Embedding]) -> Embedding:
    """Concatenate embeddings with the same fields.

    Raises:
        ValueError: no embedding, or a field that only some of them have.
    """
    if not parts:
        raise ValueError("embeddings: expected at least one batch, found none")
    values = {}
    for name in (field.name for field in fields(Embedding)):
        tensors = [value for part in parts if (value := getattr(part, name)) is not None]
        if tensors and len(tensors) < len(parts):
            raise ValueError(f"embeddings: expected {name} in all {len(parts)} batches, found {len(tensors)}")
        values[name] = torch.cat(tensors) if tensors else None
    return Embedding(**values)


def in_order(shares: Sequence[tuple[Tensor, Embedding]], count: int) -> Embedding:
    """Join the embeddings of `count` inputs from the shares of several processes.

    Args:
        shares: of each process the positions of its rows (n, int64) and their embedding. A row that two
            processes embedded is used once.

    Raises:
        ValueError: a row is missing.
    """
    positions = torch.cat([position for position, _ in shares])
    rows = torch.full((count,), -1)
    rows[positions] = torch.arange(len(positions))
    if (missing := (rows < 0).nonzero()).numel():
        raise ValueError(
            f"embeddings: expected {count} rows, found {count - len(missing)}; row {missing[0, 0]} is missing"
        )
    return concatenate([embedding for _, embedding in shares])[rows]


def _embed(
    method: Method,
    encode: Callable[[Tensor, Tensor], Embedding],
    batches: Inputs,
    device: torch.device | str,
    *,
    frames: bool = False,
) -> Embedding:
    kept = (lambda part: part.to("cpu")) if frames else _compared
    with evaluating(method):
        return concatenate([kept(encode(x.to(device), mask.to(device))) for x, mask in batches])


@contextmanager
def evaluating(method: Method) -> Iterator[None]:
    """Run in evaluation mode without gradients; the method returns to the mode it was in."""
    training = method.training
    if training:  # setting the mode visits all modules, which takes a millisecond
        method.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        if training:
            method.train()


def _compared(part: Embedding) -> Embedding:
    """Move to the CPU the part that similarities compare; frames serve training only."""
    return replace(part, frames=None, frame_mask=None).to("cpu")
