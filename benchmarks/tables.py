"""Make the tables of the documentation from the committed results.

    python benchmarks/tables.py              update the tables in all pages
    python benchmarks/tables.py --check      exit 1 if a table is outdated
    python benchmarks/tables.py NAME         print one table

A table is between `<!-- table NAME -->` and `<!-- end -->`; NAME is a key of TABLES.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script starts with its own folder there

from benchmarks.experiments import (
    ABLATION_RUNS,
    ALL_TOKENS,
    EXPERIMENTS,
    FUSION_RUNS,
    LADDER,
    METHOD_RUNS,
    PRECISIONS,
    TIME_RUNS,
    TOKEN_RUNS,
    Run,
)
from benchmarks.kernel_table import kernel_table
from benchmarks.measure import RESULTS, ROOT, read_rows

Row = dict[str, Any]
PAGES = (
    *("docs/results.md", "docs/performance.md", "docs/methods/tempme.md", "docs/search.md"),
    *("docs/time.md", "docs/backbones.md", "kernels/README.md"),
)
ABSENT = "-"
LAST = 20  # steps whose mean loss is the end of a loss curve

METHOD_COLUMNS = {  # heading -> path of the number in a row
    "zero-shot t2v": "before/t2v/R@1",
    "t2v": "test/t2v/R@1",
    "t2v R@5": "test/t2v/R@5",
    "zero-shot v2t": "before/v2t/R@1",
    "v2t": "test/v2t/R@1",
    "v2t R@5": "test/v2t/R@5",
    "verb": "probes/verb/clip",
    "bind": "probes/bind/clip",
    "reversal": "probes/reversal/clip",
    "on another clip": "probes/reversal/control",
}
SHORT_COLUMNS = ("zero-shot t2v", "t2v", "t2v R@5", "zero-shot v2t", "v2t", "v2t R@5", "verb", "reversal")
TIME_COLUMNS = {
    "t2v R@1": "test/t2v/R@1",
    "R@5": "test/t2v/R@5",
    "v2t R@1": "test/v2t/R@1",
    "R@5 ": "test/v2t/R@5",
    "or its reverse": "reversal/all/clip",
    "moves alone": "reversal/moves/clip",
}
MERGE_COLUMNS = {name: path for name, path in TIME_COLUMNS.items() if name != "moves alone"}
ABLATION_COLUMNS = {
    "retrieval": {
        "test t2v": "figures/test/t2v/R@1",
        "R@5": "figures/test/t2v/R@5",
        "test v2t": "figures/test/v2t/R@1",
        "R@5 ": "figures/test/v2t/R@5",
        "siblings t2v": "figures/siblings/t2v/R@1",
        "siblings v2t": "figures/siblings/v2t/R@1",
        "val t2v": "figures/val/t2v/R@1",
    },
    "choices": {
        "verb": "figures/probes/verb/clip",
        "control": "figures/probes/verb/control",
        "bind": "figures/probes/bind/clip",
        "control ": "figures/probes/bind/control",
        "reversal": "figures/probes/reversal/clip",
        "control  ": "figures/probes/reversal/control",
        "flip": "figures/flip",
    },
    "losses": {
        "video": "last steps/video",
        "frame": "last steps/frame",
        "distill": "last steps/distill",
        "gradient": "last steps/grad_norm",
        "teacher": "figures/judges/teacher R@1",
        "student": "figures/judges/student R@1",
        "teacher H": "figures/judges/teacher entropy",
        "student H": "figures/judges/student entropy",
    },
}


def markdown(heads: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [f"| {' | '.join(cells)} |" for cells in [heads, *body]]
    lines.insert(1, "|---" * len(heads) + "|")
    return "\n".join(lines)


def known_columns(heads: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table without the columns that have no cell."""
    known = [column for column in range(len(heads)) if any(cells[column] != ABSENT for cells in body)]
    return markdown([heads[i] for i in known], [[cells[i] for i in known] for cells in body])


