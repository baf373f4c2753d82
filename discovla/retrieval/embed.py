"""Embeddings of whole sets: made batch by batch on the device, kept on the CPU."""

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
    """Embeddings of all captions, in their order, on the CPU.

    Args:
        method: lies on `device`; works in evaluation mode and returns to the mode it was in.
        batches: ids (n l, int64) and mask (n l, bool).

    Raises:
        ValueError: there is no batch.
    """
    return _embed(method, method.encode_text, batches, device)


def embed_videos(method: Method, batches: Inputs, device: torch.device | str) -> Embedding:
    """Embeddings of all videos, as `embed_texts`, from frames (n f y x c, uint8) and mask (n f, bool)."""
    return _embed(method, method.encode_video, batches, device)


def concatenate(parts: Sequence[Embedding]) -> Embedding:
    """One embedding of all rows of `parts`, which must agree on the fields they have.

    Raises:
        ValueError: there is no part, or a field is in some parts only.
    """
    if not parts:
        raise ValueError("embeddings: expected at least one batch, found none")
    values = {}
    for name in (field.name for field in fields(Embedding)):
        given = [value for part in parts if (value := getattr(part, name)) is not None]
        if given and len(given) < len(parts):
            raise ValueError(f"embeddings: expected {name} in all {len(parts)} batches, found {len(given)}")
        values[name] = torch.cat(given) if given else None
    return Embedding(**values)


def in_order(shares: Sequence[tuple[Tensor, Embedding]], count: int) -> Embedding:
    """The embeddings of `count` inputs, put together from the shares of several processes.

    Args:
        shares: per process the place of each of its rows (n, int64) and their embedding. A row that two
            processes embedded is taken once.

    Raises:
        ValueError: a row is missing.
    """
    places = torch.cat([place for place, _ in shares])
    found = torch.full((count,), -1)
    found[places] = torch.arange(len(places))
    if (missing := (found < 0).nonzero()).numel():
        raise ValueError(
            f"embeddings: expected {count} rows, found {count - len(missing)}; row {missing[0, 0]} is missing"
        )
    return concatenate([embedding for _, embedding in shares])[found]


def _embed(
    method: Method, encode: Callable[[Tensor, Tensor], Embedding], batches: Inputs, device: torch.device | str
) -> Embedding:
    with evaluating(method):
        return concatenate([_kept(encode(x.to(device), mask.to(device))) for x, mask in batches])


@contextmanager
def evaluating(method: Method) -> Iterator[None]:
    """In evaluation mode and without gradients; the method returns to the mode it was in."""
    mode = method.training
    method.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        method.train(mode)


def _kept(part: Embedding) -> Embedding:
    """What similarities compare, on the CPU: frames serve training alone."""
    return replace(part, frames=None, frame_mask=None).to("cpu")
