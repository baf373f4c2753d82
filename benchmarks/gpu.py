r"""Check and time steps and kernels on this machine's GPU, within a lease of a few minutes.

    python benchmarks/gpu.py                      all, within ten minutes
    python benchmarks/gpu.py --seconds 200        as much as fits; checks in bf16 alone
    python benchmarks/gpu.py --only frame         only cases whose name contains the word
    python benchmarks/gpu.py --gate               exit 1 if worse than earlier results of the same GPU
    python benchmarks/gpu.py --table FILE         the table of a results file; needs no GPU
    python benchmarks/gpu.py --simulate           the flow on a CPU: all cases, played, some of which crash,
                                                  hang and lie, and what is not installed here

Each case runs in a process of its own kind with a time limit, and its rows are written as soon as it ends, to
benchmarks/results/<gpu>/ and to the folder $OUT if it is set.  So a case that crashes, hangs or runs out of
memory costs itself alone, and a run that is cut short leaves a true table of what it reached.  The order:
kernels are compiled on all cores; ceilings; the training step from its products alone to the whole captured
one, with copies, clipping and update; checks against float64 and times of the towers' ops, then of the
losses, by every candidate (`CANDIDATES` in discovla/ops/dispatch.py) and the functions of other libraries
(`benchmarks/peers.py`); data.  A candidate that is wrong is marked, and timed all the same.  What is left
out or not installed has a row with the reason.  The exit status
is 2 without a GPU, and 1 if a kernel is wrong.

Checks and times of ops need torch, triton and numpy alone; training steps also pydantic, safetensors and
regex.  These and the other libraries are found in build/packages too, which a machine without a package index
can be sent:

    pip install --target build/packages pydantic safetensors regex
    pip install --target build/packages --no-deps einops inf_cl late-interaction-kernels liger-kernel memeff \
        siglip-kernel
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script starts with its own folder there
sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
sys.path.append(str(Path(__file__).parents[1] / "build/packages"))  # of a machine without a package index

from benchmarks.case_lists import checked_cases, checked_tower_cases, timed_cases, timed_tower_cases
from benchmarks.gpu_report import earlier_rows, regressions, report
from benchmarks.measure import (
    Times,
    extra_gpu_bytes,
    gpu_ceilings,
    gpu_launches,
    machine,
    measure_times,
    peak_tflops,
    read_rows,
    results_file,
    write_row,
)
from discovla.data.sandbox import Sandbox, WorkerLost, run_sandboxed
from discovla.ops.cases import Case, gradients_of
from discovla.ops.dispatch import CANDIDATES, KernelUnavailable, unavailable

LARGE = (4e-3, 8e-3)  # allowed from 4096 pairs on, where bf16 rows are multiplied in bf16
SECONDS = 0.5  # of timing for each row, or a little more for 50 calls
ROUNDS = 50  # of a training step
LIMITS = {"compile": 60.0, "ceilings": 60.0, "steps": 120.0, "towers": 40.0, "losses": 40.0, "data": 120.0}
SHARES = {"compile": 0.15, "ceilings": 1.0, "steps": 0.55, "towers": 0.8, "losses": 0.95, "data": 1.0}
PLAIN = ("reference", "torch", "compiled")  # tested on CPUs; the other candidates are checked here
COMPILING = ("compiled", "chunks")  # candidates that torch.compile makes, too slowly for every ragged size
COMPILED_FROM = 1000  # rows, or pairs, of the cases in which those are checked
INTEGERS = ("rank_of_positive", "top_k")  # ops whose results must be equal
FIRST = ("triton", "cuda", "torch", "reference", "compiled")  # in the order of timing; the rest follows
STEPS = (  # in the order of timing
    "matmul only bf16",
    "ours bf16",
    "ours bf16 compiled",
    "ours bf16 triton",
    "ours bf16 captured",
    "ours bf16 compiled captured",
    "ours bf16 triton captured",
    "ours bf16 whole",
    "ours bf16 compiled whole",
    "ours bf16 triton captured whole",
    "ours bf16 tuned whole",
    "reference bf16 sdpa compiled whole",
    "reference bf16 sdpa",
    "reference bf16 sdpa compiled",
    "ours fp8",
    "ours fp8 backward",
    "ours",
    "reference",
)
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Task:
    """Work of one row or a few, in another process.

    group: "compile", "ceilings", "steps", "towers", "losses" or "data", with a limit and a share of the time.
    work: function of this module, called with `arguments`; returns rows.
    """

    group: str
    name: str
    impl: str
    work: Callable[..., list[Row]]
    arguments: tuple[Any, ...] = ()


def perform(task: Task) -> list[Row]:
    """Do the work of a task in this process, and leave the GPU's memory to others."""
    try:
        return task.work(*task.arguments)
    finally:
        if torch.cuda.is_initialized():
            gc.collect()
            torch.cuda.empty_cache()


