"""Choices that only the order of frames decides: a clip or its reverse, a caption or a false one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from discovla import terminal
from discovla.batch import Embedding
from discovla.data.loader import text_batches, video_batches
from discovla.data.manifest import Clip
from discovla.data.order import read_order_words
from discovla.evaluate import EvalOptions
from discovla.methods.base import Method, reverse_frames
from discovla.retrieval.embed import concatenate, embed_texts, embed_videos, evaluating

TIE = 1e-5  # difference, as a share of the largest score, below which rounding would decide: a tie
CHANGES = ("none", "reversed", "shuffled")


def measure_order(method: Method, clips: Sequence[Clip], options: EvalOptions) -> dict[str, Any]:
    """Measure choices on the captions of clips that tell order (`data.order_words`); a tie counts as half.

    Returns:
        For `reversed` and `shuffled` how often a caption fits its clip better than its clip with frames in
        that order, for `swapped` how often a clip fits its caption better than an exchange of it: `percent`,
        `count`, and the same for the captions with each phrase in `by_phrase`.

    Raises:
        ValueError: no caption tells order.
        DecodeError: a clip cannot be decoded.
    """
    words = read_order_words(options.data.order_words)
    rows = [(i, text) for i, clip in enumerate(clips) for text in clip.captions if words.tells_order(text)]
    if not rows:
        raise ValueError(f"order: expected captions that tell order, found none in {len(clips)} clips")
    texts, places = [text for _, text in rows], torch.tensor([i for i, _ in rows])
    phrases = [words.phrases(text) for text in texts]
    videos = _videos(method, clips, options)
    text, seen = _texts(method, texts, options), videos["none"][places]
    true, results = _scores(method, text, seen, options), {}
    for name in CHANGES[1:]:
        results[name] = _summary(true, _scores(method, text, videos[name][places], options), phrases)
    exchanges = [(row, false) for row, caption in enumerate(texts) for false in words.exchanges_of(caption)]
    if exchanges:
        at = torch.tensor([row for row, _ in exchanges])
        false = _scores(
            method, _texts(method, [caption for _, caption in exchanges], options), seen[at], options
        )
        results["swapped"] = _summary(true[at], false, [phrases[row] for row, _ in exchanges])
    return results


def order_table(results: Mapping[str, Any]) -> str:
    """Format the choices as a table, one line a phrase with ten captions or more."""
    names = list(results)
    counts = {phrase: x["count"] for phrase, x in results[names[0]]["by_phrase"].items()}
    shown = sorted((p for p, n in counts.items() if n >= 10), key=lambda p: -counts[p])
    lines = [("captions that tell order", {name: results[name] for name in names})]
    lines += [(f"  with {p!r}", {name: results[name]["by_phrase"].get(p) for name in names}) for p in shown]
    width = max(len(label) for label, _ in lines)
    head = " " * width + "".join(f"{name:>18}" for name in names)
    body = [
        f"{label:<{width}}"
        + "".join(
            f"{'-':>18}" if x is None else f"{x['percent']:10.1f} ({x['count']:5})" for x in cells.values()
        )
        for label, cells in lines
    ]
    return "\n".join([head, *body])


def _videos(method: Method, clips: Sequence[Clip], options: EvalOptions) -> dict[str, Embedding]:
    """Embed all clips in each order of CHANGES; they are decoded once."""
    parts: dict[str, list[Embedding]] = {name: [] for name in CHANGES}
    size = method.architecture.image_size
    batches = video_batches(clips, options.data, size, options.batch_size)
    with terminal.progress(options.name, len(clips), "clips") as bar:
        for batch in terminal.counted(batches, bar):
            for name, embedded in parts.items():
                frames = _ordered(batch.frames, batch.frame_mask, name)
                embedded.append(embed_videos(method, [(frames, batch.frame_mask)], options.device))
    return {name: concatenate(embedded) for name, embedded in parts.items()}


def _ordered(frames: Tensor, mask: Tensor, change: str) -> Tensor:
    """Return the frames b f ... in another order: padded frames stay, a shuffle always moves a frame."""
    if change == "none":
        return frames
    if change == "reversed":
        return reverse_frames(frames, mask)
    shuffled = frames.clone()
    for number, real in enumerate(mask):
        places = real.nonzero()[:, 0]
        generator = torch.Generator().manual_seed(number)
        order = torch.randperm(len(places), generator=generator)
        if len(order) > 1 and torch.equal(order, torch.arange(len(order))):
            order = order.roll(1)
        shuffled[number, places] = frames[number, places[order]]
    return shuffled


def _texts(method: Method, captions: Sequence[str], options: EvalOptions) -> Embedding:
    batches = text_batches(captions, options.data.context_length, options.batch_size, options.data.tokenizer)
    return embed_texts(method, batches, options.device)


def _scores(method: Method, text: Embedding, video: Embedding, options: EvalOptions) -> Tensor:
    """Return the scores n of caption i with video i, in float64."""
    parts = []
    with evaluating(method):
        for rows in torch.arange(len(text)).split(options.batch_size):
            own_text, own_video = (side[rows].to(options.device) for side in (text, video))
            parts.append(method.pair_scores(own_text, own_video).double().cpu())
    return torch.cat(parts)


def _summary(true: Tensor, false: Tensor, phrases: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Count how often the true side scores higher, over all rows and over those with each phrase."""
    tied = (true - false).abs() <= TIE * torch.maximum(true.abs(), false.abs()).max()
    points = torch.where(tied, 0.5, (true > false).double()).tolist()
    by_phrase: dict[str, list[float]] = {}
    for point, found in zip(points, phrases, strict=True):
        for phrase in found:
            by_phrase.setdefault(phrase, []).append(point)

    def percent(x: Sequence[float]) -> dict[str, float]:
        return {"percent": 100 * sum(x) / len(x), "count": len(x)}

    return {**percent(points), "by_phrase": {name: percent(x) for name, x in sorted(by_phrase.items())}}
