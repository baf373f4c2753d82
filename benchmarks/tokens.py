"""Tokens, operations and times of a vision tower that merges tokens.

    python benchmarks/tokens.py           counted from the sizes alone
    python benchmarks/tokens.py times     CPU times of a training step, and of embedding a clip for an index

One row for each backbone and setting, of one clip of 12 frames.  Times are of one thread and in process CPU
time; the settings take turns, and a ratio is the median of those to all tokens in the same round.  Weights
are random.  An index also decodes a clip, which is left out.

tokens: all rows of the clip after the last block.
gflop: of the vision tower with LoRA of rank 8, forward; a product of two numbers and its sum are two
    operations.  A block with f sequences, a tokens in attention and b after it takes
    f (8 a W^2 + 8 a r W + 4 a^2 W + 16 b W^2); the matching of tokens, the patch embedding and the projection
    are added (specification of TempMe, section 7).
rows: rows that attention and MLP read, summed over the blocks; most bytes of a step are proportional to them.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it starts with its own folder there

from benchmarks import step_inputs
from benchmarks.measure import RESULTS, machine, write_row
from discovla.methods.base import Method
from discovla.methods.tempme import TempMe, TempMeConfig
from discovla.nn.token_merging import Merge, MergeConfig, plan_merges
from discovla.ops.merge_tokens import source_count
from discovla.towers.weights import initialise

FRAMES, RANK = 12, 8


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """Sizes of a vision tower: patches a side, pixels of one, width, heads, blocks, width of the features."""

    grid: int
    patch: int
    width: int
    heads: int
    blocks: int
    embed_dim: int


BACKBONES = {
    "ViT-B/32": Backbone(grid=7, patch=32, width=768, heads=12, blocks=12, embed_dim=512),
    "ViT-B/16": Backbone(grid=14, patch=16, width=768, heads=12, blocks=12, embed_dim=512),
    "ViT-L/14": Backbone(grid=16, patch=14, width=1024, heads=16, blocks=24, embed_dim=768),
    "PE-Core-L/14-336": Backbone(grid=24, patch=14, width=1024, heads=16, blocks=24, embed_dim=1024),
}
DEEP = {"layers": (16, 18, 20)}  # two thirds into 24 blocks, as 8 of 12
# backbone -> name of a setting -> its options; `search` adds those by which the paper's figures come out
SETTINGS: dict[str, dict[str, tuple[Merge, dict[str, Any]]]] = {
    "ViT-B/32": {
        "all tokens": ("none", {}),
        "ToMe, 2 a block": ("tome", {}),
        "ToMe, 4 a block": ("tome", {"per_block": 4}),
        "TempMe, released": ("tempme", {}),
    },
    "ViT-B/16": {
        "all tokens": ("none", {}),
        "ToMe, 8 a block": ("tome", {"per_block": 8}),
        "ToMe, 16 a block": ("tome", {"per_block": 16}),
        "TempMe, released": ("tempme", {}),
        "TempMe, 10 a block": ("tempme", {"per_block": 10}),
    },
    "ViT-L/14": {
        "all tokens": ("none", {}),
        "ToMe, 8 a block": ("tome", {"per_block": 8}),
        "TempMe, joins at 8, 9, 10": ("tempme", {}),
        "TempMe, joins at 16, 18, 20": ("tempme", DEEP),
    },
    "PE-Core-L/14-336": {
        "all tokens": ("none", {}),
        "ToMe, 16 a block": ("tome", {"per_block": 16}),
        "TempMe, joins at 16, 18, 20, 16 a block": ("tempme", {**DEEP, "per_block": 16}),
    },
}


def count(
    backbone: Backbone, kind: Merge, options: dict[str, Any], *, frames: int = FRAMES, rank: int = RANK
) -> dict[str, float]:
    """Return tokens after the last block, operations in 1e9, and rows of one clip.

    Args:
        frames: of the clip.  rank: of LoRA, 0 for none.
    """
    config = MergeConfig(**{"frames": frames, **options})
    tokens, width = backbone.grid**2 + 1, backbone.width
    plan = (
        plan_merges(kind, config, tokens=tokens, frames=frames, blocks=backbone.blocks)
        if kind != "none"
        else ()
    )
    operations = frames * (6 * backbone.patch**2 * width * backbone.grid**2 + 2 * width * backbone.embed_dim)
    rows = 0
    for block in range(backbone.blocks):
        if kind == "none":
            f, a, b, fixed, at_join = frames, tokens, tokens, 1, 0
        else:
            p = plan[block]
            f, a, b, fixed, at_join = p.sequences, p.attended, p.left, p.fixed, p.at_join
        operations += f * (8 * a * width**2 + 8 * a * rank * width + 4 * a**2 * width + 16 * b * width**2)
        operations += f * _matching(a, fixed, width // backbone.heads) * (a > b)
        operations += f * _matching(a + at_join, fixed, width) * (at_join > 0)
        rows += f * (a + b)
    last = plan[-1].sequences * plan[-1].left if plan else frames * tokens
    return {"tokens": last, "gflop": operations / 1e9, "rows": rows}


def _matching(length: int, fixed: int, channels: int) -> int:
    sources = source_count(length, fixed)
    return 2 * sources * (length - fixed - sources) * channels


def search(backbone: Backbone) -> Iterator[tuple[float, dict[str, Any]]]:
    """Yield options by which tokens fall by 95 % and operations by 51 %, each to the nearest percent.

    The number is the distance from the released options: changes of r, and of the shares in steps of 5 %.
    """
    whole = count(backbone, "none", {})
    for r in range(0, 25):
        for join in range(5, 100, 5):
            for inner in range(0, 100, 5):
                options = {"per_block": r, "join_share": join / 100, "inner_share": inner / 100}
                try:
                    counted = count(backbone, "tempme", options)
                except ValueError:
                    break
                fewer = 100 - 100 * counted["tokens"] / whole["tokens"]
                less = 100 - 100 * counted["gflop"] / whole["gflop"]
                if round(fewer) == 95 and round(less) == 51:
                    yield abs(r - 2) + abs(join - 30) / 5 + abs(inner - 10) / 5, options


def rows() -> Iterator[dict[str, Any]]:
    """Yield the rows of the results file."""
    for name, backbone in BACKBONES.items():
        whole = count(backbone, "none", {})
        settings = dict(SETTINGS[name])
        if backbone.blocks == 12 and (found := min(search(backbone), key=lambda x: x[0], default=None)):
            options = found[1]
            words = (
                f"r {options['per_block']}, shares {options['join_share']:g} and {options['inner_share']:g}"
            )
            settings[f"TempMe, {words}"] = ("tempme", options)
        for setting, (kind, options) in settings.items():
            counted = count(backbone, kind, options)
            yield {
                "subject": "tokens",
                "backbone": name,
                "setting": setting,
                "merge": kind,
                "options": options,
                "frames": FRAMES,
                "lora_rank": RANK,
                **counted,
                **{f"{key}_ratio": counted[key] / whole[key] for key in counted},
            }


TIMED = {  # backbone -> what is timed, and settings of SETTINGS
    "ViT-B/32": (("step", "clip"), ("all tokens", "ToMe, 2 a block", "ToMe, 4 a block", "TempMe, released")),
    "ViT-B/16": (("clip",), ("all tokens", "ToMe, 8 a block", "ToMe, 16 a block", "TempMe, released")),
}
CAPTION = 12  # tokens


def times(rounds: int) -> Iterator[dict[str, Any]]:
    """Yield the times of every backbone, of what is timed, and of every setting."""
    torch.set_num_threads(1)
    for backbone, (parts, settings) in TIMED.items():
        methods = {name: _method(backbone, *SETTINGS[backbone][name]) for name in settings}
        for part in parts:
            measured = _in_turns({name: _call(part, method) for name, method in methods.items()}, rounds)
            for name, seconds in measured.items():
                base = measured["all tokens"]
                ratios = sorted(x / y for x, y in zip(seconds, base, strict=True))
                yield {
                    "subject": "times",
                    "backbone": backbone,
                    "setting": name,
                    "part": part,
                    "frames": FRAMES,
                    "threads": 1,
                    "rounds": rounds,
                    "cpu_seconds": statistics.median(seconds),
                    "ratio": statistics.median(ratios),
                    "least": ratios[0],
                    "most": ratios[-1],
                }


def _method(backbone: str, kind: Merge, options: dict[str, Any]) -> Method:
    """Return a TempMe with random weights, and LoRA in both towers."""
    architecture = step_inputs.architecture(backbone)
    merging = MergeConfig(frames=FRAMES, **options)
    made = TempMe(architecture, TempMeConfig(merge=kind, merging=merging, lora_rank=RANK))
    initialise(made, architecture, seed=0)
    made.freeze()
    return made


def _call(part: str, method: Method) -> Callable[[], object]:
    """Return a step on one pair, or the embedding of one clip."""
    generator, side = torch.Generator().manual_seed(0), method.architecture.image_size
    frames = torch.randint(0, 256, (1, FRAMES, side, side, 3), dtype=torch.uint8, generator=generator)
    mask = torch.ones(1, FRAMES, dtype=torch.bool)
    ids = torch.randint(1, 400, (1, CAPTION), generator=generator)
    ids[:, -1] = method.architecture.vocab_size - 1  # the end token

    @torch.no_grad()
    def clip() -> None:
        method.encode_video(frames, mask)

    def step() -> None:
        text = method.encode_text(ids, torch.ones_like(ids, dtype=torch.bool))
        method.losses(text, method.encode_video(frames, mask)).total.backward()
        method.zero_grad()

    return {"clip": clip, "step": step}[part]


def _in_turns(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return CPU seconds of calls that take turns; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            gc.collect()
            begin = time.process_time()
            call()
            if number:
                seconds[name].append(time.process_time() - begin)
    return seconds


def main() -> None:
    """Write the rows and print them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=("counts", "times"), default="counts")
    parser.add_argument("--out", type=Path, help="default: tokens.jsonl or token-times.jsonl of the results")
    parser.add_argument("--rounds", type=int, default=7, help="of `times`; default: %(default)s")
    options = parser.parse_args()
    timed = options.what == "times"
    out = options.out or RESULTS / "cpu" / ("token-times.jsonl" if timed else "tokens.jsonl")
    out.unlink(missing_ok=True)
    for row in times(options.rounds) if timed else rows():
        write_row(out, row | machine("cpu") if timed else row)
        if timed:
            numbers = f"{row['part']:5} {row['cpu_seconds']:8.2f} s {row['ratio']:6.3f}"
        else:
            numbers = f"{row['tokens']:6} {row['gflop']:8.1f} {row['gflop_ratio']:6.3f}"
        print(f"{row['backbone']:18} {row['setting']:44} {numbers}", flush=True)


if __name__ == "__main__":
    main()