def check(case: Case, impl: Any, device: str) -> list[Row]:
    """Compare a kernel with float64; bf16 products flip maxima, so 1.2 x plain torch's error is allowed."""
    if case.op in INTEGERS:
        return [check_integers(case, impl, device)]
    leaves = case.leaves(device)
    case.run(leaves, impl)  # fails, if it does, before the truth is computed, which takes long
    truth = case.truth(leaves)
    error, limits = case.errors(impl, leaves, truth), case.limits
    if case.n >= 4096 and case.dtype == torch.bfloat16:
        plain = case.errors("torch", leaves, truth)
        limits = max(LARGE[0], 1.2 * plain["err_fro"]), max(LARGE[1], 1.2 * plain["err_gradient"])
    return [error | {"ok": error["err_fro"] <= limits[0] and error["err_gradient"] <= limits[1]}]


def check_integers(case: Case, impl: Any, device: str) -> Row:
    """Compare ranks and indices for equality, on rows of ±1, whose cosines are exact in every dtype.

    The width is a power of four, so that the norm is a power of two.
    """
    width = 1 << (case.dim.bit_length() - 1) // 2 * 2
    leaves = [(x.sign() + (x == 0))[:, :width].contiguous() for x in case.leaves(device)[:2]]
    got = case.call(leaves, impl, case.masked)
    want = case.call([x.double() for x in leaves], "reference", case.masked)
    wrong = int((got != want).sum())
    return {"wrong_integers": wrong, "ok": wrong == 0}


def runner(case: Case, impl: str, device: str) -> Callable[[int], list[Tensor]]:
    """Return a numbered call that takes four inputs in turn, so that none is in the GPU's cache.

    impl: an implementation, "compiled" (the reference under torch.compile), or the name of a peer.
    """
    inputs = [case.leaves(device, seed) for seed in range(4 if case.n <= 4096 else 1)]
    if impl == "compiled":

        def reference(*leaves: Tensor) -> Tensor:
            return case.call(list(leaves), "reference", case.masked)

        compiled = torch.compile(reference)
        return lambda number: gradients_of(case, inputs[number % len(inputs)], lambda x: compiled(*x))
    if impl in CANDIDATES[case.op]:
        return lambda number: case.step(inputs[number % len(inputs)], impl)
    from benchmarks.peers import PEERS

    peer = next(peer for peer in PEERS if peer.name == impl and peer.op == case.op)
    if reason := peer.absent():
        raise KernelUnavailable(reason)
    return lambda number: gradients_of(case, inputs[number % len(inputs)], peer.call)


def difference(impl: str) -> str:
    """Return in what a library's function differs from our op; empty for nothing, or one of ours."""
    from benchmarks.peers import PEERS

    return next((peer.differs for peer in PEERS if peer.name == impl), "")


def does_not_fit(case: Case, impl: str, device: str) -> str:
    """Return why memory is too small for an implementation that stores whole matrices; empty if it fits."""
    if device == "cpu" or impl not in ("reference", "math", "compiled"):
        return ""
    free, _ = torch.cuda.mem_get_info()
    if case.reference_bytes < 0.8 * free:
        return ""
    return f"it holds at least {case.reference_bytes / 1e9:.0f} GB at once, {free / 1e9:.0f} GB are free"


