"""Write the report of one run, or of several side by side, and send its plots to TensorBoard."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from discovla.errors import one_line
from discovla.files import write_file
from discovla.report.data import JSON, RELIABILITY, read_run
from discovla.report.frames import FrameStrips
from discovla.retrieval.record import EvaluationRecord

if TYPE_CHECKING:
    from discovla.report.page import Report

logger = logging.getLogger(__name__)

REPORT = "report.html"
TRAINING_SECONDS = 2.0  # for frames, of a report that is written while ranks wait
FINAL_SECONDS = 30.0  # the same of a finished run


def save_record(directory: Path, name: str, record: EvaluationRecord, *, title: str, step: int) -> None:
    """Keep per-query results in `evaluation-<name>.npz` of a run directory."""
    replace(record, title=title, step=step).save(directory / f"evaluation-{name}.npz")


def save_reliability(directory: Path, bins: Sequence[JSON]) -> None:
    """Keep how often hits of an index are right, by their probability, for the report of a run."""
    write_file(directory / RELIABILITY, json.dumps({"bins": list(bins)}, indent=1) + "\n")


def write_report(directory: Path, out: Path | None = None, *, seconds: float = 120.0) -> tuple[Path, Report]:
    """Write the report of a run and return its path and content.

    Args:
        directory: of the run.
        out: file to write; None for `report.html` in the directory.
        seconds: largest time to decode frames that are not yet kept.

    Raises:
        ConfigError: the folder is no run directory.
        OSError: the file cannot be written.
    """
    from discovla.report.page import render_run  # matplotlib takes a second to import

    run = read_run(directory)
    strips = None if run.parsed is None else FrameStrips(directory, run.parsed.data, seconds=seconds)
    report = render_run(run, strips)
    out = out or directory / REPORT
    write_file(out, report.page)
    return out, report


def try_report(directory: Path, *, seconds: float = TRAINING_SECONDS) -> dict[str, np.ndarray]:
    """Write the report of a run in training and return its plots and queries as pixels, by title.

    A report that cannot be written is one warning: it must not end the run.  `seconds` as in `write_report`.
    """
    try:
        _, report = write_report(directory, seconds=seconds)
        return report.pictures()
    except Exception as error:
        logger.warning("%s not written: %s", directory / REPORT, one_line(error))
        return {}


def write_comparison(directories: Sequence[Path], out: Path) -> Path:
    """Write one page for several runs; errors as `write_report`."""
    from discovla.report.page import render_comparison  # matplotlib takes a second to import

    runs = [read_run(directory) for directory in directories]
    if len({run.name for run in runs}) < len(runs):
        runs = [replace(run, label=str(directory)) for run, directory in zip(runs, directories, strict=True)]
    write_file(out, render_comparison(runs))
    return out
