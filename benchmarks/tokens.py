"""Tokens, operations and bytes of a vision tower that merges tokens, counted from the sizes alone.

    python benchmarks/tokens.py [--out FILE]

One row for each backbone and setting, of one clip of 12 frames.

tokens: all rows of the clip after the last block.
gflop: of the vision tower with LoRA of rank 8, forward; a product of two numbers and its sum are two
    operations.  A block with f sequences, a tokens in attention and b after it takes
    f (8 a W^2 + 8 a r W + 4 a^2 W + 16 b W^2); the matching of tokens, the patch embedding and the projection
    are added (specification of TempMe, section 7).
rows: rows that attention and MLP read, summed over the blocks; most bytes of a step are proportional to them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it starts with its own folder there

from benchmarks.measure import RESULTS, write_row
from discovla.nn.token_merging import Merge, MergeConfig, plan_merges
from discovla.ops.merge_tokens import source_count

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


def count(backbone: Backbone, kind: Merge, options: dict[str, Any]) -> dict[str, float]:
    """Return tokens after the last block, operations in 1e9, and rows of one clip."""
    config = MergeConfig(frames=FRAMES, **options)
    tokens, width = backbone.grid**2 + 1, backbone.width
    plan = (
        plan_merges(kind, config, tokens=tokens, frames=FRAMES, blocks=backbone.blocks)
        if kind != "none"
        else ()
    )
    operations = FRAMES * (6 * backbone.patch**2 * width * backbone.grid**2 + 2 * width * backbone.embed_dim)
    rows = 0
    for block in range(backbone.blocks):
        if kind == "none":
            f, a, b, fixed, at_join = FRAMES, tokens, tokens, 1, 0
        else:
            p = plan[block]
            f, a, b, fixed, at_join = p.sequences, p.attended, p.left, p.fixed, p.at_join
        operations += f * (8 * a * width**2 + 8 * a * RANK * width + 4 * a**2 * width + 16 * b * width**2)
        operations += f * _matching(a, fixed, width // backbone.heads) * (a > b)
        operations += f * _matching(a + at_join, fixed, width) * (at_join > 0)
        rows += f * (a + b)
    last = plan[-1].sequences * plan[-1].left if plan else FRAMES * tokens
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


def main() -> None:
    """Write the rows and print them."""
    parser = argparse.ArgumentParser(description="Count tokens and operations.")
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu" / "tokens.jsonl")
    out = parser.parse_args().out
    out.unlink(missing_ok=True)
    for row in rows():
        write_row(out, row)
        numbers = f"{row['tokens']:6} {row['gflop']:8.1f} {row['gflop_ratio']:6.3f}"
        print(f"{row['backbone']:18} {row['setting']:44} {numbers}")


if __name__ == "__main__":
    main()
