"""Draw docs/assets/time.svg: clips and their reverses, and which of the two a caption fits better.

    make train                                          trains the quickstart, and draws its clips
    python benchmarks/time_picture.py runs/quickstart

The clips are the first of the test split with events of the kinds in KINDS; none is selected by its scores.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script starts with its own folder there

from benchmarks.measure import ROOT
from discovla.data.loader import text_batches, video_batches
from discovla.data.manifest import read_manifest
from discovla.drawn_world.scenes import backwards, make_scene
from discovla.drawn_world.wording import phrase, tell
from discovla.methods import build
from discovla.methods.base import Method, reverse_frames
from discovla.model import load_run
from discovla.retrieval.embed import embed_texts, embed_videos, evaluating

KINDS = (("moves", "moves"), ("appears", "moves"), ("turns", "turns"))  # events of both actors
FRAME, BARS, LINE, WIDTH = 56, 230, 18, 760  # pixels
FONT = 'font-family="system-ui, sans-serif" font-size="12"'


@dataclass(frozen=True, kw_only=True)
class Story:
    """A clip played in one direction, with a caption that is true of it.

    frames: f y x 3, uint8.  before, after: share, 0 to 1, of the clip in the softmax of the caption's scores
    with it and with its reverse, without training and with it.
    """

    caption: str
    frames: np.ndarray
    before: float
    after: float


def first_clips(seed: int, count: int) -> list[int]:
    """Return the first clip of the test split for each of KINDS.

    Raises:
        ValueError: there is none.
    """
    kinds = [tuple(sorted(a.kind for a in make_scene(seed, "test", i).actors)) for i in range(count)]
    missing = [" and ".join(kind) for kind in KINDS if kind not in kinds]
    if missing:
        raise ValueError(f"clips: expected one with {missing[0]}, found none in {count}")
    return [kinds.index(kind) for kind in KINDS]


def stories(run: Path, manifest: Path) -> list[Story]:
    """Score the clips and their reverses with the method of a run, before and after training."""
    loaded = load_run(run)
    torch.manual_seed(loaded.config.seed)
    untrained = build(loaded.config.model, loaded.config.method)
    world = json.loads((manifest.parent / "world.json").read_text())
    places = first_clips(world["seed"], world["sizes"]["test"])
    clips = [read_manifest(manifest, split="test")[i] for i in places]
    data = loaded.config.data.model_copy(update={"workers": 0, "shards": None, "manifest": manifest})
    batch = next(iter(video_batches(clips, data, loaded.method.architecture.image_size, len(clips))))
    shown = {False: batch.frames, True: reverse_frames(batch.frames, batch.frame_mask)}
    made = []
    for number, place in enumerate(places):
        scene = make_scene(world["seed"], "test", place)
        for played_backwards in (False, True):
            caption = phrase(tell(backwards(scene) if played_backwards else scene))
            one = slice(number, number + 1)
            both = [shown[side][one] for side in (played_backwards, not played_backwards)]
            shares = [share(m, caption, both, batch.frame_mask[one]) for m in (untrained, loaded.method)]
            frames = both[0][0].numpy()
            made.append(Story(caption=caption, frames=frames, before=shares[0], after=shares[1]))
    return made


def share(method: Method, caption: str, videos: Sequence[Tensor], mask: Tensor) -> float:
    """Return the share of the first of two videos, 1 f y x 3, in the softmax of a caption's scores."""
    text = embed_texts(method, text_batches([caption], method.architecture.context_length, 1), "cpu")
    embedded = [embed_videos(method, [(frames, mask)], "cpu") for frames in videos]
    with evaluating(method):
        scores = torch.cat([method.similarity(text, video)[0] for video in embedded])
    return scores.softmax(0)[0].item()


def svg(told: Sequence[Story]) -> str:
    """Return the picture: a strip of frames for each story, with its caption above and two bars beside it."""
    step = FRAME + 2 * LINE
    height = step * len(told) + LINE
    body = [line for number, story in enumerate(told) for line in _strip(story, number * step + LINE)]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" {FONT}>'
    return "\n".join([head, f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>', *body, "</svg>\n"])


def _strip(story: Story, top: int) -> Iterator[str]:
    """Yield the elements of one story."""
    yield f'<text x="4" y="{top}">{html.escape(story.caption)}</text>'
    y = top + LINE // 2
    for number, frame in enumerate(story.frames):
        file = io.BytesIO()
        Image.fromarray(frame).save(file, "JPEG", quality=85)
        code = base64.b64encode(file.getvalue()).decode()
        place = f'x="{4 + number * (FRAME + 2)}" y="{y}" width="{FRAME}" height="{FRAME}"'
        yield f'<image {place} href="data:image/jpeg;base64,{code}"/>'
    left = WIDTH - BARS - 16
    for row, (name, value, colour) in enumerate(
        (("before", story.before, "#999"), ("after", story.after, "#3949ab"))
    ):
        bar = y + 6 + row * (FRAME // 2)
        length, middle = BARS - 95, left + 50
        yield f'<text x="{left}" y="{bar + 12}">{name}</text>'
        yield f'<rect x="{middle}" y="{bar}" width="{length}" height="16" fill="#eee"/>'
        yield f'<rect x="{middle}" y="{bar}" width="{value * length:.1f}" height="16" fill="{colour}"/>'
        yield f'<text x="{middle + length + 6}" y="{bar + 12}">{100 * value:.0f} %</text>'
    half = left + 50 + (BARS - 95) / 2
    yield f'<line x1="{half}" x2="{half}" y1="{y}" y2="{y + FRAME}" stroke="#555" stroke-dasharray="3 2"/>'


def main(words: Sequence[str] | None = None) -> int:
    """Draw the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="directory of a trained quickstart")
    parser.add_argument("--manifest", type=Path, default=ROOT / "data/drawn_world/manifest.jsonl")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/assets/time.svg")
    options = parser.parse_args(words)
    options.out.write_text(svg(stories(options.run, options.manifest)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
