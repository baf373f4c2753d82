"""What a method is measured on in the drawn world: retrieval, two-way choices, flip, teacher and student."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from discovla.batch import Embedding
from discovla.data.loader import DataConfig, text_batches, video_batches
from discovla.data.manifest import Clip, read_manifest
from discovla.data.tokens import Tokenizer
from discovla.drawn_world.probes import Probe, make_probes
from discovla.drawn_world.synthetic import WorldSizes, draw_world
from discovla.methods.base import Method
from discovla.methods.discovla import DiscoVLA
from discovla.ops.frame_similarity import frame_similarity
from discovla.retrieval.embed import embed_texts, embed_videos, evaluating
from discovla.retrieval.metrics import retrieval_metrics

SPLITS = ("val", "test", "siblings")
PROBES = 10  # that are asked at once: a method that reads pairs one by one reads few that nobody asked for
BATCH = 48  # clips whose softmax rows are looked at: those of one step of the ablation


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Clips with one caption each, decoded: frames b f y x c and their mask in batches."""

    texts: list[str]
    videos: list[tuple[Tensor, Tensor]]

    @staticmethod
    def of(clips: Sequence[Clip], data: DataConfig, image_size: int) -> Gallery:
        batches = video_batches(clips, data, image_size, 100)
        return Gallery(
            texts=[clip.captions[0] for clip in clips], videos=[(b.frames, b.frame_mask) for b in batches]
        )

    def backwards(self) -> list[tuple[Tensor, Tensor]]:
        """The videos with their frames in reverse order."""
        return [(frames.flip(1), mask.flip(1)) for frames, mask in self.videos]


@dataclass(frozen=True, kw_only=True)
class Exam:
    """What every method is measured on, read once.

    manifest: of the drawn world.  judge_count: how many fresh clips teacher and student are compared on; none
    for 0.
    """

    manifest: Path
    data: DataConfig
    image_size: int
    judge_count: int = 300

    @cached_property
    def galleries(self) -> dict[str, Gallery]:
        clips = {name: read_manifest(self.manifest, split=name) for name in SPLITS}
        return {name: Gallery.of(clips[name], self.data, self.image_size) for name in SPLITS}

    @cached_property
    def probes(self) -> list[Probe]:
        world = json.loads((self.manifest.parent / "world.json").read_text())
        return make_probes(world["seed"], "test", world["sizes"]["test"])

    @cached_property
    def judges(self) -> tuple[Gallery, list[str]]:
        """Clips of another world, which no run has seen, and the still captions of all their frames."""
        sizes = WorldSizes(train=self.judge_count, val=0, test=0, siblings=0)
        with tempfile.TemporaryDirectory() as folder:
            clips = read_manifest(draw_world(Path(folder), seed=1_000, sizes=sizes, workers=1))
            gallery = Gallery.of(clips, self.data.model_copy(update={"cache": None}), self.image_size)
        stills = [clip.frame_captions[0] for clip in clips if clip.frame_captions is not None]
        return gallery, [text for texts in stills if texts is not None for text in texts]


def measure(method: Method, exam: Exam) -> dict[str, Any]:
    """All figures of a method."""
    figures: dict[str, Any] = {}
    for name, gallery in exam.galleries.items():
        text, video = _texts(method, gallery.texts), embed_videos(method, gallery.videos, "cpu")
        metrics = retrieval_metrics(_scores(method, text, video).numpy())
        figures[name] = {
            way: {k: v for k, v in metrics[way].items() if k != "optimistic"} for way in ("t2v", "v2t")
        }
        if name == "test":
            back = embed_videos(method, gallery.backwards(), "cpu")
            moved = (video.pooled - back.pooled).norm(dim=-1) / video.pooled.norm(dim=-1)
            figures["flip"] = moved.max().item()
            figures["probes"] = choices(method, exam.probes, video, back)
    if isinstance(method, DiscoVLA) and exam.judge_count:
        figures["judges"] = _teacher(method, *exam.judges)
    return figures


def choices(method: Method, probes: Sequence[Probe], video: Embedding, back: Embedding) -> dict[str, Any]:
    """How often the true of two captions is preferred, in percent: on its clip, and on the control clip.

    Args:
        video, back: the clips of the split, played forwards and backwards.
    """
    true, false = _texts(method, [p.true for p in probes]), _texts(method, [p.false for p in probes])
    preferred: dict[str, list[tuple[bool, bool]]] = {}  # kind -> on the clip, on the control
    for block in torch.arange(len(probes)).split(PROBES):
        asked = [probes[i] for i in block.tolist()]
        places = sorted({place for p in asked for place in (p.clip, p.control)})
        sides = true.map(lambda x, block=block: x[block]), false.map(lambda x, block=block: x[block])
        prefers = []
        for played in (video, back):
            clips = played.map(lambda x, places=places: x[places])
            prefers.append(_scores(method, sides[0], clips) > _scores(method, sides[1], clips))
        for i, p in enumerate(asked):
            row = prefers[int(p.played_backwards)][i]
            found = tuple(row[places.index(place)].item() for place in (p.clip, p.control))
            preferred.setdefault(p.kind, []).append(found)  # type: ignore[arg-type]
    return {kind: {"count": len(found), **_shares(found)} for kind, found in preferred.items()}


def _shares(found: Sequence[tuple[bool, bool]]) -> dict[str, float]:
    """In percent."""
    return {name: 100 * sum(x[i] for x in found) / len(found) for i, name in enumerate(("clip", "control"))}


@torch.no_grad()
def _teacher(method: DiscoVLA, gallery: Gallery, stills: Sequence[str]) -> dict[str, float]:
    """The frame-level similarity (the teacher) and the video-level one (the student) as retrievers.

    Also the entropy of their softmax rows over the first batch of clips, in nats: how much either spreads.
    """
    method.eval()
    frames = [(method.encode_video(*batch).frames, batch[1]) for batch in gallery.videos]
    video_frames = torch.cat([f for f, _ in frames if f is not None])  # v j d
    mask, count = torch.cat([m for _, m in frames]), video_frames.shape[1]
    tokenizer = Tokenizer(method.architecture.context_length)
    captions = []
    for i in range(0, len(stills), 100 * count):
        ids, kept = tokenizer.encode(stills[i : i + 100 * count])
        captions.append(method.text(ids, kept, group=count).unflatten(0, (-1, count)))
    scale = method.logit_scale()
    teacher = scale * frame_similarity(
        torch.cat(captions), video_frames, scale, text_mask=mask, video_mask=mask
    )
    student = _scores(method, _texts(method, gallery.texts), embed_videos(method, gallery.videos, "cpu"))
    found = {}
    for name, scores in (("teacher", teacher), ("student", student)):
        rows = scores[:BATCH, :BATCH].softmax(-1)
        found[f"{name} R@1"] = retrieval_metrics(scores.numpy())["t2v"]["R@1"]
        found[f"{name} entropy"] = -(rows * rows.clamp(min=1e-30).log()).sum(-1).mean().item()
    return found


def _texts(method: Method, texts: Sequence[str]) -> Embedding:
    return embed_texts(method, text_batches(texts, method.architecture.context_length, 500), "cpu")


def _scores(method: Method, text: Embedding, video: Embedding) -> Tensor:
    with evaluating(method):
        return method.similarity(text, video)
