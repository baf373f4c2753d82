"""The table of the timed training steps, every ratio beside the name of what it is a ratio to."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS, read_rows

Row = dict[str, Any]
BASELINES = ("reference", "reference anomaly", "reference bf16 sdpa", "reference bf16 sdpa compiled", "peft")
COLUMNS = ("step", "implementation", "ms (p20-p80)", "pairs/s")
COUNTS = ("TFLOP", "TFLOP/s", "MFU", "kept MB", "peak GB", "launches")
ABSENT = "-"


def newest(folder: Path = RESULTS) -> list[Row]:
    """The rows of the last run of each contest on each device, in the order they were timed."""
    rows = [row for file in sorted(folder.glob("*/*-train-step.jsonl")) for row in read_rows(file)]
    last: dict[tuple[str, str], str] = {}
    for row in rows:
        key = row["device"], row["name"]
        last[key] = max(last.get(key, ""), row["time"])
    return [row for row in rows if row["time"] == last[row["device"], row["name"]]]


def table(rows: Sequence[Row]) -> str:
    """Markdown: a line for each step, then what was left out and why."""
    timed = [row for row in rows if "ms_p50" in row]
    if not timed:
        return "Not measured yet."
    bases = [name for name in BASELINES if any(row["impl"] == name for row in timed)]
    heads = [*COLUMNS, *(f"times as fast as {name}" for name in bases), *COUNTS]
    body = []
    for row in timed:
        contest = {other["impl"]: other for other in timed if _contest(other) == _contest(row)}
        ratios = [_ratio(row, contest.get(name)) for name in bases]
        body.append([*_times(row), *ratios, *_counts(row)])
    known = [column for column in range(len(heads)) if any(cells[column] != ABSENT for cells in body)]
    lines = [f"| {' | '.join(cells[column] for column in known)} |" for cells in [heads, *body]]
    lines.insert(1, "|---" * len(known) + "|")
    lines += ["", *_left_out(rows)] if len(timed) < len(rows) else []
    return "\n".join(lines)


def where(rows: Sequence[Row]) -> str:
    """Device, threads, torch and commit of the rows, in a line each."""
    return "\n".join(dict.fromkeys(_run(row) for row in rows if "ms_p50" in row))


def _run(row: Row) -> str:
    threads = "1 thread" if row["threads"] == 1 else f"{row['threads']} threads"
    commit = row["commit"] + (" with changes" if row["dirty"] else "")
    rounds = f"median of {row['n']} rounds"
    return f"- {row['name']}: {row['device']}, {threads}, torch {row['torch']}, {rounds}, commit {commit}"


def _contest(row: Row) -> tuple[str, str]:
    return row["device"], row["name"]


def _times(row: Row) -> list[str]:
    """Milliseconds of a GPU alone: those of a noisy CPU say more about its neighbours than about a step."""
    if row["device"] == "cpu":
        return [row["name"].removeprefix("step "), row["impl"], ABSENT, ABSENT]
    span = f"{row['ms_p50']:,.0f} ({row['ms_p20']:,.0f}-{row['ms_p80']:,.0f})"
    return [row["name"].removeprefix("step "), row["impl"], span, f"{row['samples_s']:.2f}"]


def _ratio(row: Row, base: Row | None) -> str:
    """The median over rounds of the base's time over the step's; both ratios are to the same reference."""
    if base is None or "ratios" not in row:
        return ABSENT
    return f"{statistics.median(x / y for x, y in zip(row['ratios'], base['ratios'], strict=True)):.2f}x"


def _counts(row: Row) -> list[str]:
    """Counted figures; peft's work has no closed form here, and products alone are not all of a step's."""
    work = None
    if not row["impl"].startswith(("peft", "products")):
        work = row["needed_tflop" if row["impl"].startswith("ours") else "reference_tflop"]
    return [
        ABSENT if work is None else f"{work:.3g}",
        ABSENT if work is None or row["device"] == "cpu" else f"{1000 * work / row['ms_p50']:.3g}",
        f"{row['mfu']:.1%}" if "mfu" in row else ABSENT,
        f"{row['kept_mb']:,.0f}",
        f"{row['peak_gb']:.1f}" if "peak_gb" in row else ABSENT,
        f"{row['launches'] if 'launches' in row else row['dispatched']:,}",
    ]


def _left_out(rows: Sequence[Row]) -> list[str]:
    """A line for each implementation and reason."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if "left_out" in row:
            found.setdefault((row["impl"], row["left_out"]), []).append(row["name"])
    return [f"- {impl} of {', '.join(names)}: {why}" for (impl, why), names in found.items()]