def mean_and_range(rows: Sequence[Row], path: str, form: str = ".1f") -> str:
    """Return the mean of a number over rows, with the least and the largest if they differ."""
    values = []
    for row in rows:
        value: Any = row
        for key in path.split("/"):
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            values.append(float(value))
    if not values:
        return ABSENT
    mean = f"{statistics.fmean(values):{form}}"
    return mean if min(values) == max(values) else f"{mean} ({min(values):{form}}-{max(values):{form}})"


def rows_by_name(runs: Sequence[Run], results: Sequence[Row]) -> dict[str, list[Row]]:
    """Group results by the name of their run, in the order of the runs; other results are left out."""
    groups: dict[str, list[Row]] = {run.name: [] for run in runs}
    names = {run.identity: run.name for run in runs}
    for row in results:
        if row.get("identity") in names:
            groups[names[row["identity"]]].append(row)
    return {name: rows for name, rows in groups.items() if rows}


def methods_table(results: Sequence[Row], columns: Sequence[str] = tuple(METHOD_COLUMNS)) -> str:
    """Return the table of all methods: means over seeds, with the least and the largest."""
    costs = {row["name"]: row for row in results if row["kind"] == "cost"}
    body = []
    for name, rows in rows_by_name(METHOD_RUNS, results).items():
        cost = costs.get(name)
        body.append(
            [
                name,
                str(len(rows)),
                f"{rows[0]['trained_parameters'] / 1e3:,.0f} k",
                f"{cost['step_over_meanP']:.2f}x" if cost else ABSENT,
                f"{cost['saved_mb']:,.0f} MB" if cost else ABSENT,
                f"{max(row['peak_rss_mb'] for row in rows):,} MB",
                *(mean_and_range(rows, METHOD_COLUMNS[column]) for column in columns),
            ]
        )
    return markdown(["", "seeds", "trained", "step", "kept", "peak", *columns], body)


def ablation_table(
    results: Sequence[Row],
    title: str,
    names: Sequence[str] | None = None,
    *,
    runs: Sequence[Run] = ABLATION_RUNS,
) -> str:
    """Return one of ABLATION_COLUMNS as a table, of all runs or of some."""
    columns = ABLATION_COLUMNS[title]
    body = []
    order = dict.fromkeys([*LADDER, *(run.name for run in runs)])
    groups = rows_by_name(runs, results)
    for name in (name for name in names or order if name in groups):
        cells = []
        for path in columns.values():
            small = path.startswith("last") or "entropy" in path
            form = ".0e" if path == "figures/flip" else ".2f" if small else ".1f"
            cells.append(mean_and_range(groups[name], path, form))
        body.append([name, str(len(groups[name])), *cells])
    return markdown(["", "seeds", *columns], body)


def tokens_table(rows: Sequence[Row]) -> str:
    """Return tokens, operations and rows of every backbone and setting of merging."""
    heads = ["backbone", "setting", "tokens left", "GFLOP a clip", "of all tokens'", "rows, of all tokens'"]
    body = [
        [
            row["backbone"],
            row["setting"],
            f"{row['tokens']:,} ({row['tokens_ratio']:.1%})",
            f"{row['gflop']:,.1f}",
            f"{row['gflop_ratio']:.1%}",
            f"{row['rows_ratio']:.1%}",
        ]
        for row in rows
    ]
    return markdown(heads, body)


def merged_later_table(results: Sequence[Row]) -> str:
    """Return what merging without training keeps of each method, and, if measured, the CPU time of a clip."""
    times = {row["name"]: row["ratio"] for row in results if row.get("part") == "clips"}
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in results:
        trained = row["kind"] == "run" and row["merge"] == ALL_TOKENS
        if row["kind"] in ("untrained", "merged later") or trained:
            groups.setdefault((row["method"], row["merge"]), []).append(row)
    body = []
    for (method, merge), rows in groups.items():
        time = f"{times[merge]:.2f}" if merge in times else ABSENT
        cells = [method, merge, *_tokens_and_work(rows[0]), time]
        body.append([*cells, *(mean_and_range(rows, path) for path in MERGE_COLUMNS.values())])
    heads = ["method", "merge", "tokens", "GFLOP", "CPU time", *MERGE_COLUMNS]
    return known_columns(heads, body) if body else "Not measured yet."


