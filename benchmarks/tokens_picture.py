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
LEFT, TOP, WIDTH, HEIGHT = 44, 16, 400, 240  # pixels, of the axes
COLOURS = ("#3949ab", "#e65100", "#2e7d32", "#6a1b9a", "#c62828", "#00838f", "#616161")
FONT = 'font-family="system-ui, sans-serif" font-size="12"'


def curves(rows: Sequence[Row]) -> dict[str, Curve]:
    """Return R@1, text to video, of each method against the tokens of the last block, of all tokens.

    A method that merges tokens in training and one that merges them afterwards are different curves.
    """
    scores: dict[str, dict[int, list[float]]] = {}
    for row in (row for row in rows if "tokens" in row):
        method = row["method"]
        score = row["test"]["t2v"]["R@1"]
        names = {"untrained": [method], "run": [f"{method}, trained so"]}.get(row["kind"], [])
        if row["kind"] == "merged later" or (row["kind"] == "run" and row["merge"] == ALL_TOKENS):
            names = [*names, f"{method}, merged later"]
        for name in names:
            scores.setdefault(name, {}).setdefault(row["tokens"], []).append(score)
    largest = max((tokens for by in scores.values() for tokens in by), default=1)
    made = {
        name: [(tokens / largest, statistics.fmean(by[tokens])) for tokens in sorted(by)]
        for name, by in scores.items()
    }
    return {name: curve for name, curve in made.items() if len(curve) > 1}


def svg(made: dict[str, Curve]) -> str:
    """Return the picture: a line for each curve, and its name."""
    top = 10 * (1 + int(max(score for curve in made.values() for _, score in curve) / 10))
    size = f'viewBox="0 0 {LEFT + WIDTH + 280} {TOP + HEIGHT + 44}"'
    body = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} {FONT}>', *_axes(top)]
    for number, (name, curve) in enumerate(made.items()):
        colour = COLOURS[number % len(COLOURS)]
        places = [(LEFT + WIDTH * x, TOP + HEIGHT * (1 - y / top)) for x, y in curve]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        dashed = ' stroke-dasharray="5 3"' if name.endswith("later") else ""
        body.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"{dashed}/>')
        body += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places]
        y = TOP + 14 + 18 * number
        body.append(f'<text x="{LEFT + WIDTH + 16}" y="{y}" fill="{colour}">{html.escape(name)}</text>')
    return "\n".join([*body, "</svg>\n"])


def _axes(top: int) -> Iterator[str]:
    """Yield the background, the lines of the scales and their numbers."""
    yield '<rect width="100%" height="100%" fill="#fff"/>'
    for score in range(0, top + 1, 10):
        y = TOP + HEIGHT * (1 - score / top)
        yield f'<line x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
        yield f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{score}</text>'
    for share in (0, 25, 50, 75, 100):
        x = LEFT + WIDTH * share / 100
        yield f'<text x="{x:.1f}" y="{TOP + HEIGHT + 18}" text-anchor="middle">{share} %</text>'
    middle = f'x="{LEFT + WIDTH / 2}" y="{TOP + HEIGHT + 38}" text-anchor="middle"'
    yield f"<text {middle}>tokens in the last block</text>"
    yield f'<text x="4" y="{TOP - 4}">R@1</text>'


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
