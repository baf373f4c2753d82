"""`discovla report`: the HTML report of one run, or of several side by side."""

from __future__ import annotations

import argparse
from pathlib import Path

from discovla.report.writer import REPORT, write_comparison, write_report


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the command and its options."""
    text = (
        "Write the report of a run as one HTML file: results with confidence intervals, curves, best and "
        "worst queries, data, config and machine. Several runs are written side by side."
    )
    parser = commands.add_parser("report", help=text, description=text)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directory")
    out = f"file to write; default: {REPORT} in the run directory, or here for several runs"
    parser.add_argument("--out", type=Path, metavar="HTML", help=out)
    parser.set_defaults(run=_report)


def _report(arguments: argparse.Namespace) -> None:
    if len(arguments.runs) == 1:
        path, _ = write_report(arguments.runs[0], arguments.out)
    else:
        path = write_comparison(arguments.runs, arguments.out or Path(REPORT))
    print(f"wrote {path}")