def front_table(results: Sequence[Row]) -> str:
    """Return methods that trained with merged tokens in one CPU time: means over seeds."""
    groups = rows_by_name(TOKEN_RUNS, [row for row in results if row["kind"] == "run"])
    steps = {row["name"]: row["ratio"] for row in results if row.get("part") == "step"}
    body = []
    for name, rows in groups.items():
        cells = [rows[0]["method"], rows[0]["merge"], str(len(rows))]
        cells += [f"{rows[0]['trained_parameters'] / 1e3:,.0f} k", f"{rows[0]['steps']:,}"]
        cells += [_cpu_seconds(rows, "shards")]
        cells += [f"{steps[name]:.2f}" if name in steps else ABSENT, *_tokens_and_work(rows[0])]
        cells += [f"{rows[0]['vector_bytes']:,}"]
        body.append([*cells, *(mean_and_range(rows, path) for path in MERGE_COLUMNS.values())])
    heads = ["method", "merge", "seeds", "trained", "steps", "CPU s", "a step", "tokens", "GFLOP", "bytes"]
    return markdown([*heads, *MERGE_COLUMNS], body) if body else "Not measured yet."


def _cpu_seconds(rows: Sequence[Row], reads: str) -> str:
    """Return the CPU seconds of the runs that read "videos", which they decode, or "shards"."""
    return mean_and_range([row for row in rows if row.get("reads", "videos") == reads], "cpu_seconds", ".0f")


def _tokens_and_work(row: Row) -> list[str]:
    return [str(row["tokens"]), f"{row['gflop']:.3f}" if "gflop" in row else ABSENT]


def token_times_table(rows: Sequence[Row]) -> str:
    """Return CPU times of a step and of a clip with merged tokens, of those with all tokens."""
    parts = {"step": "a step", "clip": "a clip"}
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        ratio = f"{row['ratio']:.2f} ({row['least']:.2f}-{row['most']:.2f})"
        cells.setdefault((row["backbone"], row["setting"]), {})[row["part"]] = ratio
    body = [[*names, *(of.get(part, ABSENT) for part in parts)] for names, of in cells.items()]
    return markdown(["backbone", "setting", *parts.values()], body) if body else "Not measured yet."


def time_table(results: Sequence[Row]) -> str:
    """Return the quickstart beside other methods: means over seeds, with the least and the largest."""
    groups = rows_by_name(TIME_RUNS, [row for row in results if row["kind"] == "run"])
    if not groups:
        return "Not measured yet."
    plain = next(iter(groups.values()))[0]["plain"]
    before = [f"{plain[way][k]:.1f}" for way in ("t2v", "v2t") for k in ("R@1", "R@5")]
    body = [["CLIP, mean pooling", ABSENT, "0", ABSENT, ABSENT, *before, "50.0", "50.0"]]
    for name, rows in groups.items():
        cells = [
            f"{rows[0]['trained_parameters'] / 1e3:,.0f} k",
            f"{rows[0]['steps']:,}",
            _cpu_seconds(rows, "videos"),
        ]
        cells += [mean_and_range(rows, path) for path in TIME_COLUMNS.values()]
        body.append([name, str(len(rows)), *cells])
    return markdown(["", "seeds", "trained", "steps", "CPU s", *TIME_COLUMNS], body)


def captions_table(results: Sequence[Row]) -> str:
    """Return the mean cosines of captions and changed ones in text towers that have read stills."""
    rows = {row["name"]: row["cosines"] for row in results if row["kind"] == "captions"}
    if not rows:
        return "Not measured yet."
    changes = next(iter(rows.values())).items()
    body = [
        [name, str(x["count"]), *(f"{cosines[name]['cosine']:.4f}" for cosines in rows.values())]
        for name, x in changes
    ]
    return markdown(["change", "captions", *rows], body)


