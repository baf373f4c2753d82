"""Gradient caching: encode a batch in chunks, and each chunk again once its embeddings' gradients are known.

Source: Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup (arXiv 2101.06983).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, get_device_states, set_device_states

from discovla.batch import Batch, Embedding

Encode = Callable[[Batch], Embedding]


class GradCache(nn.Module):
    """Module that can encode its batches in chunks, keeping the activations of one chunk at a time.

    deferred: None if backward encodes each chunk again by itself, in one graph.  A strategy that gathers
    parameters for a forward pass only (ZeRO stage 3) sets a list: the graph of `forward` then ends at the
    embeddings, and the list receives one function per chunk.  Called after backward, it encodes the chunk
    again and returns a scalar whose gradient by the parameters is the chunk's part."""

    deferred: list[Callable[[], Tensor]] | None = None

    def encode_chunks(self, encode: Encode, chunks: Sequence[Batch]) -> Embedding:
        """Return the embeddings of all chunks; nothing else is kept for backward."""
        if self.deferred is None:
            outputs = [_encode_recomputed(encode, chunk).tensors() for chunk in chunks]
            return Embedding(**{name: torch.cat([x[name] for x in outputs]) for name in outputs[0]})
        states, outputs = [], []
        with torch.no_grad():
            for chunk in chunks:
                states.append(_RandomState.capture(chunk.text_ids))
                outputs.append(encode(chunk).tensors())
        tensors = {name: torch.cat([x[name] for x in outputs]) for name in outputs[0]}
        leaves = {name: x.requires_grad_() for name, x in tensors.items() if x.is_floating_point()}
        start = 0
        for chunk, state in zip(chunks, states, strict=True):
            rows = slice(start, start := start + len(chunk))
            self.deferred.append(partial(_surrogate_loss, encode, chunk, state, leaves, rows))
        return Embedding(**tensors)


@dataclass(frozen=True)
class _RandomState:
    """State of the random generators that towers draw from: the CPU's, and that of a tensor's device."""

    cpu: Tensor
    devices: list[int]
    states: list[Tensor]

    @classmethod
    def capture(cls, x: Tensor) -> _RandomState:
        return cls(torch.get_rng_state(), *get_device_states(x))

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Restore the captured state inside the context, and the present one after it."""
        with torch.random.fork_rng(devices=self.devices):
            torch.set_rng_state(self.cpu)
            set_device_states(self.devices, self.states)
            yield


def _surrogate_loss(
    encode: Encode, chunk: Batch, state: _RandomState, leaves: dict[str, Tensor], rows: slice
) -> Tensor:
    """Return the sum of x g over a chunk's embeddings x, encoded again, and their cached gradients g."""
    with state.restored():
        embeddings = encode(chunk).tensors()
    terms = [(embeddings[name] * x.grad[rows]).sum() for name, x in leaves.items() if x.grad is not None]
    return torch.stack(terms).sum()


def _encode_recomputed(encode: Encode, batch: Batch) -> Embedding:
    """Return encode(batch); backward encodes the batch again instead of keeping its activations."""
    # the tensor argument tells which device's random state to save; stopping early would skip module hooks
    return checkpoint(lambda _: encode(batch), batch.text_ids, use_reentrant=False, early_stop=False)
