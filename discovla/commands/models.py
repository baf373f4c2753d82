"""`discovla models`: all models of open_clip, taken or refused."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict

from discovla.towers.catalogue import FRAMES, ModelRow, list_models

HEAD = (
    *("model", "frames, pixels", "context", "parameters, M", "weights in bf16, GB"),
    *(f"GFLOP, {FRAMES} frames", "GFLOP, a full caption", "licence of weights"),
)


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the command and its options."""
    text = (
        "List all models of open_clip: those that model.architecture takes, with the licence of their "
        "weights, their size and operations, and those that it refuses, with the reason."
    )
    parser = commands.add_parser("models", help=text, description=text)
    parser.add_argument("word", nargs="?", default="", help="part of the names to list")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print a JSON list, one object per model")
    form.add_argument("--markdown", action="store_true", help="print two tables")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    rows = [row for row in list_models() if arguments.word.lower() in row.name.lower()]
    if not rows:
        raise ValueError(f"discovla models: expected part of a model's name, found {arguments.word!r}")
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    elif arguments.markdown:
        print(tables(rows))
    else:
        for row in rows:
            state = f"refused: {row.refused}" if row.refused else "  ".join(_cells(row)[1:])
            print(f"{row.name:32} {state}")


def markdown() -> str:
    """Return the tables of all models, for the documentation."""
    return tables(list_models())


def tables(rows: Iterable[ModelRow]) -> str:
    """Return a table of the models that are taken and one of those that are refused."""
    rows = list(rows)
    taken = [row for row in rows if row.refused is None]
    lines = [f"{len(taken)} of {len(rows)} models are taken.", "", _line(HEAD), _line(["---"] * len(HEAD))]
    lines += [_line(_cells(row)) for row in taken]
    lines += ["", _line(["refused", "reason"]), _line(["---", "---"])]
    lines += [_line([row.name, row.refused]) for row in rows if row.refused is not None]
    return "\n".join(lines)


def _cells(row: ModelRow) -> list[str]:
    """Return the values of a model that is taken, as text."""
    assert row.parameters and row.vision_operations and row.text_operations, "it is taken"
    return [
        row.name,
        str(row.image_size),
        str(row.context_length),
        f"{row.parameters / 1e6:.0f}",
        f"{2 * row.parameters / 1e9:.2f}",
        f"{row.vision_operations / 1e9:.0f}",
        f"{row.text_operations / 1e9:.1f}",
        ", ".join(row.licences) or "no weights named",
    ]


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
