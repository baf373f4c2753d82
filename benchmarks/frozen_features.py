"""Compare training from features of a frozen vision tower with training from frames: time and operations.

    discovla draw data/drawn_world && discovla shard data/drawn_world/manifest.jsonl data/drawn_world/shards
    python benchmarks/frozen_features.py                steps of the quickstart, from frames and from features
    python benchmarks/frozen_features.py operations     counted from the sizes of towers; needs no data

Steps from frames and from features take turns on one thread, on the same batches and from the same weights,
and their losses must be equal bit for bit.  Rows go to benchmarks/results/cpu/frozen-features.jsonl.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script starts with its own folder there

from benchmarks.measure import RESULTS, ROOT, machine, write_row
from discovla.config import read_config
from discovla.data.dataset import ClipDataset, read_clips
from discovla.data.loader import TrainLoader
from discovla.engine.distributed import World
from discovla.engine.optim import make_optimizer
from discovla.features import frozen_loader
from discovla.methods import build
from discovla.train_step import TrainStep
from discovla.trainer import make_loader, parameter_groups

FILE = RESULTS / "cpu/frozen-features.jsonl"
ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Towers of a CLIP: width, layers and MLP width of each, tokens of a frame, and the pooling head.

    pooling: rows whose keys and values an attention head over all tokens computes; 0 where a token is read.
    """

    vision: tuple[int, int, int]
    text: tuple[int, int, int]
    tokens: int
    patch: int
    embed_dim: int
    pooling: int = 0


CLIPS = {
    "ViT-B/32": Sizes(vision=(768, 12, 3072), text=(512, 12, 2048), tokens=50, patch=32, embed_dim=512),
    "ViT-B/16": Sizes(vision=(768, 12, 3072), text=(512, 12, 2048), tokens=197, patch=16, embed_dim=512),
    "ViT-L/14": Sizes(vision=(1024, 24, 4096), text=(768, 12, 3072), tokens=257, patch=14, embed_dim=768),
    # Perception Encoder (arXiv 2504.13181), table 1: core L at 336 pixels, with attention pooling
    "PE-Core-L": Sizes(
        vision=(1024, 24, 4096), text=(1024, 24, 4096), tokens=577, patch=14, embed_dim=1024, pooling=577
    ),
}
FRAMES, CAPTION = 12, 12  # of a clip; tokens of a caption without padding


def tower_flops(tower: tuple[int, int, int], tokens: int) -> float:
    """Return the operations of the blocks' products for one sequence, forward."""
    width, layers, mlp = tower
    return layers * (2 * tokens * (4 * width**2 + 2 * width * mlp) + 4 * tokens**2 * width)


def frame_flops(sizes: Sizes) -> float:
    """Return the operations of encoding one frame."""
    width = sizes.vision[0]
    patches = 2 * (sizes.tokens - 1) * 3 * sizes.patch**2 * width
    pooling = sizes.pooling and 2 * 2 * sizes.pooling * width**2 + 4 * sizes.pooling * width
    return patches + tower_flops(sizes.vision, sizes.tokens) + pooling + 2 * width * sizes.embed_dim


def caption_flops(sizes: Sizes) -> float:
    """Return the operations of a caption whose tower trains in full: forward, and twice that backward."""
    return 3 * (tower_flops(sizes.text, CAPTION) + 2 * sizes.text[0] * sizes.embed_dim)


def operations() -> Iterator[Row]:
    """Yield the operations of a step for each clip with its caption, by the source of the frames."""
    for name, sizes in CLIPS.items():
        frames, caption = FRAMES * frame_flops(sizes), caption_flops(sizes)
        # the basis: four maps a frame, forward and backward by the weights (its input is frozen)
        head = FRAMES * 2 * 2 * 4 * sizes.embed_dim**2
        row = {"kind": "operations", "name": name, "frames": FRAMES, "caption_tokens": CAPTION}
        row |= {"once_gflop": frames / 1e9, "from_features_gflop": (caption + head) / 1e9}
        row["from_frames_gflop"] = (frames + caption + head) / 1e9
        # a vision tower that trains, too: two more passes over it
        row["full_gflop"] = (3 * frames + caption + head) / 1e9
        yield row | {"times_fewer": row["from_frames_gflop"] / row["from_features_gflop"]}


def steps(count: int, words: Sequence[str] = ()) -> Row:
    """Take steps of the quickstart from frames and from features in turn.

    Raises:
        RuntimeError: the losses of a step differ.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        config = read_config(
            ROOT / "configs/quickstart.toml", [f"directory={folder}", "data.workers=0", *words]
        )
        torch.manual_seed(config.seed)
        method = build(config.model, config.method)
        loader = make_loader(config, method, read_clips(config.data, config.data.train_split), ALONE)
        begin = time.process_time()
        cached = frozen_loader(config, method, loader, ALONE)
        once = time.process_time() - begin
        assert isinstance(cached.dataset, ClipDataset), "the clips of the quickstart"
        sources: dict[str, TrainLoader] = {"frames": loader, "features": cached}
        seconds: dict[str, list[float]] = {name: [] for name in sources}
        losses: dict[str, list[float]] = {name: [] for name in sources}
        runs = {}
        for name, source in sources.items():
            step = TrainStep(copy.deepcopy(method), ALONE, "exact")
            optimizer = make_optimizer(step, config.optim, parameter_groups(step.method))
            runs[name] = step, optimizer, source.epoch(0)
        for _ in range(count):
            for name, (step, optimizer, batches) in runs.items():
                begin = time.process_time()
                loss = step(replace(next(batches), valid=None)).total
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                seconds[name].append(time.process_time() - begin)
                losses[name].append(loss.item())
    if losses["frames"] != losses["features"]:
        raise RuntimeError(f"losses: expected {losses['frames']}, found {losses['features']}")
    ratios = sorted(a / b for a, b in zip(seconds["frames"], seconds["features"], strict=True))[1:]
    row = {
        "kind": "steps",
        "name": "quickstart",
        "batch_size": config.batch_size,
        "steps": count,
        "threads": 1,
    }
    row |= {"equal_losses": count, "times_as_fast": statistics.median(ratios)}
    row |= {"least": ratios[0], "most": ratios[-1], "clips_encoded": len(cached.dataset.clips)}
    features = statistics.median(seconds["features"])
    return row | {"encoding_in_steps": once / features}


def main(words: Sequence[str] | None = None) -> int:
    """Measure, and append the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", nargs="?", choices=("steps", "operations"), default="steps")
    parser.add_argument("words", nargs="*", metavar="a.b=c", help="overrides of the quickstart")
    parser.add_argument("--count", type=int, default=20, help="steps from each source")
    parser.add_argument("--results", type=Path, default=FILE)
    options = parser.parse_args(words)
    rows = operations() if options.part == "operations" else [steps(options.count, options.words)]
    for row in rows:
        write_row(options.results, row | machine("cpu"))
        print(row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