def time_case(case: Case, impl: str, ceilings: dict[str, float], device: str, seconds: float) -> list[Row]:
    """Time one implementation at one size."""
    if reason := does_not_fit(case, impl, device):
        return [{"left_out": reason}]
    call = runner(case, impl, device)
    times = measure_times(call, cuda=device == "cuda", seconds=seconds)
    tflops = case.flops / times.ms_p50 / 1e9
    # bytes moved at least: inputs, and with backward their gradients
    moved = sum(x.numel() * x.element_size() for x in case.leaves(device)) * (2 if case.backward else 1)
    gbps = moved / times.ms_p50 / 1e6
    row = {
        "dtype": str(case.dtype)[6:],
        "shapes": case.shapes,
        "tflops_needed": tflops,
        "tflops_ref": tflops * (3 / 4 if case.backward else 1),  # the reference needs no second forward
        "frac_gemm": tflops / ceilings["gemm_bf16"],
        "gbps": gbps,
        "frac_copy": gbps / 1000 / ceilings["copy"],
        "target_ms": case.target_ms,
        "target_gb": case.target_gb,
        "ceilings": ceilings,
        "differs": difference(impl),
        "extra_gb": 0.0,
        "launches": 0,
    }
    if device == "cuda":
        peak = peak_tflops(torch.cuda.get_device_name())
        row["mfu"] = None if peak is None else tflops / peak
        row |= {"extra_gb": extra_gpu_bytes(lambda: call(0)) / 1e9, "launches": gpu_launches(lambda: call(0))}
    return [row | vars(times)]


def compile_case(case: Case, impl: str, device: str) -> list[Row]:
    """Run a kernel once, so that its code is in the compiler's cache on disk."""
    case.step(case.leaves(device), impl)
    return [{"compiled": True}]


def measure_ceilings() -> list[Row]:
    """Measure the products and copies that this GPU reaches."""
    return [{"ceilings": gpu_ceilings()}]


def time_step(model: str, pairs: int, impl: str, ceilings: dict[str, float], seconds: float) -> list[Row]:
    """Time one implementation of a training step."""
    from benchmarks.step import Comparison, compare

    comparison = Comparison(model=model, pairs=pairs, rounds=ROUNDS, impls=[impl], seconds=seconds)
    rows = compare(comparison, "cuda")
    for row in rows:
        if "ms_p50" in row:
            row["frac_gemm"] = row["tflops_needed"] / ceilings["gemm_bf16"]
    return rows


def time_data(path: Path, where: Row) -> list[Row]:
    """Measure frames a second of all decoders and shards."""
    from benchmarks.data import measure_machine

    measure_machine(path, where)
    return [{"results": path.name}]


