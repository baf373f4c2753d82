"""Figures of a method on the drawn world: retrieval, choices between captions, flips, distillation."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from discovla.batch import Embedding
from discovla.data.config import DataConfig
from discovla.data.loader import text_batches, video_batches
from discovla.data.manifest import Clip, read_manifest
from discovla.data.order import OrderWords
from discovla.data.tokens import Tokenizer
from discovla.drawn_world.drawing import COLOURS, PLACES, RADII, SHAPES, Thing, expose, ground, picture
from discovla.drawn_world.probes import Probe, make_probes
from discovla.drawn_world.scenes import centre, make_scene, other, pick
from discovla.drawn_world.stills import LOOK
from discovla.drawn_world.synthetic import WorldSizes, draw_world
from discovla.methods.base import Method
from discovla.methods.discovla import DiscoVLA
from discovla.ops.frame_similarity import frame_similarity
from discovla.retrieval.embed import embed_texts, embed_videos, evaluating
from discovla.retrieval.metrics import retrieval_metrics

SPLITS = ("val", "test", "siblings")
IMAGE_SIZE = 64  # of the drawn CLIP
PROBES = 10  # scored at once; a method that reads pairs one by one computes few pairs beyond the probes
BATCH = 48  # clips whose softmax rows give the entropies: a training batch


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Clips with one caption each, decoded: batches of frames (b f y x c) with their masks."""

    texts: list[str]
    videos: list[tuple[Tensor, Tensor]]

    @staticmethod
    def read(clips: Sequence[Clip], data: DataConfig) -> Gallery:
        """Decode clips."""
        batches = video_batches(clips, data, IMAGE_SIZE, 100)
        return Gallery(
            texts=[clip.captions[0] for clip in clips],
            videos=[(batch.frames, batch.frame_mask) for batch in batches],
        )

    def backwards(self) -> list[tuple[Tensor, Tensor]]:
        """Return the videos with their frames in reverse order."""
        return [(frames.flip(1), mask.flip(1)) for frames, mask in self.videos]


@dataclass(frozen=True, kw_only=True)
class DrawnEvaluation:
    """Clips and probes that methods are measured on, read once."""

    manifest: Path
    data: DataConfig
    fresh_clips: int = 300
    """Clips of another world on which DiscoVLA's teacher and student are compared; 0 for no comparison."""

    @cached_property
    def galleries(self) -> dict[str, Gallery]:
        return {name: Gallery.read(read_manifest(self.manifest, split=name), self.data) for name in SPLITS}

    @cached_property
    def probes(self) -> list[Probe]:
        world = json.loads((self.manifest.parent / "world.json").read_text())
        return make_probes(world["seed"], "test", world["sizes"]["test"])

    @cached_property
    def fresh(self) -> tuple[Gallery, list[str]]:
        """Clips that no run has trained on, and the still captions of all their frames."""
        sizes = WorldSizes(train=self.fresh_clips, val=0, test=0, siblings=0)
        with tempfile.TemporaryDirectory() as folder:
            clips = read_manifest(draw_world(Path(folder), seed=1_000, sizes=sizes, workers=1))
            gallery = Gallery.read(clips, self.data)
        stills = [clip.frame_captions[0] for clip in clips if clip.frame_captions is not None]
        return gallery, [text for texts in stills if texts is not None for text in texts]


def measure(method: Method, evaluation: DrawnEvaluation) -> dict[str, Any]:
    """Return all figures of a method.

    `flip` is the largest relative change of a video's feature when its clip is reversed.
    """
    figures: dict[str, Any] = {}
    for name, gallery in evaluation.galleries.items():
        video = embed_videos(method, gallery.videos, "cpu")
        figures[name] = retrieval(method, gallery, video)
        if name == "test":
            reversed_video = embed_videos(method, gallery.backwards(), "cpu")
            change = (video.pooled - reversed_video.pooled).norm(dim=-1) / video.pooled.norm(dim=-1)
            figures["flip"] = change.max().item()
            figures["probes"] = choices(method, evaluation.probes, video, reversed_video)
    if isinstance(method, DiscoVLA) and evaluation.fresh_clips:
        figures["judges"] = _teacher_and_student(method, *evaluation.fresh)
    return figures


def retrieval(method: Method, gallery: Gallery, video: Embedding | None = None) -> dict[str, Any]:
    """Return the retrieval metrics of a gallery in both directions; video: its embedding, if it is known."""
    video = embed_videos(method, gallery.videos, "cpu") if video is None else video
    metrics = retrieval_metrics(_scores(method, _texts(method, gallery.texts), video).numpy())
    return {way: {k: v for k, v in metrics[way].items() if k != "optimistic"} for way in ("t2v", "v2t")}


