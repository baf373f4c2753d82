"""Rows of soak runs in the results of benchmarks, if DISCOVLA_SOAK_RECORD is set."""

from __future__ import annotations

import os
from typing import Any

from benchmarks.measure import machine, results_file, write_row


def record(subject: str, row: dict[str, Any]) -> None:
    """Print a row, and append it to benchmarks/results/cpu/<date>-<commit>-<subject>.jsonl if asked for."""
    print(row, flush=True)
    if os.environ.get("DISCOVLA_SOAK_RECORD"):
        where = machine("cpu")
        write_row(results_file(where, subject), {"name": subject, **row, **where})