def stills_table(results: Sequence[Row]) -> str:
    """Return the mean cosines of the mean features of stills that captions of a move describe."""
    rows = [row for row in results if row["kind"] == "stills"]
    body = [[name, f"{cosine:.3f}"] for name, cosine in (rows[0]["cosines"] if rows else {}).items()]
    return markdown(["stills of the caption", "mean cosine"], body) if body else "Not measured yet."


def frozen_table(results: Sequence[Row]) -> str:
    """Return the operations of a step for each pair, from frames and from features."""
    names = ("full", "from_frames", "from_features", "once")
    body = [
        [row["name"], *(f"{row[f'{name}_gflop']:,.0f}" for name in names), f"{row['times_fewer']:,.0f}x"]
        for row in results
        if row["kind"] == "operations"
    ]
    heads = ["", "both towers train", "text tower, frames", "text tower, features", "encoding a clip, once"]
    return markdown([*heads, "fewer"], body) if body else "Not measured yet."


def precision_table(results: Sequence[Row]) -> str:
    """Return the errors of each precision, and the differences of its loss curve from that of float32."""
    errors = {row["precision"]: row for row in results if row["kind"] == "errors"}
    curves = {row["precision"]: row["losses"] for row in results if row["kind"] == "curve"}
    kinds = ("captions", "frames", "frame_captions", "loss", "gradients")
    body = []
    for precision in (name for name in PRECISIONS if name in errors):
        cells = [precision, *(f"{errors[precision][kind]:.1e}" for kind in kinds)]
        if precision == "fp32" or "fp32" not in curves or precision not in curves:
            cells += [ABSENT] * 3
        else:
            first, mean, end = curve_differences(curves[precision], curves["fp32"])
            cells += [f"{first:.2%}", f"{mean:.2%}", f"{end:+.2%}"]
        body.append(cells)
    heads = ["precision", "captions", "frames", "frame captions", "loss", "gradients"]
    heads += ["loss of the first step", "of all steps, mean", f"of the last {LAST}, mean"]
    return markdown(heads, body) if body else "Not measured yet."


def curve_differences(losses: Sequence[float], base: Sequence[float]) -> tuple[float, float, float]:
    """Return relative differences of two loss curves: first step, mean over steps, means of the ends."""
    relative = [abs(x / y - 1) for x, y in zip(losses, base, strict=True)]
    end = statistics.fmean(losses[-LAST:]) / statistics.fmean(base[-LAST:]) - 1
    return relative[0], statistics.fmean(relative), end


BASELINES = ("reference", "reference anomaly", "reference bf16 sdpa", "reference bf16 sdpa compiled", "peft")


def newest_steps(folder: Path = RESULTS) -> list[Row]:
    """Return the rows of the last run of each comparison on each device, in the order they were timed."""
    rows = [row for file in sorted(folder.glob("*/*-train-step.jsonl")) for row in read_rows(file)]
    last: dict[tuple[str, str], str] = {}
    for row in rows:
        key = row["device"], row["name"]
        last[key] = max(last.get(key, ""), row["time"])
    return [row for row in rows if row["time"] == last[row["device"], row["name"]]]


def step_table(rows: Sequence[Row]) -> str:
    """Return a line for each training step, then the steps that were left out, with the reason."""
    timed = [row for row in rows if "ms_p50" in row]
    if not timed:
        return "Not measured yet."
    bases = [name for name in BASELINES if any(row["impl"] == name for row in timed)]
    heads = ["step", "implementation", "ms (p20-p80)", "pairs/s"]
    heads += [f"times as fast as {name}" for name in bases]
    heads += ["TFLOP", "TFLOP/s", "MFU", "kept MB", "peak GB", "launches"]
    body = []
    for row in timed:
        same = (row["device"], row["name"])
        others = {other["impl"]: other for other in timed if (other["device"], other["name"]) == same}
        ratios = [_ratio(row, others.get(name)) for name in bases]
        body.append([*_step_times(row), *ratios, *_step_counts(row)])
    table = known_columns(heads, body)
    left_out: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if "left_out" in row:
            left_out.setdefault((row["impl"], row["left_out"]), []).append(row["name"])
    lines = [f"- {impl} of {', '.join(names)}: {why}" for (impl, why), names in left_out.items()]
    return "\n".join([table, *(["", *lines] if lines else [])])


