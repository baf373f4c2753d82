"""Times, memory, counts and errors of one call, on a CPU or a GPU, and files of results."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
# ops that start no kernel although they are no views
STILL = {"_unsafe_view", "detach", "empty", "empty_like", "empty_strided", "new_empty"}
# our ops that start more than one kernel; the last starts four more if the logit scale is trained
SEVERAL = {
    "mlp": 2,
    "fusion_norm": 2,
    "fusion_norm_backward": 3,
    "alignment_block": 4,
    "alignment_block_backward": 7,
}


@dataclass(frozen=True, kw_only=True)
class Times:
    """Milliseconds of `n` calls."""

    ms_p50: float
    ms_p20: float
    ms_p80: float
    n: int


def measure_times(call: Callable[[int], object], *, cuda: bool, seconds: float, least: int = 5) -> Times:
    """Time numbered calls (so that they can take inputs in turn) for about `seconds`.

    There are at least 50 calls if these take at most three times as long, else as many as fit, at least
    `least`.
    """
    for warm_up in range(3):
        call(warm_up)
    once = max(_time(call, 0, cuda), 1e-3)
    fitting = 1000 * seconds / once
    count = int(min(200, max(least, fitting, min(50, 3 * fitting))))
    ms = sorted(_time(call, number, cuda) for number in range(count))
    return Times(
        ms_p50=statistics.median(ms),
        ms_p20=ms[int(0.2 * (count - 1))],
        ms_p80=ms[int(0.8 * (count - 1))],
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
    """Return the peak GPU memory of a call, without its results."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = call()
    torch.cuda.synchronize()
    returned = sum(x.numel() * x.element_size() for x in out)
    return torch.cuda.max_memory_allocated() - before - returned


def gpu_launches(call: Callable[[], object]) -> int:
    """Count the kernels and copies that a call starts on the GPU."""
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        call()
        torch.cuda.synchronize()
    return sum(event.count for event in recorded.key_averages() if event.device_time_total)


def product_flops(call: Callable[[], object]) -> float:
    """Count the floating-point operations of torch's matrix products in a call on a CPU."""
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as recorded:
        call()
    return float(sum(event.flops for event in recorded.key_averages() if event.key == "aten::mm"))


def relative_frobenius(got: Tensor, want: Tensor) -> float:
    """Return ‖got - want‖ / ‖want‖."""
    want = want.double()
    return ((got.double() - want).norm() / want.norm().clamp(min=1e-30)).item()


def peak_tflops(device: str) -> float | None:
    """Return the dense bf16 TFLOP/s of a GPU's data sheet, the base of MFU; None for an unlisted GPU."""
    sheet = {"A100": 312.0, "H100 PCIe": 756.0, "H100": 989.0, "H200": 989.0}
    return next((peak for name, peak in sheet.items() if name in device), None)


def gpu_ceilings() -> dict[str, float]:
    """Measure this GPU: bf16 and fp32 products (TFLOP/s) and a copy of 2 GB (TB/s)."""
    ceilings = {}
    for name, dtype, size in (("gemm_bf16", torch.bfloat16, 8192), ("gemm_fp32", torch.float32, 4096)):
        x, y = (torch.randn(size, size, device="cuda").to(dtype) for _ in "xy")
        times = measure_times(lambda _, x=x, y=y: x @ y, cuda=True, seconds=1)
        ceilings[name] = 2 * size**3 / times.ms_p50 / 1e9
    x = torch.randn(1 << 28, device="cuda")
    y = torch.empty_like(x)
    times = measure_times(lambda _: y.copy_(x), cuda=True, seconds=1)
    ceilings["copy"] = 2 * x.numel() * 4 / times.ms_p50 / 1e9
    return ceilings


def machine(device: str) -> dict[str, Any]:
    """Return the conditions of a measurement: device, driver, clocks, versions, commit, time."""
    row: dict[str, Any] = {"device": device, "torch": torch.__version__, "cuda": torch.version.cuda}
    row["time"] = datetime.now(UTC).isoformat(timespec="seconds")
    if device != "cpu":
        import triton

        row |= {"device": torch.cuda.get_device_name(), "triton": triton.__version__} | _driver()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    state = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=ROOT, capture_output=True, text=True)
    return row | {"commit": commit.stdout.strip(), "dirty": bool(state.stdout.strip())}


