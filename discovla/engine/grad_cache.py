"""A batch encoded in parts, each twice: for its embeddings, and once more when their gradients are known."""

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
    """A module that may encode its batches in parts.

    later: None where backward encodes again by itself, in one graph.  A strategy that gathers parameters for
    a forward pass alone puts a list here: `forward` then ends its graph at the embeddings and leaves in it a
    function for each part.  Called after backward, it encodes again and gives a scalar: the gradient of that
    by the parameters is the part's share.
    """

    later: list[Callable[[], Tensor]] | None = None

    def encoded(self, encode: Encode, parts: Sequence[Batch]) -> Embedding:
        """The embeddings of all parts, of which nothing else is kept for backward."""
        if self.later is None:
            found = [_again(encode, part).tensors() for part in parts]
            return Embedding(**{name: torch.cat([x[name] for x in found]) for name in found[0]})
        states, found = [], []
        with torch.no_grad():
            for part in parts:
                states.append(_Random.at(part.text_ids))
                found.append(encode(part).tensors())
        whole = {name: torch.cat([x[name] for x in found]) for name in found[0]}
        leaves = {name: x.requires_grad_() for name, x in whole.items() if x.is_floating_point()}
        start = 0
        for part, state in zip(parts, states, strict=True):
            rows = slice(start, start := start + len(part))
            self.later.append(partial(_share, encode, part, state, leaves, rows))
        return Embedding(**whole)


@dataclass(frozen=True)
class _Random:
    """The state of the random generators that towers draw from, on the CPU and where a tensor lies."""

    cpu: Tensor
    devices: list[int]
    states: list[Tensor]

    @classmethod
    def at(cls, x: Tensor) -> _Random:
        return cls(torch.get_rng_state(), *get_device_states(x))

    @contextmanager
    def again(self) -> Iterator[None]:
        """As it was then; afterwards as it is now."""
        with torch.random.fork_rng(devices=self.devices):
            torch.set_rng_state(self.cpu)
            set_device_states(self.devices, self.states)
            yield


def _share(encode: Encode, part: Batch, state: _Random, leaves: dict[str, Tensor], rows: slice) -> Tensor:
    """sum of x g over a part's embeddings x, encoded again, and their gradients g."""
    with state.again():
        found = encode(part).tensors()
    terms = [(found[name] * x.grad[rows]).sum() for name, x in leaves.items() if x.grad is not None]
    return torch.stack(terms).sum()


def _again(encode: Encode, batch: Batch) -> Embedding:
    """encode(batch), of which nothing is kept for backward, which encodes once more."""
    # an argument tells which device's random state to keep; stopping early would skip hooks of modules
    return checkpoint(lambda _: encode(batch), batch.text_ids, use_reentrant=False, early_stop=False)