def choices(
    method: Method, probes: Sequence[Probe], video: Embedding, reversed_video: Embedding
) -> dict[str, Any]:
    """Return by kind the number of probes, and in percent how often the true caption is preferred.

    `clip` counts on the clip of a probe, `control` on its control clip.

    Args:
        video, reversed_video: all clips of the split, played forwards and backwards.
    """
    true, false = _texts(method, [p.true for p in probes]), _texts(method, [p.false for p in probes])
    preferred: dict[str, list[tuple[bool, bool]]] = {}  # kind -> on the clip, on the control
    for block in torch.arange(len(probes)).split(PROBES):
        chosen = [probes[i] for i in block.tolist()]
        places = sorted({place for p in chosen for place in (p.clip, p.control)})
        true_block, false_block = (side.map(lambda x, block=block: x[block]) for side in (true, false))
        prefers = []
        for played in (video, reversed_video):
            clips = played.map(lambda x, places=places: x[places])
            prefers.append(_scores(method, true_block, clips) > _scores(method, false_block, clips))
        for i, p in enumerate(chosen):
            row = prefers[int(p.played_backwards)][i]
            on_clip, on_control = (bool(row[places.index(place)]) for place in (p.clip, p.control))
            preferred.setdefault(p.kind, []).append((on_clip, on_control))
    return {
        kind: {
            "count": len(answers),
            "clip": 100 * sum(on_clip for on_clip, _ in answers) / len(answers),
            "control": 100 * sum(on_control for _, on_control in answers) / len(answers),
        }
        for kind, answers in preferred.items()
    }


def reversal_by_event(method: Method, evaluation: DrawnEvaluation) -> dict[str, dict[str, float]]:
    """Return the choices of the reversal probes for clips both of whose actors have one kind of event.

    Equal scores count as half.  "all" are all clips; "moves" are clips whose changes are moves alone.
    """
    world = json.loads((evaluation.manifest.parent / "world.json").read_text())
    gallery = evaluation.galleries["test"]
    probes = [probe for probe in evaluation.probes if probe.kind == "reversal"]
    true, false = (_texts(method, [getattr(p, side) for p in probes]) for side in ("true", "false"))
    videos = [embed_videos(method, x, "cpu") for x in (gallery.videos, gallery.backwards())]
    totals: dict[str, list[float]] = {}
    for number, probe in enumerate(probes):
        video = videos[probe.played_backwards][slice(probe.clip, probe.clip + 1)]
        rows = slice(number, number + 1)
        margin = (_scores(method, true[rows], video) - _scores(method, false[rows], video)).item()
        # the two captions of a method that is blind to order have equal scores up to rounding
        point = 0.5 if abs(margin) < 1e-4 else float(margin > 0)
        kinds = {actor.kind for actor in make_scene(world["seed"], "test", probe.clip).actors} - {"stays"}
        for name in ("all", next(iter(kinds)) if len(kinds) == 1 else "several kinds"):
            totals.setdefault(name, []).append(point)
    return {name: {"count": len(x), "clip": 100 * sum(x) / len(x)} for name, x in sorted(totals.items())}