class Runner:
    """Runs tasks in other processes and writes their rows as they come.

    Args:
        files: results files that each row is appended to.
        where: conditions, in every row.
        limits: seconds of a task of each group.
    """

    def __init__(self, files: Sequence[Path], where: Row, limits: dict[str, float]) -> None:
        self.files, self.where, self.limits = files, where, limits
        self.rows: list[Row] = []
        self.sandbox: Sandbox[Task, list[Row]] = Sandbox(perform, limit=min(limits.values()))

    def run(self, tasks: Sequence[Task], deadline: float) -> list[Row]:
        """Run tasks one after another until the deadline; later ones have a row that says so."""
        before = len(self.rows)
        for task in tasks:
            left = deadline - time.monotonic()
            if left <= 1:
                self.write(task, [{"left_out": "time is up"}])
            else:
                self.write(task, self.outcome(task, left))
        return self.rows[before:]

    def outcome(self, task: Task, left: float) -> list[Row]:
        """Run a task and return its rows, or one row with the reason why there are none.

        Its limit is that of its group, halved until it fits into the seconds that are left.
        """
        limit = self.limits[task.group]
        while limit > max(1.0, left):
            limit /= 2
        if limit != self.sandbox.limit:
            self.sandbox.close()
            self.sandbox = Sandbox(perform, limit=limit)
        try:
            return self.sandbox(task)
        except WorkerLost as lost:
            return [{"left_out": f"fails: {lost}"}]
        except KernelUnavailable as error:
            return [{"left_out": str(error)}]
        except torch.OutOfMemoryError as error:
            failure = str(error).splitlines()[0]
        except Exception as error:  # of any kind: it belongs to the table, and the next case follows
            failure = f"fails: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        self.sandbox.close()  # an error of a kernel leaves its process without a usable GPU
        return [{"left_out": failure}]

    def compile(self, tasks: Sequence[Task], deadline: float, workers: int) -> None:
        """Compile in parallel until the deadline; failures appear again where the kernel is checked."""
        done = 0
        limit = min(self.limits["compile"], max(1.0, deadline - time.monotonic()))

        def before_deadline() -> Iterator[Task]:
            yield from (task for task in tasks if time.monotonic() < deadline)

        for result in run_sandboxed(perform, before_deadline(), workers=workers, limit=limit):
            done += result.error is None
        print(f"{done} of {len(tasks)} kernels compiled on {workers} cores", flush=True)

    def write(self, task: Task, rows: Sequence[Row]) -> None:
        """Append rows to every file and print them."""
        for row in rows:
            row = {"name": task.name, "impl": task.impl, "op": task.name.split()[0], **row}
            self.rows.append(row)
            for path in self.files:
                write_row(path, {**self.where, **row})
            show(row)

    def close(self) -> None:
        """End the process of the tasks."""
        self.sandbox.close()


def show(row: Row) -> None:
    """Print one line for a row."""
    if "left_out" in row:
        text = f"left out: {row['left_out']}"
    elif "ms_p50" in row:
        text = f"{row['ms_p50']:9.3f} ms [{row['ms_p20']:.3f}, {row['ms_p80']:.3f}]"
        text += f" {row['tflops_needed']:7.1f} TFLOP/s {row['launches']:5d} launches"
    elif "ok" in row:
        errors = {key: row[key] for key in ("err_fro", "err_gradient", "wrong_integers") if key in row}
        text = ("right" if row["ok"] else "WRONG") + "".join(f" {k} {v:.2g}" for k, v in errors.items())
    else:
        text = str({key: value for key, value in row.items() if key not in ("name", "impl", "op")})
    print(f"{row['name']:58} {row['impl']:12} {text}", flush=True)


def op_tasks(
    group: str, checked: Sequence[Case], timed: Sequence[Case], ceilings: dict[str, float], device: str
) -> list[Task]:
    """Return op by op one row for each candidate and peer that is missing here, checks, and times.

    A run that is cut short so has all figures of the first ops.
    """
    tasks = []
    for op in dict.fromkeys(case.op for case in [*timed, *checked]):
        missing = {impl: unavailable(op, impl, device, ()) for impl in CANDIDATES[op]}
        missing |= {peer.name: peer.missing() for peer in peers(op)}
        missing = {impl: reason for impl, reason in missing.items() if reason}
        make = partial(Task, group=group)
        tasks += [
            make(name=op, impl=impl, work=leave_out, arguments=(reason,)) for impl, reason in missing.items()
        ]
        impls = [impl for impl in candidates(op) if impl not in missing]
        tasks += [
            make(name=case.name, impl=impl, work=check, arguments=(case, impl, device))
            for case in checked
            for impl in impls
            if case.op == op and impl not in PLAIN and (impl not in COMPILING or case.n >= COMPILED_FROM)
        ]
        others = [peer.name for peer in peers(op) if peer.name not in missing]
        tasks += [
            make(name=case.name, impl=impl, work=time_case, arguments=(case, impl, ceilings, device, SECONDS))
            for case in timed
            if case.op == op
            for impl in [*impls, *([] if case.masked else others)]
        ]
    return tasks