def step_conditions(rows: Sequence[Row]) -> str:
    """Return one line for each comparison: device, threads, torch and commit."""
    lines = []
    for row in (row for row in rows if "ms_p50" in row):
        threads = "1 thread" if row["threads"] == 1 else f"{row['threads']} threads"
        commit = row["commit"] + (" with changes" if row["dirty"] else "")
        rounds = f"median of {row['n']} rounds"
        lines.append(
            f"- {row['name']}: {row['device']}, {threads}, torch {row['torch']}, {rounds}, commit {commit}"
        )
    return "\n".join(dict.fromkeys(lines))


def _step_times(row: Row) -> list[str]:
    """Return name and milliseconds; a CPU has none, because other processes affect its times."""
    name = row["name"].removeprefix("step ")
    if row["device"] == "cpu":
        return [name, row["impl"], ABSENT, ABSENT]
    span = f"{row['ms_p50']:,.0f} ({row['ms_p20']:,.0f}-{row['ms_p80']:,.0f})"
    return [name, row["impl"], span, f"{row['samples_s']:.2f}"]


def _ratio(row: Row, base: Row | None) -> str:
    """Return the median over rounds of the base's time over the step's; all ratios have one common base."""
    if base is None or "ratios" not in row:
        return ABSENT
    return f"{statistics.median(x / y for x, y in zip(row['ratios'], base['ratios'], strict=True)):.2f}x"


def _step_counts(row: Row) -> list[str]:
    """Return counted figures; peft and the matmul-only lower bound have no closed form of their work."""
    work = None
    if not row["impl"].startswith(("peft", "matmul only")):
        work = row["needed_tflop" if row["impl"].startswith("ours") else "reference_tflop"]
    return [
        ABSENT if work is None else f"{work:.3g}",
        ABSENT if work is None or row["device"] == "cpu" else f"{1000 * work / row['ms_p50']:.3g}",
        f"{row['mfu']:.1%}" if "mfu" in row else ABSENT,
        f"{row['kept_mb']:,.0f}",
        f"{row['peak_gb']:.1f}" if "peak_gb" in row else ABSENT,
        f"{row['launches'] if 'launches' in row else row['dispatched']:,}",
    ]


def serve_table(rows: Sequence[Row]) -> str:
    """Return searches in the process, over HTTP, and by clients at once."""
    alone, many = rows
    added = alone["server_cpu_ms"] - alone["in_process_cpu_ms"]
    body = [
        ("in the process", "1", str(alone["searches"]), f"{alone['in_process_cpu_ms']:.1f}", ABSENT, ABSENT),
        ("over HTTP", "1", str(alone["searches"]), f"{alone['server_cpu_ms']:.1f} (+{added:.1f})"),
        ("over HTTP", str(many["clients"]), str(many["searches"]), f"{many['server_cpu_ms']:.1f}"),
    ]
    tails = ((), (str(alone["errors"]), ABSENT), (str(many["errors"]), f"{many['p99_by_p50']:.1f}"))
    heads = ("search", "clients", "searches", "ms of a search", "errors", "p99 / p50")
    return markdown(heads, [(*row, *tail) for row, tail in zip(body, tails, strict=True)])


def newest_serve(folder: Path = RESULTS) -> list[Row]:
    """Return the rows of the newest run of benchmarks/serve.py."""
    files = [read_rows(path) for path in folder.glob("cpu/*-serve.jsonl")]
    return max(files, key=lambda rows: rows[0]["time"])