def caption_changes(method: Method, captions: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return for each kind of change the number of captions and their mean cosine with the changed ones."""
    places, colours = OrderWords(places_only=True), list(COLOURS)
    changed: dict[str, list[tuple[str, str]]] = {}

    def add(name: str, caption: str, other: str | None) -> None:
        if other is not None and other != caption:
            changed.setdefault(name, []).append((caption, other))

    for text in captions:
        if re.search(r"from the [a-z ]+ to the", text):
            add("from P to Q: the places exchanged", text, places.exchanged(text, 0))
        swapped = re.sub(r"\b(dis)?appears", lambda m: "appears" if m[1] else "disappears", text)
        add("appears and disappears exchanged", text, swapped)
        first, then, second = text.partition(" then ")
        add("A then B: the events exchanged", text, f"{second}{then}{first}" if then else None)
        named = next(word for word in text.split() if word in colours)
        other = colours[(colours.index(named) + 1) % len(colours)]
        add("one colour changed", text, text.replace(named, other, 1))
    cosines = {}
    for name, pairs in changed.items():
        one, two = (_texts(method, side).pooled for side in zip(*pairs, strict=True))
        cosine = torch.nn.functional.cosine_similarity(one, two).mean().item()
        cosines[name] = {"count": len(pairs), "cosine": cosine}
    return cosines


def still_centres(method: Method, *, captions: int = 40, stills: int = 32) -> dict[str, float]:
    """Compare the stills that a caption of a move describes with those of the same caption after a change.

    Contrastive training draws a caption towards the mean feature of its stills, and captions whose stills are
    alike towards each other.

    Args:
        captions: moves of one object from P to Q.  stills: pictures whose unit features are averaged.

    Returns:
        Mean cosines with the mean of the stills of a caption that shows P or Q by chance, as in the drawn
        CLIP's pretraining: of other stills of the caption, of the stills of the exchanged caption, and of the
        caption with another colour; and that of a caption and its exchange if every still shows the end.
    """
    rng, colours = np.random.default_rng(0), list(COLOURS)
    sums = dict.fromkeys(
        ("drawn again", "places exchanged", "places exchanged, ends", "one colour changed"), 0.0
    )
    for _ in range(captions):
        shape, colour = pick(rng, SHAPES), pick(rng, colours)
        p, q = (list(PLACES)[i] for i in rng.choice(len(PLACES), 2, replace=False))
        drawn = {
            "first": (colour, (p, q)),
            "drawn again": (colour, (p, q)),
            "places exchanged": (colour, (q, p)),
            "one colour changed": (other(rng, colours, colour), (p, q)),
            "end": (colour, (q,)),
            "places exchanged, ends": (colour, (p,)),
        }
        centres = {
            name: _still_centre(method, shape, colour, places, stills, rng)
            for name, (colour, places) in drawn.items()
        }
        for name in sums:
            first = centres["end" if name.endswith("ends") else "first"]
            sums[name] += torch.nn.functional.cosine_similarity(first, centres[name], dim=0).item()
    return {name: total / captions for name, total in sums.items()}


def _still_centre(
    method: Method, shape: str, colour: str, places: Sequence[str], stills: int, rng: np.random.Generator
) -> Tensor:
    """Return the mean unit feature, d, of stills that show an object at one of the places, by chance."""
    pictures = []
    for _ in range(stills):
        x, y = centre(rng, pick(rng, places))
        thing = Thing(shape=shape, colour=colour, x=x, y=y, radius=RADII[pick(rng, list(RADII))])
        pictures.append(expose(picture(ground(rng, LOOK), [thing]), rng, LOOK))
    frames = torch.from_numpy(np.stack(pictures))[:, None]  # n 1 y x 3
    with evaluating(method):
        features = method.encode_frames(frames, torch.ones(stills, 1, dtype=torch.bool))[:, 0]
    return torch.nn.functional.normalize(features, dim=-1).mean(0)


@torch.no_grad()
def _teacher_and_student(method: DiscoVLA, gallery: Gallery, stills: Sequence[str]) -> dict[str, float]:
    """Compare the frame-level similarity (the teacher) and the video-level one (the student) in retrieval.

    The entropies, in nats, are those of the softmax rows over the first BATCH clips.
    """
    method.eval()
    frames = [(method.encode_video(*batch).frames, batch[1]) for batch in gallery.videos]
    video_frames = torch.cat([f for f, _ in frames if f is not None])  # v f d
    mask, count = torch.cat([m for _, m in frames]), video_frames.shape[1]
    tokenizer = Tokenizer(method.architecture.context_length)
    captions = []
    for i in range(0, len(stills), 100 * count):
        ids, ids_mask = tokenizer.encode(stills[i : i + 100 * count])
        captions.append(method.text(ids, ids_mask, group=count).unflatten(0, (-1, count)))
    scale = method.logit_scale()
    teacher = scale * frame_similarity(
        torch.cat(captions), video_frames, scale, text_mask=mask, video_mask=mask
    )
    student = _scores(method, _texts(method, gallery.texts), embed_videos(method, gallery.videos, "cpu"))
    figures = {}
    for name, scores in (("teacher", teacher), ("student", student)):
        rows = scores[:BATCH, :BATCH].softmax(-1)
        figures[f"{name} R@1"] = retrieval_metrics(scores.numpy())["t2v"]["R@1"]
        figures[f"{name} entropy"] = -(rows * rows.clamp(min=1e-30).log()).sum(-1).mean().item()
    return figures


def _texts(method: Method, texts: Sequence[str]) -> Embedding:
    return embed_texts(method, text_batches(texts, method.architecture.context_length, 500), "cpu")


def _scores(method: Method, text: Embedding, video: Embedding) -> Tensor:
    with evaluating(method):
        return method.similarity(text, video)
