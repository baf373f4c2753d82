"""Tokenization of captions by CLIP's byte-pair encoding."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import regex
import torch
from torch import Tensor

if TYPE_CHECKING:
    from open_clip import SimpleTokenizer

_CACHED = 1 << 17  # texts; frame captions repeat within a clip, captions in every epoch


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer of the released CLIP.

    Text is repaired by ftfy, HTML-unescaped, lower-cased and its spaces collapsed; special tokens spelled out
    in a caption become the special ids.  ids = start, tokens cut to context_length - 2, end, then zeros.

    Args:
        context_length: tokens of a row, start and end included, at least 2.
    """

    context_length: int

    def __post_init__(self) -> None:
        if self.context_length < 2:
            raise ValueError(
                f"context_length: expected at least 2, start and end, found {self.context_length}"
            )

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return the token ids of captions, cut to the context.

        Args:
            texts: n captions.

        Returns: ids n l (int64, padded with 0) and mask n l (bool, True on tokens, start and end included).
        """
        length = self.context_length
        start, end = special_ids()
        rows = [[start, *_tokens(text)[: length - 2], end] for text in texts]
        ids = torch.tensor([row + [0] * (length - len(row)) for row in rows], dtype=torch.int64)
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        ids, mask = ids.view(len(rows), length), torch.arange(length) < lengths[:, None]
        return ids, mask

    def length(self, text: str) -> int:
        """Return the number of tokens of a caption before it is cut, start and end included."""
        return len(_tokens(text)) + 2


def special_ids() -> tuple[int, int]:
    """Return the ids of the start and the end token."""
    bpe = _bpe()
    return bpe.sot_token_id, bpe.eot_token_id


@lru_cache(maxsize=_CACHED)
def _tokens(text: str) -> tuple[int, ...]:
    """Return the ids of a text without start and end."""
    bpe = _bpe()
    # Repair takes most of the time, and printable ASCII needs none.
    plain = text.isascii() and text.isprintable() and "&" not in text
    cleaned = " ".join(text.split()).lower() if plain else bpe.clean_fn(text)
    return tuple(token for word in bpe.pat.findall(cleaned) for token in _word(word))


@lru_cache(maxsize=_CACHED)
def _word(word: str) -> tuple[int, ...]:
    """Return the ids of one word of a cleaned text."""
    bpe = _bpe()
    symbols = "".join(bpe.byte_encoder[byte] for byte in word.encode())
    return tuple(bpe.encoder[part] for part in bpe.bpe(symbols).split(" "))


@lru_cache(maxsize=1)
def _bpe() -> SimpleTokenizer:
    """Return open_clip's tokenizer, with the special tokens spelled as in the released CLIP."""
    bpe = _open_clip_tokenizer()
    renamed = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    pattern = bpe.pat.pattern
    for open_clip_name, name in renamed.items():
        bpe.encoder[name] = bpe.encoder.pop(open_clip_name)
        bpe.cache[name] = name
        pattern = pattern.replace(open_clip_name, regex.escape(name))
    bpe.pat = regex.compile(pattern, regex.IGNORECASE)
    return bpe


def _open_clip_tokenizer() -> SimpleTokenizer:
    """Load open_clip's tokenizer from its file; importing the package imports timm and torchvision too."""
    package = importlib.util.find_spec("open_clip")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("expected the package open_clip (open_clip_torch), found none")
    path = Path(package.origin).with_name("tokenizer.py")
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer()
