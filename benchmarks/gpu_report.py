"""Report of GPU results: the table, targets, comparison with baselines, and regressions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import read_rows

Row = dict[str, Any]
OURS = ("triton", "cuda", "torch", "ours")  # first words of our implementations
RUNS = 5  # earlier runs that a new one is compared with
MS, MEMORY, ERROR = 1.05, 1.02, 2.0  # factors over the best of them that are a regression


def _ours(row: Row) -> bool:
    return row["impl"].split()[0] in OURS


def earlier_rows(folder: Path, now: str) -> dict[tuple[str, str], list[Row]]:
    """Return the rows of each case and implementation in the last RUNS runs before the time `now`."""
    runs: dict[str, list[Row]] = {}
    for file in folder.glob("*-gpu.jsonl"):
        for row in read_rows(file):
            runs.setdefault(row["time"], []).append(row)
    rows: dict[tuple[str, str], list[Row]] = {}
    for time in sorted(time for time in runs if time < now)[-RUNS:]:
        for row in runs[time]:
            rows.setdefault((row["name"], row["impl"]), []).append(row)
    return rows


def regressions(row: Row, before: Sequence[Row]) -> list[str]:
    """Return one line for each figure that is worse than the best of earlier rows.

    Time: above 1.05 times the best median and above that run's 80 % quantile.  Memory: above 1.02 times the
    least.  Error: above twice the least.
    """
    lines = []
    timed = [old for old in before if "ms_p50" in old]
    if "ms_p50" in row and timed:
        best = min(timed, key=lambda old: old["ms_p50"])
        if row["ms_p50"] > MS * best["ms_p50"] and row["ms_p50"] > best["ms_p80"]:
            lines.append(_line(row, "ms", row["ms_p50"], best["ms_p50"]))
    for key, factor in (("extra_gb", MEMORY), ("err_fro", ERROR), ("err_gradient", ERROR)):
        recorded = [old[key] for old in before if old.get(key)]
        if key in row and recorded and row[key] > factor * min(recorded):
            lines.append(_line(row, key, row[key], min(recorded)))
    if any(old.get("ok") for old in before) and row.get("ok") is False:
        lines.append(f"{row['name']} {row['impl']}: wrong, was right")
    return lines


def _line(row: Row, figure: str, now: float, then: float) -> str:
    return f"{row['name']} {row['impl']}: {figure} {now:.4g}, was {then:.4g}"


def targets(rows: Iterable[Row]) -> list[str]:
    """Compare the fastest of our implementations with the target of its case."""
    lines = []
    for name, ours in _with_one_target(rows):
        goals = {key: ours[0].get(f"target_{key}") for key in ("ms", "gb")}
        targeted = {key: goal for key, goal in goals.items() if goal}
        if not targeted:
            continue
        best = min(ours, key=lambda row: row["ms_p50"])
        measured = {"ms": best["ms_p50"], "gb": best["extra_gb"]}
        parts = [
            f"{measured[key]:.3g} {key.upper() if key == 'gb' else key}, target {goal:g}: "
            + ("met" if measured[key] <= goal else f"missed by {measured[key] / goal - 1:.0%}")
            for key, goal in targeted.items()
        ]
        lines.append(f"{name} ({best['impl']}): " + "; ".join(parts))
    return lines


def _with_one_target(rows: Iterable[Row]) -> list[tuple[str, list[Row]]]:
    """Group our timed rows by case and target."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if "ms_p50" in row and _ours(row):
            groups.setdefault((row["name"], row.get("target_ms"), row.get("target_gb")), []).append(row)
    return [(key[0], group) for key, group in groups.items()]


def beside_baselines(rows: Iterable[Row]) -> list[str]:
    """Compare the fastest of our implementations with the fastest of the others, for each case."""
    lines = []
    for name, group in _cases(rows).items():
        ours = [row for row in group if _ours(row)]
        others = [row for row in group if not _ours(row)]
        if not ours or not others:
            continue
        mine, best = (min(side, key=lambda row: row["ms_p50"]) for side in (ours, others))
        ratio = best["ms_p50"] / mine["ms_p50"]
        lines.append(f"{name}: {mine['impl']} is {ratio:.2f} x as fast as {best['impl']}, the best baseline")
    return lines


def table(rows: Sequence[Row]) -> str:
    """Return all timed rows as Markdown, then the rows left out with their reasons."""
    columns = ("case", "impl", "ms", "p20-p80", "target", "TFLOP/s", "of GEMM", "extra GB", "launches")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in (row for row in rows if "ms_p50" in row):
        cells = (
            row["name"],
            row["impl"],
            f"{row['ms_p50']:.3f}",
            f"{row['ms_p20']:.3f}-{row['ms_p80']:.3f}",
            f"{row['target_ms']:g}" if row.get("target_ms") else "",
            f"{row['tflops_needed']:.1f}",
            f"{row['frac_gemm']:.0%}",
            f"{row['extra_gb']:.3f}",
            str(row["launches"]),
        )
        lines.append(f"| {' | '.join(cells)} |")
    left_out: dict[tuple[str, str], list[str]] = {}
    for row in (row for row in rows if "left_out" in row):
        left_out.setdefault((row["impl"], row["left_out"]), []).append(row["name"])
    lines += [
        f"- {impl}, {len(names)} rows: {why} ({names[0]} first)" for (impl, why), names in left_out.items()
    ]
    return "\n".join(lines)


def report(rows: Sequence[Row]) -> str:
    """Return the table and the conclusions from it."""
    parts = {
        "Targets (of an H200)": targets(rows),
        "Beside the best baseline": beside_baselines(rows),
    }
    chapters = [f"{title}:\n" + "\n".join(lines) for title, lines in parts.items() if lines]
    return "\n\n".join([table(rows), *chapters])


def _cases(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Group timed rows by case."""
    groups: dict[str, list[Row]] = {}
    for row in (row for row in rows if "ms_p50" in row):
        groups.setdefault(row["name"], []).append(row)
    return groups