def candidates(op: str) -> list[str]:
    """Return the candidates of an op in the order of timing, with its reference under torch.compile."""
    names = dict.fromkeys([*CANDIDATES[op], "compiled"])
    return sorted(names, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))


def peers(op: str) -> list[Any]:
    """Return the functions of other libraries for an op."""
    from benchmarks.peers import PEERS

    return [peer for peer in PEERS if peer.op == op]


def leave_out(reason: str) -> list[Row]:
    """Return the row of a candidate that is missing on this machine."""
    return [{"left_out": reason}]


def step_tasks(ceilings: dict[str, float], seconds: float) -> list[Task]:
    """Return the training steps, ViT-B/32 with 128 pairs first."""
    return [
        Task(group="steps", name=f"step {model} b{pairs}", impl=impl, work=time_step,
             arguments=(model, pairs, impl, ceilings, seconds))
        for model, pairs, impls in (
            ("ViT-B/32", 128, STEPS), ("ViT-B/32", 1, STEPS[1:7]), ("ViT-B/16", 128, STEPS[:7]),
            ("ViT-L/14", 128, STEPS[:7]), ("ViT-B/32", 1024, STEPS[:7]),
        )
        for impl in impls
    ]  # fmt: skip


def run_all(runner: Runner, options: argparse.Namespace, device: str) -> None:
    """Run all groups in order, each until its share of the time has passed."""
    begin = time.monotonic()
    until = {group: begin + share * options.seconds for group, share in SHARES.items()}
    small = options.seconds < 400
    suite = "small" if small else "full"
    cases = {
        "towers": (checked_tower_cases(), timed_tower_cases(suite)),
        "losses": (checked_cases(), timed_cases(suite)),
    }
    cases = {
        group: (
            [x for x in checked if options.only in x.name and (not small or x.dtype == torch.bfloat16)],
            [x for x in timed if options.only in x.name],
        )
        for group, (checked, timed) in cases.items()
    }
    kernels = [
        Task(
            group="compile",
            name=case.name,
            impl="triton",
            work=compile_case,
            arguments=(case, "triton", device),
        )
        for group in cases
        for case in [*cases[group][1], *cases[group][0]]
        if "triton" in CANDIDATES[case.op]
    ]
    runner.compile(kernels, until["compile"], options.workers)
    measured = runner.run(
        [Task(group="ceilings", name="ceilings", impl="torch", work=measure_ceilings)], until["ceilings"]
    )
    ceilings = measured[0].get("ceilings", {"gemm_bf16": float("nan"), "copy": float("nan")})
    steps = [task for task in step_tasks(ceilings, 5.0) if options.only in task.name]
    runner.run(steps, until["steps"])
    for group, (checked, timed) in cases.items():
        runner.run(op_tasks(group, checked, timed, ceilings, device), until[group])
    if not options.only:
        path = runner.files[0].with_name(runner.files[0].name.replace("-gpu", "-data"))
        data = Task(group="data", name="data", impl="all", work=time_data, arguments=(path, runner.where))
        runner.run([data], until["data"])


def simulated(kind: str) -> list[Row]:
    """Run a simulated case, which is right, wrong, crashes, hangs, or runs out of memory."""
    match kind:
        case "crashes":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "hangs":
            time.sleep(1000)
        case "out of memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 TiB")
        case "fails":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        case "lies":
            return [{"err_fro": 0.1, "err_gradient": 0.2, "ok": False}]
        case "right":
            return [{"err_fro": 1e-7, "err_gradient": 1e-6, "ok": True}]
        case "ceilings":
            return [{"ceilings": {"gemm_bf16": 1.0, "gemm_fp32": 1.0, "copy": 1.0}}]
    row = {"tflops_needed": 1.0, "frac_gemm": 0.5, "launches": 3, "extra_gb": 0.0}
    return [row | vars(Times(ms_p50=2.0, ms_p20=1.9, ms_p80=2.1, n=50))]


