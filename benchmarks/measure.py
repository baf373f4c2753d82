"""Times, memory and errors of one call, on a CPU or a GPU, and the rows they are written down in."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"


@dataclass(frozen=True, kw_only=True)
class Times:
    """Milliseconds of n calls."""

    ms_p50: float
    ms_p20: float
    ms_p80: float
    n: int


def measure_times(call: Callable[[int], object], *, cuda: bool, seconds: float, least: int = 5) -> Times:
    """Time calls, numbered from 0 so that they may take inputs in turn, for about `seconds`.

    At least 50 calls where these take no more than three times as long, else as many as fit, and `least`.
    """
    for warm_up in range(3):
        call(warm_up)
    once = max(_time(call, 0, cuda), 1e-3)
    fitting = 1000 * seconds / once
    count = int(min(200, max(least, fitting, min(50, 3 * fitting))))
    found = sorted(_time(call, number, cuda) for number in range(count))
    return Times(
        ms_p50=statistics.median(found),
        ms_p20=found[int(0.2 * (count - 1))],
        ms_p80=found[int(0.8 * (count - 1))],
        n=count,
    )


def _time(call: Callable[[int], object], number: int, cuda: bool) -> float:
    if not cuda:
        begin = time.perf_counter()
        call(number)
        return 1000 * (time.perf_counter() - begin)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call(number)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def extra_gpu_bytes(call: Callable[[], list[Tensor]]) -> int:
    """Peak of what a call allocates on the GPU beside what it returns."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = call()
    torch.cuda.synchronize()
    returned = sum(x.numel() * x.element_size() for x in out)
    return torch.cuda.max_memory_allocated() - before - returned


def gpu_launches(call: Callable[[], object]) -> int:
    """Kernels and copies one call puts on the GPU."""
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        call()
        torch.cuda.synchronize()
    return sum(event.count for event in recorded.key_averages() if event.device_time_total)


def product_flops(call: Callable[[], object]) -> float:
    """Floating-point operations of torch's matrix products in one call on a CPU."""
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as recorded:
        call()
    return float(sum(event.flops for event in recorded.key_averages() if event.key == "aten::mm"))


def relative_frobenius(got: Tensor, want: Tensor) -> float:
    """‖got - want‖ / ‖want‖."""
    want = want.double()
    return ((got.double() - want).norm() / want.norm().clamp(min=1e-30)).item()


def peak_tflops(device: str) -> float | None:
    """Dense bf16 TFLOP/s in the data sheet of a GPU, which MFU is quoted against; None for one not listed."""
    sheet = {"A100": 312.0, "H100 PCIe": 756.0, "H100": 989.0, "H200": 989.0}
    return next((peak for name, peak in sheet.items() if name in device), None)


def gpu_ceilings() -> dict[str, float]:
    """What this GPU reaches, measured: bf16 and fp32 products of 8192³ in TFLOP/s, a copy of 2 GB in TB/s."""
    found = {}
    for name, dtype, size in (("gemm_bf16", torch.bfloat16, 8192), ("gemm_fp32", torch.float32, 4096)):
        x, y = (torch.randn(size, size, device="cuda").to(dtype) for _ in "xy")
        times = measure_times(lambda _, x=x, y=y: x @ y, cuda=True, seconds=1)
        found[name] = 2 * size**3 / times.ms_p50 / 1e9
    x = torch.randn(1 << 28, device="cuda")
    y = torch.empty_like(x)
    times = measure_times(lambda _: y.copy_(x), cuda=True, seconds=1)
    found["copy"] = 2 * x.numel() * 4 / times.ms_p50 / 1e9
    return found


def machine(device: str) -> dict[str, Any]:
    """What a figure depends on: device, driver, clocks, versions, commit, time."""
    found: dict[str, Any] = {"device": device, "torch": torch.__version__, "cuda": torch.version.cuda}
    found["time"] = datetime.now(UTC).isoformat(timespec="seconds")
    if device != "cpu":
        import triton

        found |= {"device": torch.cuda.get_device_name(), "triton": triton.__version__} | _driver()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    state = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=ROOT, capture_output=True, text=True)
    return found | {"commit": commit.stdout.strip(), "dirty": bool(state.stdout.strip())}


def _driver() -> dict[str, str]:
    """Driver, and what bounds the clocks, as nvidia-smi says; where it is not installed, that."""
    asked = ("driver_version", "clocks.max.sm", "clocks.sm", "power.limit")
    words = ["nvidia-smi", f"--query-gpu={','.join(asked)}", "--format=csv,noheader", "--id=0"]
    try:
        said = subprocess.run(words, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return {"driver": "unknown", "clocks_note": "nvidia-smi does not answer"}
    driver, *rest = (word.strip() for word in said.splitlines()[0].split(","))
    return {"driver": driver, "clocks_note": "max {}, now {}, power limit {}".format(*rest)}


def results_file(where: dict[str, Any], subject: str) -> Path:
    """benchmarks/results/<device>/<date>-<commit>-<subject>.jsonl."""
    folder = RESULTS / str(where["device"]).lower().replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{datetime.now(UTC):%Y%m%d}-{where['commit']}-{subject}.jsonl"


def write_row(path: Path, row: dict[str, Any], times: Times | None = None) -> None:
    """Append one line, to a file that another process may be adding to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(row | (asdict(times) if times else {}))
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, f"{line}\n".encode())  # one write: lines of two processes never mix
    finally:
        os.close(handle)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of one results file; none where there is no such file.

    Raises:
        ValueError: a line is no JSON object; it is named.
    """
    rows = []
    for number, line in enumerate(path.read_text().splitlines() if path.is_file() else [], 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: expected a JSON object, found {line[:40]!r}") from error
    return rows