def _results(experiment: str) -> list[Row]:
    return read_rows(EXPERIMENTS[experiment].results)


def search_rows(measure: str, folder: Path = RESULTS) -> list[Row]:
    """Return the newest rows of one measure of `benchmarks/search.py`: of each size, correction and bin."""
    rows = [row for path in folder.glob("cpu/*-search.jsonl") for row in read_rows(path)]
    rows = sorted((row for row in rows if row["measure"] == measure), key=lambda row: row["time"])
    newest = {tuple(row.get(key) for key in ("moments", "correction", "from")): row for row in rows}
    return list(newest.values())


def traffic_rows(folder: Path = RESULTS) -> list[Row]:
    """Return the rows of `benchmarks/step_traffic.py` that have operations, by time."""
    rows = [row for path in (folder / "cpu").glob("*-traffic.jsonl") for row in read_rows(path)]
    return sorted((row for row in rows if "tflop" in row), key=lambda row: row["time"])


def towers_step_table(rows: Sequence[Row]) -> str:
    """Return operations and bytes of a step for every model, in plain torch and with the kernels."""
    models: dict[str, dict[str, Row]] = {}
    for row in rows:
        models.setdefault(row["name"], {})[row["impl"].split()[-1]] = row
    body = []
    for name, impls in models.items():
        cells = [f"{impls[impl]['total_gb']:,.0f}" for impl in ("torch", "triton")]
        body.append([name.split()[1], f"{impls['torch']['tflop']:,.0f}", *cells])
    return markdown(["", "TFLOP", "GB, plain torch", "GB, Triton kernels"], body)


def whole_towers_table(rows: Sequence[Row]) -> str:
    """Return the errors of whole models against open_clip's own."""
    body = []
    for row in rows:
        (worst, largest) = next(iter(row["worst_gradient"].items()))
        features = [f"{row['features'][side]:.0e}" for side in ("image", "text")]
        parameters, gradients = f"{row['parameters'] / 1e6:.0f}", str(row["gradients"])
        body.append([row["name"], parameters, *features, gradients, f"{largest:.0e} (`{worst}`)"])
    return markdown(["", "parameters, M", "image", "text", "gradients", "worst gradient"], body)


def search_table() -> str:
    """Return the times of selection and search beside those of other libraries."""
    names = {"top 10": "20,000 queries, 1,000 items, top 10", "ranks": "20,000 queries, 1,000 items, ranks"}
    body = []
    for measure in ("top 10", "ranks", "one query", "search of an index"):
        for row in search_rows(measure):
            name = names.get(measure)
            if name is None:
                size = (
                    f"{row['vectors']:,} vectors"
                    if "vectors" in row
                    else f"an index of {row['moments']:,} moments"
                )
                name = f"one query, {size}"
            others = {
                key.removeprefix("ratio_to_"): x for key, x in row.items() if key.startswith("ratio_to_")
            }
            keys = ("numpy", "faiss", "lancedb", "product")
            cells = [f"{others[key]:.2f}" if key in others else ABSENT for key in keys]
            body.append([name, f"{row['cpu_ms_ours']:,.1f}", *cells])
    others = ("NumPy", "faiss-cpu flat", "LanceDB, no index", "torch's product alone")
    return markdown(["CPU time", "ms", *(f"to {other}" for other in others)], body)


def large_table() -> str:
    """Return size and waiting times of large indexes."""
    body = [
        [
            f"{row['moments']:,}",
            f"{row['bytes_per_vectors_and_thumbnails']:.2f}",
            f"{row['open_seconds']:.2f}",
            f"{row['first_search_seconds']:.1f}",
            "yes" if row["same_as_faiss"] else "no",
        ]
        for row in search_rows("search of an index")
    ]
    heads = ("moments", "bytes / bytes of vectors and JPEGs", "s to open", "s of the first search")
    return markdown([*heads, "hits of faiss"], body)


