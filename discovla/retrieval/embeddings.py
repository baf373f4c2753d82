"""Embeddings of captions or videos as a record to slice, concatenate, save and search."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from discovla.batch import BadClip, Embedding
from discovla.foreign import read_tensors, to_json
from discovla.retrieval.embed import concatenate
from discovla.retrieval.ranks import Array
from discovla.tensor_files import write_tensors

_REFUSED = "refused"  # key of the metadata of a file


@dataclass(frozen=True, kw_only=True)
class Embeddings:
    """Embeddings of n captions or videos on the CPU, not normalised.

    pooled: n d, one feature each.
    tokens: n k d, words, frames or views, if the method compares them; else None.
    mask: n k, bool, true on real tokens; None if all are real.
    index: n, int64, position of each row among the inputs of the call that embedded it.
    refused: videos that have no row, with the reasons.
    """

    pooled: Tensor
    tokens: Tensor | None = None
    mask: Tensor | None = None
    index: Tensor
    refused: tuple[BadClip, ...] = ()

    @classmethod
    def of(
        cls, embedding: Embedding, index: Tensor | None = None, refused: Sequence[BadClip] = ()
    ) -> Embeddings:
        """Make the record of a method's embedding; `index` is 0, 1, ... by default."""
        return cls(
            pooled=embedding.pooled,
            tokens=embedding.tokens,
            mask=embedding.mask,
            index=torch.arange(len(embedding)) if index is None else index,
            refused=tuple(refused),
        )

    def embedding(self) -> Embedding:
        """Return the part that a method's similarity compares."""
        return Embedding(pooled=self.pooled, tokens=self.tokens, mask=self.mask)

    def __len__(self) -> int:
        return len(self.pooled)

    def __getitem__(self, rows: slice | Sequence[int] | Tensor | Array) -> Embeddings:
        """Return some rows, by a slice, indices or a mask; `refused` stays complete."""
        selection = rows if isinstance(rows, slice) else torch.as_tensor(np.asarray(rows))
        part = self.embedding()[selection]
        return replace(
            self, pooled=part.pooled, tokens=part.tokens, mask=part.mask, index=self.index[selection]
        )

    def numpy(self) -> Array:
        """Return the pooled features as an array, n d."""
        return self.pooled.numpy()

    @staticmethod
    def concatenate(parts: Sequence[Embeddings]) -> Embeddings:
        """Join embeddings of one model, rows and refused videos in order; `index` stays that of each part.

        Raises:
            ValueError: no part, or parts of different models.
        """
        joined = concatenate([part.embedding() for part in parts])
        return Embeddings.of(
            joined,
            torch.cat([part.index for part in parts]),
            [clip for part in parts for clip in part.refused],
        )

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with the tensors under their names here."""
        tensors = {**self.embedding().tensors(), "index": self.index}
        refused = to_json([asdict(clip) for clip in self.refused])
        write_tensors(Path(path), tensors, {_REFUSED: refused})

    @staticmethod
    def load(path: str | Path) -> Embeddings:
        """Read a file that `save` wrote.

        Raises:
            ValueError: the file has no embeddings.
            OSError: the file cannot be read.
        """
        tensors, metadata = read_tensors(Path(path), "embeddings")
        if not {"pooled", "index"} <= set(tensors) or _REFUSED not in metadata:
            raise ValueError(f"{path}: expected embeddings, found the tensors {', '.join(sorted(tensors))}")
        refused = tuple(BadClip(**clip) for clip in json.loads(metadata[_REFUSED]))
        return Embeddings(**tensors, refused=refused)
