"""Measure on this machine's GPU which implementation of each op is right and fastest, and use those.

A candidate is checked against float64 within the error that its case allows, values and every gradient, then
timed forward and backward.  Candidates run in another process with a time limit each, so that one that
crashes, hangs or runs out of memory is named and left out.  The choices are kept in the user's cache folder
under the GPU, the versions, the source of the kernels and the sizes of the run: later starts read them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from discovla.candidates import Planned, cases_of_run
from discovla.data.sandbox import Sandbox, WorkerLost
from discovla.engine.distributed import World, gather_objects
from discovla.files import write_file
from discovla.foreign import read_json
from discovla.lock import LockHeld, WriterLock
from discovla.methods.base import Method
from discovla.ops import dispatch
from discovla.ops.cases import Case
from discovla.ops.dispatch import Choices, KernelUnavailable, Problem

if TYPE_CHECKING:  # it needs decoders, which a machine that only measures may lack
    from discovla.config import RunConfig

logger = logging.getLogger(__name__)

LIMIT = 30.0  # seconds of a candidate
SECONDS = 60.0  # of all candidates at the start of a run
OPS = 0.6  # share of that time after which the blocks follow, whatever is left of their ops
WARM_UP, CALLS = 3, 10  # of a timed candidate
MARGIN = 0.97  # share of the default's time that another implementation has to stay below

GRAPH = ", graph"  # after the name of an implementation that is timed as a CUDA graph
Clock = Callable[[Callable[[], object], str], float]


def gpu_ms(call: Callable[[], object], name: str) -> float:
    """Return the median milliseconds of a call on the GPU."""
    for _ in range(WARM_UP):
        call()
    times = []
    for _ in range(CALLS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def graph_ms(call: Callable[[], object], name: str) -> float:
    """Return the median milliseconds of a call that is recorded as a CUDA graph and replayed."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return gpu_ms(graph.replay, name)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One implementation of one case.

    checked: the case with fewer rows, compared with float64.
    tf32: True if float32 products may be in TF32.
    choices: measured before, for a block whose ops choose by themselves.
    clock: returns milliseconds of a call; the name is that of the implementation.
    """

    case: Case
    checked: Case
    impl: str
    device: str = "cuda"
    tf32: bool = False
    choices: Choices = field(default_factory=dict)
    clock: Clock = gpu_ms


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Result of a candidate; `failure` is one line, or "" for one that is right."""

    name: str
    impl: str
    problem: Problem | None = None
    error: tuple[float, float] | None = None
    ms: float | None = None
    failure: str = ""


def measure(candidate: Candidate) -> Measurement:
    """Check and time a candidate in this process.

    Raises:
        KernelUnavailable, RuntimeError, OSError: it cannot run, or fails.
    """
    case, impl = candidate.checked, candidate.impl
    torch.backends.cuda.matmul.allow_tf32 = candidate.tf32
    dispatch.use_choices(candidate.choices)
    leaves = case.leaves(candidate.device)
    errors = case.errors(impl, leaves, case.truth(leaves))
    error, limits = (errors["err_fro"], errors["err_gradient"]), case.limits
    result: dict[str, Any] = {"name": candidate.case.name, "impl": impl, "error": error}
    if not all(actual <= most for actual, most in zip(error, limits, strict=True)):
        failure = f"wrong: errors of value and gradients {error[0]:.1e}, {error[1]:.1e}, allowed "
        return Measurement(**result, failure=f"{failure}{limits[0]:.1e}, {limits[1]:.1e}")
    case = candidate.case
    leaves = case.leaves(candidate.device)
    with dispatch.observed_problems() as problems:
        case.step(leaves, impl)
    op = dispatch.SHARED.get(case.op, case.op)
    problem = next(x for x in problems if x[0].split()[0] == op)
    return Measurement(**result, problem=problem, ms=candidate.clock(lambda: case.step(leaves, impl), impl))


