"""What results say: slower than before, short of a target, faster than a baseline; and the table of all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import read_rows

Row = dict[str, Any]
OURS = ("triton", "cuda", "torch", "ours")  # first words of impls
RUNS = 5  # earlier ones that a new one is compared with
MS, MEMORY, ERROR = 1.05, 1.02, 2.0  # how much worse than the best of them counts
WORTH = 1.15  # how much faster than Triton a CUDA kernel has to be, at two sizes at least


def _ours(row: Row) -> bool:
    return row["impl"].split()[0] in OURS


def earlier(folder: Path, now: str) -> dict[tuple[str, str], list[Row]]:
    """Rows of each case and impl in the last RUNS runs on the GPU of `folder` before that of time `now`."""
    runs: dict[str, list[Row]] = {}
    for file in folder.glob("*-gpu.jsonl"):
        for row in read_rows(file):
            runs.setdefault(row["time"], []).append(row)
    found: dict[tuple[str, str], list[Row]] = {}
    for time in sorted(time for time in runs if time < now)[-RUNS:]:
        for row in runs[time]:
            found.setdefault((row["name"], row["impl"]), []).append(row)
    return found


def regressions(row: Row, before: Sequence[Row]) -> list[str]:
    """In which ways a row is worse than the best of earlier ones; each is one line.

    Slower: above 1.05 times the best median, and above that run's 80 % quantile.  Memory: above 1.02 times
    the least.  Error: above twice the least.
    """
    found = []
    timed = [old for old in before if "ms_p50" in old]
    if "ms_p50" in row and timed:
        best = min(timed, key=lambda old: old["ms_p50"])
        if row["ms_p50"] > MS * best["ms_p50"] and row["ms_p50"] > best["ms_p80"]:
            found.append(_line(row, "ms", row["ms_p50"], best["ms_p50"]))
    for key, factor in (("extra_gb", MEMORY), ("err_fro", ERROR), ("err_gradient", ERROR)):
        recorded = [old[key] for old in before if old.get(key)]
        if key in row and recorded and row[key] > factor * min(recorded):
            found.append(_line(row, key, row[key], min(recorded)))
    if any(old.get("ok") for old in before) and row.get("ok") is False:
        found.append(f"{row['name']} {row['impl']}: wrong, was right")
    return found


def _line(row: Row, what: str, now: float, then: float) -> str:
    return f"{row['name']} {row['impl']}: {what} {now:.4g}, was {then:.4g}"


def targets(rows: Iterable[Row]) -> list[str]:
    """For each case with a target, the best of our impls that have it."""
    lines = []
    for name, ours in _with_one_target(rows):
        goals = {key: ours[0].get(f"target_{key}") for key in ("ms", "gb")}
        wanted = {key: goal for key, goal in goals.items() if goal}
        if not wanted:
            continue
        best = min(ours, key=lambda row: row["ms_p50"])
        measured = {"ms": best["ms_p50"], "gb": best["extra_gb"]}
        parts = [
            f"{measured[key]:.3g} {key.upper() if key == 'gb' else key}, target {goal:g}: "
            + ("met" if measured[key] <= goal else f"missed by {measured[key] / goal - 1:.0%}")
            for key, goal in wanted.items()
        ]
        lines.append(f"{name} ({best['impl']}): " + "; ".join(parts))
    return lines


def _with_one_target(rows: Iterable[Row]) -> list[tuple[str, list[Row]]]:
    """Timed rows of ours, by the name of their case and by what they are to reach."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if "ms_p50" in row and _ours(row):
            found.setdefault((row["name"], row.get("target_ms"), row.get("target_gb")), []).append(row)
    return [(key[0], group) for key, group in found.items()]


def beside_baselines(rows: Iterable[Row]) -> list[str]:
    """For each case, how the fastest of our impls stands to the fastest of the others."""
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


def worth_choosing(rows: Iterable[Row]) -> list[str]:
    """Which ops' CUDA kernels are so much faster than Triton's, at two sizes, that `auto` may take them."""
    ratios: dict[str, list[float]] = {}
    for group in _cases(rows).values():
        by_impl = {row["impl"]: row for row in group}
        if {"cuda", "triton"} <= by_impl.keys():
            ratio = by_impl["triton"]["ms_p50"] / by_impl["cuda"]["ms_p50"]
            ratios.setdefault(by_impl["cuda"]["op"], []).append(ratio)
    return [
        f"{op}: cuda is at least {WORTH} x as fast as triton at {sum(r >= WORTH for r in found)} of "
        f"{len(found)} sizes: {'worth' if sum(r >= WORTH for r in found) >= 2 else 'not worth'} choosing"
        for op, found in ratios.items()
    ]


def table(rows: Sequence[Row]) -> str:
    """All timed rows as Markdown, then what was left out and why."""
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
    """The table, and what follows from it."""
    parts = {
        "Targets (of an H200)": targets(rows),
        "Beside the best baseline": beside_baselines(rows),
        "CUDA C++ beside Triton": worth_choosing(rows),
    }
    chapters = [f"{title}:\n" + "\n".join(lines) for title, lines in parts.items() if lines]
    return "\n\n".join([table(rows), *chapters])


def _cases(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Timed rows by the name of their case."""
    found: dict[str, list[Row]] = {}
    for row in (row for row in rows if "ms_p50" in row):
        found.setdefault(row["name"], []).append(row)
    return found
