"""Write the tables of the READMEs from the committed results.

    python benchmarks/tables.py            bring README.md and benchmarks/README.md up to date
    python benchmarks/tables.py --check    exit 1 where one is not

A table stands between `<!-- table NAME -->` and `<!-- end -->`; NAME is a key of TABLES.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it starts with its own folder there

from benchmarks import ablation, curves, methods, step_table
from benchmarks.measure import read_rows

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "benchmarks/README.md")
TABLES: dict[str, Callable[[], str]] = {
    "ladder": lambda: ablation.table(read_rows(ablation.RESULTS), "retrieval", ablation.LADDER),
    "retrieval": lambda: ablation.table(read_rows(ablation.RESULTS), "retrieval"),
    "choices": lambda: ablation.table(read_rows(ablation.RESULTS), "choices"),
    "losses": lambda: ablation.table(read_rows(ablation.RESULTS), "losses"),
    "methods": lambda: methods.table(read_rows(methods.RESULTS)),
    "methods-short": lambda: methods.table(read_rows(methods.RESULTS), methods.SHORT),
    "precision": lambda: curves.table(read_rows(curves.RESULTS)),
    "train-step": lambda: step_table.table(step_table.newest()),
    "train-step-runs": lambda: step_table.where(step_table.newest()),
}
BLOCK = re.compile(r"<!-- table ([\w-]+) -->\n.*?<!-- end -->", re.DOTALL)


def filled(page: str) -> str:
    """The text of a page with every table made anew.

    Raises:
        ValueError: a block names no table.
    """

    def block(match: re.Match[str]) -> str:
        name = match[1]
        if name not in TABLES:
            raise ValueError(f"table {name}: expected one of {', '.join(TABLES)}")
        return f"<!-- table {name} -->\n{TABLES[name]()}\n<!-- end -->"

    return BLOCK.sub(block, page)


def main(words: Sequence[str] | None = None) -> int:
    """Rewrite or check the pages."""
    parser = argparse.ArgumentParser(description="The tables of the READMEs, from the committed results.")
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 where a table is old")
    given = parser.parse_args(words)
    old = []
    for name in PAGES:
        path = ROOT / name
        text = path.read_text()
        if (new := filled(text)) != text:
            old.append(name)
            if not given.check:
                path.write_text(new)
    if given.check and old:
        print(f"{', '.join(old)}: older than the results; run python benchmarks/tables.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