class SimulatedRunner(Runner):
    """Plays the tasks of a run: each is right or timed, but for the first ones, which fail in every way."""

    bad = ("lies", "crashes", "hangs", "out of memory", "fails")

    def run(self, tasks: Sequence[Task], deadline: float) -> list[Row]:
        return super().run([self.played(task) for task in tasks], deadline)

    def compile(self, tasks: Sequence[Task], deadline: float, workers: int) -> None:
        played = [replace(task, work=simulated, arguments=("right",)) for task in tasks[:1]]
        super().compile([*played, replace(played[0], arguments=("crashes",))], deadline, workers)

    def played(self, task: Task) -> Task:
        """Return a task with the same name whose work is made up; what is missing here stays missing."""
        if task.work is leave_out:
            return task
        kind = {check: "right", measure_ceilings: "ceilings"}.get(task.work, "timed")
        if kind == "right" and self.bad:
            kind, *self.bad = self.bad
        return replace(task, work=simulated, arguments=(kind,))


def finish(runner: Runner, before: dict[tuple[str, str], list[Row]], *, gate: bool) -> int:
    """Print the table and what is wrong or worse; return the exit status."""
    checked = [row for row in runner.rows if "ok" in row]
    wrong = [row for row in checked if not row["ok"]]
    print("", report(runner.rows), sep="\n")
    for reason, count in Counter(row["left_out"] for row in runner.rows if "left_out" in row).items():
        print(f"{count} left out: {reason}")
    print(f"{len(checked)} checks, {len(wrong)} wrong")
    print(*(f"WRONG {row['name']} {row['impl']}" for row in wrong), sep="\n")
    worse = [
        line for row in runner.rows for line in regressions(row, before.get((row["name"], row["impl"]), []))
    ]
    print(*(f"WORSE {line}" for line in worse), *(f"results: {path}" for path in runner.files), sep="\n")
    return 1 if wrong or (gate and worse) else 0


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", metavar="WORD", help="cases whose name contains this word")
    parser.add_argument("--seconds", type=float, default=570, help="time limit of all cases")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that compile")
    parser.add_argument("--gate", action="store_true", help="exit 1 if worse than earlier results")
    parser.add_argument("--simulate", action="store_true", help="show the flow on a CPU with simulated cases")
    parser.add_argument(
        "--table", type=Path, metavar="FILE", help="print the table of a results file and run nothing"
    )
    return parser.parse_args(words)


def results_files(where: Row, *, simulated: bool) -> list[Path]:
    """Return the files of a run: of the GPU's results, and of the folder $OUT."""
    out = [Path(os.environ["OUT"])] if os.environ.get("OUT") else []
    if simulated:
        return [(out[0] if out else Path.cwd()) / "simulated-gpu.jsonl"]
    path = results_file(where, "gpu")
    return [path, *(folder / path.name for folder in out)]


def main(words: Sequence[str] | None = None) -> int:
    """Compile, check, time, report."""
    options = parse(words)
    if options.table:
        print(report(read_rows(options.table)))
        return 0
    if not options.simulate and not torch.cuda.is_available():
        print("benchmarks/gpu.py needs a CUDA device, and torch finds none here", file=sys.stderr)
        return 2
    where = machine("cpu" if options.simulate else "cuda")
    files = results_files(where, simulated=options.simulate)
    before = {} if options.simulate else earlier_rows(files[0].parent, where["time"])
    limits = dict.fromkeys(LIMITS, 10.0) if options.simulate else LIMITS
    runner = (SimulatedRunner if options.simulate else Runner)(files, where, limits)
    try:
        run_all(runner, options, "cuda")
    finally:
        runner.close()
    return finish(runner, before, gate=options.gate)


if __name__ == "__main__":
    from benchmarks import gpu  # so that other processes find the functions of tasks by this name

    sys.exit(gpu.main())
