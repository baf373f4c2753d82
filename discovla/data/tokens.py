"""Tokenization of captions: by CLIP's byte-pair encoding, or by a tokenizer of Hugging Face."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import regex
import torch
from torch import Tensor

if TYPE_CHECKING:
    from open_clip import SimpleTokenizer


@dataclass(frozen=True, kw_only=True)
class LibraryKind:
    """A tokenizer that the package `tokenizers` reads from a file.

    source: repository on Hugging Face's hub that has its tokenizer.json.
    padding: id of padding.
    canonical: lower-case texts and remove punctuation before, as open_clip does for SigLIP.
    zeroed: id that is replaced by 0 in every caption; None for none.
    """

    source: str
    padding: int
    canonical: bool = False
    zeroed: int | None = None


LIBRARY_KINDS = {
    "siglip": LibraryKind(source="timm/ViT-B-16-SigLIP", padding=1, canonical=True),
    "siglip-i18n": LibraryKind(source="timm/ViT-B-16-SigLIP-i18n-256", padding=1, canonical=True),
    "gemma": LibraryKind(source="timm/ViT-B-16-SigLIP2", padding=0, canonical=True),
    "xlm-v": LibraryKind(source="facebook/xlm-v-base", padding=1),
    "mt5": LibraryKind(source="google/mt5-base", padding=0, canonical=True),
    "bert": LibraryKind(source="bert-base-uncased", padding=0, zeroed=102),
}
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


@dataclass(frozen=True)
class LibraryTokenizer:
    """A tokenizer of Hugging Face, with open_clip's cleaning of texts.

    ids = what the file's post-processor makes of the tokens, cut to context_length, then padding.

    Args:
        context_length: tokens of a row, special ones included, at least 2.
        kind: a key of `LIBRARY_KINDS`.
        file: its tokenizer.json; None downloads it once.
    """

    context_length: int
    kind: str
    file: str | None = None

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return the token ids of captions, cut to the context; see `Tokenizer.encode`."""
        kind, length = LIBRARY_KINDS[self.kind], self.context_length
        tokens = _library(self.kind, self.file)
        tokens.enable_truncation(length)
        rows = [encoding.ids for encoding in tokens.encode_batch([_cleaned(text, kind) for text in texts])]
        ids = torch.tensor([row + [kind.padding] * (length - len(row)) for row in rows], dtype=torch.int64)
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        ids, mask = ids.view(len(rows), length), torch.arange(length) < lengths[:, None]
        return ids if kind.zeroed is None else ids.masked_fill(ids == kind.zeroed, 0), mask

    def length(self, text: str) -> int:
        """Return the number of tokens of a caption before it is cut, special ones included."""
        tokens = _library(self.kind, self.file)
        tokens.no_truncation()
        return len(tokens.encode(_cleaned(text, LIBRARY_KINDS[self.kind])).ids)


CaptionTokenizer = Tokenizer | LibraryTokenizer


def make_tokenizer(context_length: int, tokenizer: str = "clip") -> CaptionTokenizer:
    """Return a tokenizer by its name in `DataConfig.tokenizer`.

    Raises:
        ValueError: no such tokenizer.
    """
    kind, file = split_tokenizer(tokenizer)
    return Tokenizer(context_length) if kind == "clip" else LibraryTokenizer(context_length, kind, file)


def split_tokenizer(tokenizer: str) -> tuple[str, str | None]:
    """Return the kind of a tokenizer and its file, from "KIND" or "KIND:FILE".

    Raises:
        ValueError: an unknown kind, or a file for CLIP's tokenizer.
    """
    kind, _, file = tokenizer.partition(":")
    known = ("clip", *LIBRARY_KINDS)
    if kind not in known or (kind == "clip" and file):
        raise ValueError(
            f"expected one of {', '.join(known)}, or KIND:FILE but for clip, found {tokenizer!r}"
        )
    return kind, file or None


def _cleaned(text: str, kind: LibraryKind) -> str:
    """Return a text as open_clip cleans it."""
    return _open_clip_tokenizers().get_clean_fn("canonicalize" if kind.canonical else "whitespace")(text)


@lru_cache(maxsize=4)
def _library(kind: str, file: str | None) -> Any:
    """Load the tokenizer of a kind from a file, or from the hub.

    Raises:
        ValueError: no file, no connection, or the package is not installed; the message says what to do.
    """
    if importlib.util.find_spec("tokenizers") is None:
        raise ValueError(f"data.tokenizer={kind!r}: expected the package tokenizers: pip install tokenizers")
    from tokenizers import Tokenizer as Library

    source = LIBRARY_KINDS[kind].source
    if file is None:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError

        try:
            file = hf_hub_download(source, "tokenizer.json", etag_timeout=5)
        except (OSError, HfHubHTTPError):
            raise ValueError(
                f"data.tokenizer={kind!r}: expected tokenizer.json in the cache or from "
                f"https://huggingface.co/{source}, found no connection; download it elsewhere and set "
                f"data.tokenizer={kind}:/path/to/tokenizer.json"
            ) from None
    if not Path(file).is_file():
        raise ValueError(f"data.tokenizer: expected a tokenizer.json, found no file {file}")
    tokens = Library.from_file(str(file))
    tokens.no_padding()
    return tokens


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
    bpe = _open_clip_tokenizers().SimpleTokenizer()
    renamed = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    pattern = bpe.pat.pattern
    for open_clip_name, name in renamed.items():
        bpe.encoder[name] = bpe.encoder.pop(open_clip_name)
        bpe.cache[name] = name
        pattern = pattern.replace(open_clip_name, regex.escape(name))
    bpe.pat = regex.compile(pattern, regex.IGNORECASE)
    return bpe


@lru_cache(maxsize=1)
def _open_clip_tokenizers() -> ModuleType:
    """Load open_clip's module of tokenizers from its file; the package imports timm and torchvision too."""
    package = importlib.util.find_spec("open_clip")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("expected the package open_clip (open_clip_torch), found none")
    path = Path(package.origin).with_name("tokenizer.py")
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
