"""CLIP's byte-pair encoding of captions."""

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

_REMEMBERED = 1 << 17  # captions: frame captions repeat within a clip, and every caption in every epoch


@dataclass(frozen=True)
class Tokenizer:
    """Captions to token ids, as the released CLIP does it.

    Text is repaired, unescaped, its spaces collapsed and lower-cased; the special tokens written out in a
    caption become the special ids.  ids = start, tokens cut to context_length - 2, end, then zeros.

    Args:
        context_length: tokens of a row, start and end included, at least 2.
    """

    context_length: int

    def __post_init__(self) -> None:
        if self.context_length < 2:
            raise ValueError(f"context_length: expected at least 2, start and end; got {self.context_length}")

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids of captions, cut to the context.

        Args:
            texts: n captions.

        Returns: ids n l (int64, padded with 0) and mask n l (bool, true on real tokens, the end included).
        """
        ids = torch.zeros(len(texts), self.context_length, dtype=torch.int64)
        mask = torch.zeros(len(texts), self.context_length, dtype=torch.bool)
        start, end = special_ids()
        for row, text in enumerate(texts):
            tokens = [start, *_tokens(text)[: self.context_length - 2], end]
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = True
        return ids, mask

    def length(self, text: str) -> int:
        """Tokens of a caption before it is cut, start and end included."""
        return len(_tokens(text)) + 2


def special_ids() -> tuple[int, int]:
    """Ids of the start and the end of a text."""
    bpe = _bpe()
    return bpe.sot_token_id, bpe.eot_token_id


@lru_cache(maxsize=_REMEMBERED)
def _tokens(text: str) -> tuple[int, ...]:
    """Ids of a text without start and end."""
    bpe = _bpe()
    # Printable ASCII needs no repair, which takes most of the time: there may be millions of frame captions.
    plain = text.isascii() and text.isprintable() and "&" not in text
    cleaned = " ".join(text.split()).lower() if plain else bpe.clean_fn(text)
    return tuple(token for word in bpe.pat.findall(cleaned) for token in _word(word))


@lru_cache(maxsize=_REMEMBERED)
def _word(word: str) -> tuple[int, ...]:
    """Ids of one word of a cleaned text."""
    bpe = _bpe()
    symbols = "".join(bpe.byte_encoder[byte] for byte in word.encode())
    return tuple(bpe.encoder[part] for part in bpe.bpe(symbols).split(" "))


@lru_cache(maxsize=1)
def _bpe() -> SimpleTokenizer:
    """open_clip's tokenizer, with the special tokens spelled as in the released CLIP."""
    bpe = _open_clip_tokenizer()
    renamed = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    pattern = bpe.pat.pattern
    for theirs, released in renamed.items():
        bpe.encoder[released] = bpe.encoder.pop(theirs)
        bpe.cache[released] = released
        pattern = pattern.replace(theirs, regex.escape(released))
    bpe.pat = regex.compile(pattern, regex.IGNORECASE)
    return bpe


def _open_clip_tokenizer() -> SimpleTokenizer:
    """From its one file: the package around it imports timm and torchvision, slower than torch."""
    package = importlib.util.find_spec("open_clip")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("expected the package open_clip (open_clip_torch), found none")
    path = Path(package.origin).with_name("tokenizer.py")
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer()