def reliability_table() -> str:
    """Return how often hits are right, by their probability."""
    body = [
        [
            f"{row['from']:.1f} to {row['to']:.1f}",
            str(row["queries"]),
            *(ABSENT if row[key] is None else f"{row[key]:.2f}" for key in ("mean_probability", "right")),
        ]
        for row in search_rows("reliability")
    ]
    return markdown(["probability", "queries", "mean", "right"], body)


def correction_table() -> str:
    """Return R@1 of the corrections that work for one query at a time."""
    rows = search_rows("R@1")
    body = [[row["correction"], f"{row['R@1']:.1f}"] for row in rows]
    return markdown(["correction", "R@1"], body)


TABLES: dict[str, Callable[[], str]] = {
    "search": search_table,
    "corrections": correction_table,
    "large": large_table,
    "reliability": reliability_table,
    "ladder": lambda: ablation_table(_results("ablation"), "retrieval", LADDER),
    "retrieval": lambda: ablation_table(_results("ablation"), "retrieval"),
    "fusion": lambda: ablation_table(_results("fusion"), "retrieval", runs=FUSION_RUNS),
    "choices": lambda: ablation_table(_results("ablation"), "choices"),
    "losses": lambda: ablation_table(_results("ablation"), "losses"),
    "methods": lambda: methods_table(_results("methods")),
    "methods-short": lambda: methods_table(_results("methods"), SHORT_COLUMNS),
    "time": lambda: time_table(_results("time")),
    "captions": lambda: captions_table(_results("time")),
    "stills": lambda: stills_table(_results("time")),
    "frozen": lambda: frozen_table(read_rows(RESULTS / "cpu/frozen-features.jsonl")),
    "precision": lambda: precision_table(_results("precision")),
    "tokens": lambda: tokens_table(read_rows(RESULTS / "cpu" / "tokens.jsonl")),
    "merged-later": lambda: merged_later_table(_results("tokens")),
    "token-front": lambda: front_table(_results("tokens")),
    "token-times": lambda: token_times_table(read_rows(RESULTS / "cpu" / "token-times.jsonl")),
    "towers-step": lambda: towers_step_table(traffic_rows()),
    "whole-towers": lambda: whole_towers_table(read_rows(RESULTS / "cpu" / "whole-towers.jsonl")),
    "serve": lambda: serve_table(newest_serve()),
    "train-step": lambda: step_table(newest_steps()),
    "kernels": lambda: markdown(*kernel_table(read_rows(RESULTS / "sass/kernels.jsonl"))),
    "train-step-runs": lambda: step_conditions(newest_steps()),
}
BLOCK = re.compile(r"<!-- table ([\w-]+) -->\n.*?<!-- end -->", re.DOTALL)


def fill(page: str) -> str:
    """Return the text of a page with all tables made anew.

    Raises:
        ValueError: a block names an unknown table.
    """

    def block(match: re.Match[str]) -> str:
        name = match[1]
        if name not in TABLES:
            raise ValueError(f"table {name}: expected one of {', '.join(TABLES)}")
        return f"<!-- table {name} -->\n{TABLES[name]()}\n<!-- end -->"

    return BLOCK.sub(block, page)


def main(words: Sequence[str] | None = None) -> int:
    """Update or check the pages, or print one table."""
    parser = argparse.ArgumentParser(description="Make the tables of the documentation from the results.")
    parser.add_argument("table", nargs="?", choices=TABLES, help="print this table and change nothing")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a table is outdated")
    options = parser.parse_args(words)
    if options.table:
        print(TABLES[options.table]())
        return 0
    outdated = []
    for name in PAGES:
        path = ROOT / name
        text = path.read_text()
        if (new := fill(text)) != text:
            outdated.append(name)
            if not options.check:
                path.write_text(new)
    if options.check and outdated:
        print(f"{', '.join(outdated)}: outdated; run python benchmarks/tables.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