def measured(
    plans: Sequence[Planned],
    *,
    seconds: float = SECONDS,
    limit: float = LIMIT,
    device: str = "cuda",
    tf32: bool = False,
    clock: Clock = gpu_ms,
    graph_clock: Clock = graph_ms,
) -> list[Measurement]:
    """Measure all candidates of all cases in another process, until the time is up.

    Blocks are then timed once more as a CUDA graph, by the implementation that was chosen for them.

    Args:
        seconds: of all candidates; one that has begun may take its limit longer.
        limit: seconds of a candidate.
        tf32: True if the run multiplies float32 in TF32.
    """
    results: list[Measurement] = []
    begin = reported = time.monotonic()
    with Sandbox(measure, limit=limit) as sandbox:
        for number, (plan, impl) in enumerate(pairs := list(_candidates(plans)), 1):
            named: dict[str, Any] = {"name": plan.case.name, "impl": impl}
            if reason := dispatch.unavailable(plan.case.op, impl, device, ()):
                results.append(Measurement(**named, failure=f"unavailable: {reason}"))
                continue
            if time.monotonic() - begin > seconds * (1.0 if plan.case.op == "block" else OPS):
                results.append(Measurement(**named, failure="not measured: the time is up"))
                continue
            if time.monotonic() - reported > 2:
                reported = time.monotonic()
                logger.info("tuning %d of %d: %s, %s", number, len(pairs), plan.case.name, impl)
            choices = chosen([results])
            pair: dict[str, Any] = {"case": plan.case, "checked": plan.checked, "impl": impl}
            candidate = Candidate(**pair, device=device, tf32=tf32, choices=choices, clock=clock)
            results.append(_isolated(sandbox, candidate))
            if results[-1].failure:
                logger.warning("tuning: %s, %s: %s", plan.case.name, impl, results[-1].failure)
        choices = chosen([results])
        for plan in (plan for plan in plans if plan.case.op == "block"):
            best = next((x for x in results if x.name == plan.case.name and _taken(x, choices)), None)
            if best is None or time.monotonic() - begin > seconds:
                continue
            pair = {"case": plan.case, "checked": plan.checked, "impl": best.impl, "choices": choices}
            candidate = Candidate(**pair, device=device, tf32=tf32, clock=graph_clock)
            result = _isolated(sandbox, candidate)
            results.append(replace(result, impl=f"{best.impl}{GRAPH}", problem=None))
    if advice := graph_advice(results):
        logger.info("tuning: %s", advice)
    return results


def _taken(x: Measurement, choices: Choices) -> bool:
    """Return True if a measured candidate is the choice for its problem."""
    return x.problem is not None and choices.get(x.problem[0], {}).get(str(x.problem[1])) == x.impl


def graph_advice(measurements: Sequence[Measurement]) -> str:
    """Return a line that recommends engine.capture = "graph" if blocks are faster so, else ""."""
    choices = chosen([measurements])
    whole = graphs = 0.0
    for x in (x for x in measurements if x.impl.endswith(GRAPH) and x.ms is not None):
        name = x.impl.removesuffix(GRAPH)
        one = next(y for y in measurements if y.name == x.name and y.impl == name and _taken(y, choices))
        whole, graphs = whole + (one.ms or 0.0), graphs + (x.ms or 0.0)
    if not whole or graphs > MARGIN * whole:
        return ""
    return f"as CUDA graphs the blocks take {graphs / whole:.0%} of their time: consider engine.capture=graph"


def _candidates(plans: Sequence[Planned]) -> Iterator[tuple[Planned, str]]:
    """Yield the default of every case first, then the other implementations."""
    for plan in plans:
        yield plan, plan.default
        for impl in dispatch.implementations(plan.case.op):
            if impl != plan.default:
                yield plan, impl


def _isolated(sandbox: Sandbox[Candidate, Measurement], candidate: Candidate) -> Measurement:
    """Measure a candidate in the sandbox; whatever goes wrong there is its failure."""
    try:
        return sandbox(candidate)
    except WorkerLost as lost:
        failure = f"failed: {lost}"
    except KernelUnavailable as error:
        failure = f"unavailable: {error}"
    except torch.OutOfMemoryError:
        return Measurement(name=candidate.case.name, impl=candidate.impl, failure="failed: out of memory")
    except Exception as error:  # of any kind: a candidate must not end the run
        line = (str(error).splitlines() or [""])[0][:200]
        failure = f"failed: {type(error).__name__}: {line}"
    sandbox.close()  # an error of a kernel leaves its process without a usable GPU
    return Measurement(name=candidate.case.name, impl=candidate.impl, failure=failure)


def chosen(kinds: Sequence[Sequence[Measurement]]) -> dict[str, dict[str, str]]:
    """Return the choice of each problem: of what is right on all kinds of GPU, the fastest on the slowest.

    Args:
        kinds: the measurements of each kind of GPU.
    """
    times: dict[Problem, dict[str, list[float]]] = {}
    for number, measurements in enumerate(kinds):
        for x in measurements:
            if x.problem is not None and x.ms is not None and not x.failure:
                slots = times.setdefault(x.problem, {}).setdefault(x.impl, [float("inf")] * len(kinds))
                slots[number] = x.ms
    choices: dict[str, dict[str, str]] = {}
    for (key, rows), by_impl in times.items():
        first = next(iter(by_impl))  # the default
        slowest = {impl: max(ms) * (1 if impl == first else 1 / MARGIN) for impl, ms in by_impl.items()}
        best = min(slowest, key=lambda impl: slowest[impl])
        if slowest[best] < float("inf"):
            choices.setdefault(key, {})[str(rows)] = best
    return choices


def machine_key(device: torch.device) -> dict[str, str]:
    """Return what measured times depend on besides the cases: the GPU, versions, and the kernels' source."""
    triton = importlib.util.find_spec("triton")
    key = {"torch": torch.__version__, "triton": "none", "source": source_hash()}
    if triton is not None:
        key["triton"] = importlib.import_module("triton").__version__
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        key |= {"gpu": torch.cuda.get_device_name(device), "capability": f"{major}.{minor}"}
        key["driver"] = str(torch._C._cuda_getDriverVersion())  # pyright: ignore[reportAttributeAccessIssue]
    return key


