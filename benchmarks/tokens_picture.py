"""Draw docs/assets/tokens.svg: R@1 against the tokens that are kept, from results of the experiments.

python benchmarks/experiments.py tokens
python benchmarks/tokens_picture.py
"""

from __future__ import annotations

import argparse
import html
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script starts with its own folder there

from benchmarks.experiments import ALL_TOKENS, EXPERIMENTS
from benchmarks.measure import ROOT, read_rows

Row = dict[str, Any]
Curve = list[tuple[float, float]]  # share of the tokens, R@1
LEFT, TOP, WIDTH, HEIGHT = 60, 16, 400, 270  # pixels, of the axes
COLOURS = ("#3949ab", "#e65100", "#2e7d32", "#6a1b9a", "#c62828", "#00838f", "#616161")
FONT = 'font-family="system-ui, sans-serif" font-size="12"'


def curves(rows: Sequence[Row]) -> dict[str, Curve]:
    """Return R@1, text to video, of each method against the tokens of the last block, of all tokens.

    ToMe and TempMe, and merging in training and afterwards, are different curves, which begin at all tokens.
    """
    counted = [row for row in rows if "tokens" in row]
    largest = max((row["tokens"] for row in counted), default=1)
    scores: dict[str, dict[float, list[float]]] = {}
    for row in (row for row in counted if row["merge"] != ALL_TOKENS):
        name = _name(row, row["kind"], row["merge"])
        scores.setdefault(name, {}).setdefault(row["tokens"] / largest, []).append(_score(row))
    for row in (row for row in counted if row["merge"] == ALL_TOKENS):
        # a run that trained with all tokens is where both curves of its method begin
        kinds = ("run", "merged later") if row["kind"] == "run" else (row["kind"],)
        names = [_name(row, kind, merge) for kind in kinds for merge in ("ToMe", "TempMe")]
        for name in names:
            if name in scores:
                scores[name].setdefault(1.0, []).append(_score(row))
    return {name: [(x, statistics.fmean(by[x])) for x in sorted(by)] for name, by in scores.items()}


def _name(row: Row, kind: str, merge: str) -> str:
    ends = {"run": ", trained so", "merged later": ", merged later", "untrained": ""}
    return f"{row['method']}: {merge.split(',')[0]}{ends[kind]}"


def _score(row: Row) -> float:
    return row["test"]["t2v"]["R@1"]


def svg(made: dict[str, Curve]) -> str:
    """Return the picture: a colour for each method, dashes where tokens were merged after training."""
    scores = [score for curve in made.values() for _, score in curve]
    low, high = 10 * int(min(scores) / 10), 10 * (1 + int(max(scores) / 10))
    methods = list(dict.fromkeys(name.split(":")[0] for name in made))
    size = f'viewBox="0 0 {LEFT + WIDTH + 380} {TOP + HEIGHT + 44}"'
    body = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} {FONT}>', *_axes(low, high)]
    for number, (name, curve) in enumerate(made.items()):
        style = _style(name, COLOURS[methods.index(name.split(":")[0]) % len(COLOURS)])
        x, y = LEFT + WIDTH + 16, TOP + 10 + 20 * number
        body += _line(
            [(LEFT + WIDTH * x, TOP + HEIGHT * (high - y) / (high - low)) for x, y in curve], *style
        )
        body += _line([(x, y), (x + 36, y)], *style)
        body.append(f'<text x="{x + 46}" y="{y + 4}">{html.escape(name)}</text>')
    return "\n".join([*body, "</svg>\n"])


def _style(name: str, colour: str) -> tuple[str, bool, bool]:
    """Return colour, True for dashes, and True for square marks, which TempMe has."""
    return colour, name.endswith("later"), "TempMe" in name


def _line(places: Curve, colour: str, dashed: bool, square: bool) -> Iterator[str]:
    """Yield a line through places in pixels, and its marks."""
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dashes = ' stroke-dasharray="5 3"' if dashed else ""
    yield f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>'
    for x, y in places:
        if square:
            yield f'<rect x="{x - 3.5:.1f}" y="{y - 3.5:.1f}" width="7" height="7" fill="{colour}"/>'
        else:
            yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>'


def _axes(low: int, high: int) -> Iterator[str]:
    """Yield the background, the lines of the scales and their numbers."""
    yield '<rect width="100%" height="100%" fill="#fff"/>'
    for score in range(low, high + 1, 10):
        y = TOP + HEIGHT * (high - score) / (high - low)
        yield f'<line x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
        yield f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{score}</text>'
    for share in (0, 25, 50, 75, 100):
        x = LEFT + WIDTH * share / 100
        yield f'<text x="{x:.1f}" y="{TOP + HEIGHT + 18}" text-anchor="middle">{share} %</text>'
    middle = f'x="{LEFT + WIDTH / 2}" y="{TOP + HEIGHT + 38}" text-anchor="middle"'
    yield f"<text {middle}>tokens in the last block</text>"
    yield f'<text x="4" y="{TOP + HEIGHT / 2}">R@1</text>'


def main(words: Sequence[str] | None = None) -> int:
    """Draw the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=EXPERIMENTS["tokens"].results)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/assets/tokens.svg")
    options = parser.parse_args(words)
    made = curves(read_rows(options.results))
    if not made:
        parser.error(f"--results: expected rows of `experiments.py tokens` in {options.results}, found none")
    options.out.write_text(svg(made))
    return 0


if __name__ == "__main__":
    sys.exit(main())
