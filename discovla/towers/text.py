"""CLIP's text transformer."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor, nn

from discovla.nn.transformer import Block, LayerNorm, Sequences
from discovla.towers.architecture import Architecture
from discovla.towers.vision import MakeBlock


class TextTower(nn.Module):
    """embed -> blocks -> project; a caption is read at its end-of-text token, the largest id."""

    def __init__(self, architecture: Architecture, make_block: MakeBlock | None = None) -> None:
        super().__init__()
        shape = architecture.text
        make_block = make_block or (lambda layer: Block(shape.block(architecture.activation)))
        table = torch.empty(architecture.vocab_size, shape.width)  # its own start imports torch._dynamo
        self.token_embedding = nn.Embedding.from_pretrained(table, freeze=False)
        self.position_embedding = nn.Parameter(torch.empty(architecture.context_length, shape.width))
        self.blocks = nn.ModuleList(make_block(layer) for layer in range(shape.layers))
        self.ln_final = LayerNorm(shape.width)
        self.projection = nn.Parameter(torch.empty(shape.width, architecture.embed_dim))

    def embed(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Token ids n l to tokens n l w."""
        length = ids.shape[1]
        if length > len(self.position_embedding):
            raise ValueError(f"ids: expected at most {len(self.position_embedding)} tokens, got {length}")
        return (self.token_embedding(ids) + self.position_embedding[:length]).to(dtype)

    def project(self, x: Tensor) -> Tensor:
        """Rows of width w to joint features of width d."""
        return self.ln_final(x) @ self.projection.to(x.dtype)

    def encode(
        self, ids: Tensor, mask: Tensor | None, *, group: int = 0, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """The last block's rows, n l w, before projection.

        Args:
            ids: n l, int64.  mask: n l, bool, true on real tokens; padding is never seen.  None leaves the
                causal mask alone, as CLIP has it: only rows of padding, which come last, see padding then.
            group: how many neighbouring captions make one sample in fusion blocks; 0 for none.
            dtype: to compute in.
        """
        x = self.embed(ids, dtype)
        sequences = Sequences(
            causal=True, key_mask=mask, group=group, readout=ids.argmax(-1), fusion_key_mask=mask
        )
        for block in self.blocks:
            x = block(x, sequences)
        return x

    @overload
    def forward(
        self,
        ids: Tensor,
        mask: Tensor | None,
        *,
        group: int = 0,
        dtype: torch.dtype = torch.float32,
        words: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        ids: Tensor,
        mask: Tensor | None,
        *,
        group: int = 0,
        dtype: torch.dtype = torch.float32,
        words: Literal[True],
    ) -> tuple[Tensor, Tensor]: ...

    def forward(
        self,
        ids: Tensor,
        mask: Tensor | None,
        *,
        group: int = 0,
        dtype: torch.dtype = torch.float32,
        words: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Caption features n d; with `words` those of every position too, n l d; the rest as in `encode`."""
        x = self.encode(ids, mask, group=group, dtype=dtype)
        end = torch.arange(len(ids), device=ids.device), ids.argmax(-1)
        if not words:
            return self.project(x[end])
        rows = self.project(x)
        return rows[end], rows