def _driver() -> dict[str, str]:
    """Return driver and clock limits from nvidia-smi, or a note that it does not answer."""
    asked = ("driver_version", "clocks.max.sm", "clocks.sm", "power.limit")
    words = ["nvidia-smi", f"--query-gpu={','.join(asked)}", "--format=csv,noheader", "--id=0"]
    try:
        output = subprocess.run(words, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return {"driver": "unknown", "clocks_note": "nvidia-smi does not answer"}
    driver, *rest = (word.strip() for word in output.splitlines()[0].split(","))
    return {"driver": driver, "clocks_note": "max {}, now {}, power limit {}".format(*rest)}


def results_file(where: dict[str, Any], subject: str) -> Path:
    """Return benchmarks/results/<device>/<date>-<commit>-<subject>.jsonl."""
    folder = RESULTS / str(where["device"]).lower().replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{datetime.now(UTC):%Y%m%d}-{where['commit']}-{subject}.jsonl"


def write_row(path: Path, row: dict[str, Any], times: Times | None = None) -> None:
    """Append one line; other processes may append to the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(row | (asdict(times) if times else {}))
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, f"{line}\n".encode())  # one write, so that lines of two processes do not mix
    finally:
        os.close(handle)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a results file; none if it does not exist.

    Raises:
        ValueError: a line is no JSON object; the message names it.
    """
    rows = []
    for number, line in enumerate(path.read_text().splitlines() if path.is_file() else [], 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: expected a JSON object, found {line[:40]!r}") from error
    return rows


def flops(call: Callable[[], object]) -> int:
    """Count the floating-point operations of the matrix products of a call, for example on meta tensors."""
    in_place = {torch.ops.aten.addmm_: _addmm_flops}  # missing in torch's counter
    with FlopCounterMode(display=False, custom_mapping=in_place) as counted:
        call()
    return counted.get_total_flops()


def _addmm_flops(c: torch.Size, a: torch.Size, b: torch.Size, **options: object) -> int:
    return 2 * a[0] * a[1] * b[1]


def bytes_kept(call: Callable[[], object], parameters: list[Tensor]) -> int:
    """Count the bytes of the distinct tensors that autograd keeps for backward, without parameters."""
    own = {p.untyped_storage()._cdata for p in parameters}
    kept: dict[int, Any] = {}  # references prevent that the address of a freed one is reused

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        result = call()
    del result
    return sum(storage.nbytes() for storage in kept.values())


class Launches(TorchDispatchMode):
    """Count the ops that would start a kernel on a GPU: all except views and allocations.

    Args:
        device: of the tensors; ops on other devices (masks, on the CPU) are not counted.
    """

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.count, self.device = 0, device
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        written = args[0] if out is None and name.startswith("_foreach_") else out  # a list changed in place
        tensors = [
            x for x in (written if isinstance(written, tuple | list) else [written]) if isinstance(x, Tensor)
        ]
        here = any(x.device.type == self.device and x.numel() for x in tensors)
        if here and not func.is_view and name not in STILL:
            launches = SEVERAL.get(name, 1) if func.namespace == "discovla" else 1
            self.count += launches
            self.ops[name] += launches
        return out


class Traffic(TorchDispatchMode):
    """Count the bytes that ops on a device read and write, each operand of each op once; views move none.

    Args:
        device: of the tensors; "meta" counts a step of any size without computing it.
    """

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.device = device
        self.bytes: Counter[str] = Counter()  # by the name of the op

    @property
    def total(self) -> int:
        """Bytes of all ops."""
        return sum(self.bytes.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and name not in STILL:
            operands = tree_leaves((args, kwargs, out))
            tensors = [x for x in operands if isinstance(x, Tensor) and x.device.type == self.device]
            self.bytes[name] += sum(x.numel() * x.element_size() for x in tensors)
        return out