@cache
def source_hash() -> str:
    """Return a hash of the source of ops, blocks and kernels."""
    root = Path(__file__).parent
    folders = [root / "ops", root / "nn"]
    kernels = importlib.util.find_spec("discovla_kernels")
    folders += [Path(place) for place in (kernels.submodule_search_locations or [])] if kernels else []
    digest = hashlib.sha256()
    for path in sorted(path for folder in folders for path in folder.rglob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def table_path(key: dict[str, str]) -> Path:
    """Return the file of the choices that belong to a key."""
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return dispatch.cache_folder() / "choices" / f"{name}.json"


def read_table(path: Path, key: dict[str, str]) -> list[Measurement] | None:
    """Return the measurements of a file; None if there is none of this key."""
    try:
        table = read_json(path, "measured choices")
        if table.get("key") != key:
            return None
        return [_measurement(row) for row in table["measurements"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _measurement(row: dict[str, Any]) -> Measurement:
    pair = {name: None if row[name] is None else tuple(row[name]) for name in ("problem", "error")}
    return Measurement(**{**row, **pair})


def write_table(path: Path, key: dict[str, str], measurements: Sequence[Measurement]) -> None:
    """Keep measurements; a folder that cannot be written, or is being written, is named in the log."""
    table = {"key": key, "choices": chosen([measurements]), "measurements": [asdict(x) for x in measurements]}
    try:
        with WriterLock(path.parent, "discovla tune"):
            write_file(path, json.dumps(table, indent=1) + "\n")
    except (OSError, LockHeld) as error:
        logger.warning("tuning: the choices are not kept: %s", error)


def tune(config: RunConfig, method: Method, world: World, *, anew: bool = False) -> list[Measurement]:
    """Measure the run's cases on the first rank of each kind of GPU, or read them; use the choices.

    Returns:
        The measurements of this rank's kind of GPU.

    Raises:
        ValueError: engine.tune names a file that is not of this machine.
    """
    if config.engine.tune == "off" or world.device.type != "cuda":
        return []
    pairs = max(1, config.batch_size // world.size)
    plans = cases_of_run(method, pairs, config.data.frames, config.data.context_length)
    key = machine_key(world.device) | {"cases": "; ".join(plan.case.name for plan in plans)}
    keys = gather_objects(key, world)
    mine: list[Measurement] | ValueError | None = None
    if keys.index(key) == world.rank:
        try:
            mine = measurements_of(config.engine.tune, key, plans, anew=anew, tf32=config.engine.tf32)
        except ValueError as error:
            mine = error
    gathered = gather_objects(mine, world)
    for error in (x for x in gathered if isinstance(x, ValueError)):
        raise error
    kinds = [x for x in gathered if x is not None]
    if len(kinds) > 1:
        names = sorted({other["gpu"] for other in keys})
        logger.warning("tuning: ranks differ (%s): taking what is right on all of them", ", ".join(names))
    dispatch.use_choices(chosen(kinds))
    return gathered[keys.index(key)]


def measurements_of(
    option: str, key: dict[str, str], plans: Sequence[Planned], *, anew: bool = False, **options: Any
) -> list[Measurement]:
    """Return the kept measurements of a key, or measure and keep them.

    Args:
        option: `engine.tune`, "auto" or a file.
        options: of `measured`.

    Raises:
        ValueError: the file is not of this key.
    """
    path = table_path(key) if option == "auto" else Path(option)
    kept = None if anew else read_table(path, key)
    if kept is not None:
        return kept
    if option != "auto":
        raise ValueError(
            f"engine.tune: {path}: expected choices that `discovla tune` measured for these sizes on "
            f"{key.get('gpu', 'this device')} with torch {key['torch']}, found no such file"
        )
    begin = time.monotonic()
    logger.info("tuning: checking and timing implementations of %d cases, once", len(plans))
    measurements = measured(plans, **options)
    right = sum(not x.failure for x in measurements)
    seconds = time.monotonic() - begin
    logger.info(
        "tuning: %d of %d candidates are right, %.0f s; choices in %s",
        right,
        len(measurements),
        seconds,
        path,
    )
    write_table(path, key, measurements)
    return measurements


def format_table(measurements: Sequence[Measurement]) -> str:
    """Return one line for each candidate: case, implementation, error, milliseconds, and the result."""
    choices = chosen([measurements])
    lines = [f"{'case':52} {'candidate':12} {'error':>9} {'ms':>9}  result"]
    for x in measurements:
        result = x.failure or ("chosen" if _taken(x, choices) else "slower")
        if not x.failure and x.impl.endswith(GRAPH):
            result = "recorded and replayed"
        error = "" if x.error is None else f"{max(x.error):.1e}"
        ms = "" if x.ms is None else f"{x.ms:.3f}"
        lines.append(f"{x.name:52} {x.impl:12} {error:>9} {ms:>9}  {result}")
    return "\n".join([*lines, *filter(None, [graph_advice(measurements)])])
