"""`discovla export`: a run as files for other programs."""

from __future__ import annotations

import argparse
from pathlib import Path


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the command and its options."""
    text = "write what a run trained as files for other programs"
    parser = commands.add_parser("export", help=text, description=text)
    parser.add_argument("run_path", type=Path, metavar="RUN", help="run directory or one checkpoint")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder; with --drawn the file")
    merge = "also a plain CLIP under open_clip's names, LoRA merged"
    parser.add_argument("--merge", action="store_true", help=merge)
    drawn = "the small file of a CLIP trained on the drawn world, as it ships with discovla"
    parser.add_argument("--drawn", action="store_true", help=drawn)
    parser.set_defaults(run=_export)


def _export(arguments: argparse.Namespace) -> None:
    from discovla.export import export, export_drawn  # torch takes seconds to import
    from discovla.load import load_run

    run = load_run(arguments.run_path)
    if arguments.drawn:
        written = [export_drawn(run, arguments.out)]
    else:
        written = export(run, arguments.out, merged=arguments.merge)
    print("\n".join(f"wrote {path}" for path in written))
