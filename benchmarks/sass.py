"""Read the machine code of every Triton kernel for GPUs that are not here.

    python benchmarks/sass.py                              all kernels for A100, Hopper and Blackwell
    python benchmarks/sass.py --arch 90 --only lora_norm   some of them
    python benchmarks/sass.py --arch 90 --check            exit 1 if a kernel is worse than its committed row
    python benchmarks/sass.py --print                      show the committed rows
    python benchmarks/sass.py --csrc                       the CUDA C++ kernels, by nvcc, for A100 and Hopper

Launchers run on tensors without storage (`benchmarks/sass_cases.py`), and each launch is compiled instead of
started: tiles, warps, strides and alignment are those that a GPU would get.  Compiler and disassembler are
those of the triton package, so the version of triton fixes all figures.

Rows of benchmarks/results/sass/kernels.jsonl, one a kernel, size and architecture:
  registers of a thread, bytes of stack, instructions that spill registers or load them again (local memory),
  bytes of shared memory, programs that fit on a multiprocessor at once, instructions of tensor cores;
  gb: every operand read or written once; gflop: needed matrix products; floor: the longer of both at the
  rates of `GPUS`, microseconds.
Rows of benchmarks/results/sass/csrc.jsonl, one a kernel of csrc/, dtype and architecture; those of kernels
that were deleted stay, with the commit that had them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # read when kernels are defined
sys.path.insert(0, str(Path(__file__).parents[1]))  # a script starts with its own folder there
sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.errors import TritonError
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks.measure import RESULTS, ROOT, machine, read_rows
from benchmarks.sass_cases import SassCase, sass_cases
from discovla.ops.cuda.build import find_nvcc

Row = dict[str, Any]
TABLE = RESULTS / "sass/kernels.jsonl"
CSRC_TABLE = RESULTS / "sass/csrc.jsonl"
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
TENSOR_CORES = re.compile(r"^(HMMA|HGMMA|UTC\w*MMA|OMMA|QMMA|QGMMA|IMMA|DMMA)$")
SPILLS = ("STL", "LDL")
REGISTERS = 65536  # of a multiprocessor, given to warps in units of 256


@dataclass(frozen=True, kw_only=True)
class Multiprocessor:
    """Limits of a multiprocessor: threads, programs, and bytes of shared memory, of which 1 KB a program is
    the system's (CUDA C++ Programming Guide, technical specifications by compute capability)."""

    threads: int
    programs: int
    shared: int


@dataclass(frozen=True, kw_only=True)
class GPU:
    """Rates of a data sheet: dense bfloat16 products in TFLOP/s, memory in TB/s."""

    arch: int
    tflops: float
    tbps: float


MULTIPROCESSORS = {
    80: Multiprocessor(threads=2048, programs=32, shared=164 << 10),
    90: Multiprocessor(threads=2048, programs=32, shared=228 << 10),
    100: Multiprocessor(threads=2048, programs=32, shared=228 << 10),
    120: Multiprocessor(threads=1536, programs=24, shared=100 << 10),
}
GPUS = {  # SXM modules
    "A100": GPU(arch=80, tflops=312, tbps=2.04),
    "H100": GPU(arch=90, tflops=989, tbps=3.35),
    "H200": GPU(arch=90, tflops=989, tbps=4.8),
    "B200": GPU(arch=100, tflops=2250, tbps=8.0),
}


class _Target:
    """Stand in for the driver of a GPU: Triton asks it which code to make."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiled_launches(arch: int, only: Sequence[str]) -> Iterator[list[tuple[str, Any, int]]]:
    """Collect each kernel that is launched meanwhile: its name, its code, and the bytes of its operands.

    only: names of the kernels to compile; empty for all.
    """
    launches: list[tuple[str, Any, int]] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *operands: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        if only and self.__name__ not in only:
            return None
        code = run(self, *operands, grid=grid, warmup=True, **options)
        launches.append((self.__name__, code, operand_bytes(operands)))
        return code

    driver.set_active(_Target(arch))  # pyright: ignore[reportArgumentType]
    JITFunction.run = compile_only
    try:
        yield launches
    finally:
        JITFunction.run = run


def operand_bytes(operands: Sequence[Any]) -> int:
    """Return the bytes of all tensors, each storage once; a tensor that stands in for none is one already."""
    storages = {x.untyped_storage()._cdata: x for x in operands if isinstance(x, torch.Tensor)}
    return sum(x.untyped_storage().nbytes() for x in storages.values())


def audit(case: SassCase, arch: int) -> list[Row]:
    """Compile the launches of a case and return a row for each kernel."""
    with compiled_launches(arch, case.only) as launches:
        case.launch()
    rows: dict[str, Row] = {}
    for name, code, count in launches:
        gflop = case.products.get(name, 0.0) / 1e9
        rows[name] = {
            "case": case.name,
            "kernel": name,
            "arch": arch,
            "warps": code.metadata.num_warps,
            **machine_code(code.asm["cubin"]),
            "shared": code.metadata.shared,
            "gb": round(count / 1e9, 6),
            "gflop": round(gflop, 3),
        }
    for row in rows.values():
        row["programs"] = resident_programs(row)
        row["floor"] = {
            name: floor(row, gpu, case.products_cost) for name, gpu in GPUS.items() if gpu.arch == arch
        }
        row["triton"] = triton.__version__
    return list(rows.values())


def machine_code(cubin: bytes) -> Row:
    """Return registers, stack, spills and tensor-core instructions of a kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        opcodes = [x.split(".")[0] for x in INSTRUCTION.findall(_tool("nvdisasm", "-c", file.name))]
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", usage)[-1]
    return {
        "registers": int(registers),
        "stack": int(stack),
        "spills": sum(x in SPILLS for x in opcodes),
        "tensor_cores": sorted({x for x in opcodes if TENSOR_CORES.match(x)}),
    }


def audit_csrc(source: Path, arch: str) -> list[Row]:
    """Compile a file of csrc/ by nvcc and return a row for each kernel of it.

    arch: "80", or "90a" for Hopper.  Dynamic shared memory and threads are the launcher's, not in the code.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        sys.exit("nvcc is not on PATH, nor in CUDA_HOME: install the CUDA toolkit, 12.8 or later")
    with tempfile.TemporaryDirectory() as folder:
        cubin = f"{folder}/{source.stem}.cubin"
        subprocess.run([nvcc, "-cubin", "-std=c++17", f"-arch=sm_{arch}", "-o", cubin, source], check=True)
        usage = re.findall(
            r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", _tool("cuobjdump", "-res-usage", cubin)
        )
        _, *sections = re.split(
            r"^\s*\.section\s+\.text\.(\S+?),", _tool("nvdisasm", "-c", cubin), flags=re.M
        )
    code = dict(zip(sections[::2], sections[1::2], strict=True))
    rows = []
    for symbol, registers, stack in usage:
        opcodes = INSTRUCTION.findall(code[symbol])
        name = re.search(r"discovla\d+(\w+?)I(13__nv_bfloat16|f)(?:NS_4TileIS?\w*?Li(\d+)ELi(\d+))?", symbol)
        assert name is not None, symbol
        tile = f" {name[3]}x{name[4]}" if name[3] else ""
        rows.append({
            "source": source.name,
            "kernel": f"{name[1]}{tile} {'fp32' if name[2] == 'f' else 'bf16'}",
            "arch": arch,
            "registers": int(registers),
            "stack": int(stack),
            "spills": sum(x.split(".")[0] in SPILLS for x in opcodes),
            "tensor_cores": sorted({x for x in opcodes if TENSOR_CORES.match(x.split(".")[0])}),
            "generic_loads": sum(x.startswith("LD.") for x in opcodes),
            "matrix_loads": sum(x.startswith("LDSM") for x in opcodes),
            "commit": machine("cpu")["commit"],
        })  # fmt: skip
    return sorted(rows, key=lambda row: row["kernel"])


def write_csrc() -> None:
    """Audit csrc/ and write its rows, beside those of files that are gone."""
    sources = sorted((ROOT / "csrc").glob("*.cu"))
    rows = [row for source in sources for arch in ("80", "90a") for row in audit_csrc(source, arch)]
    names = {source.name for source in sources}
    gone = [x for x in (read_rows(CSRC_TABLE) if CSRC_TABLE.exists() else []) if x["source"] not in names]
    CSRC_TABLE.write_text("".join(json.dumps(row) + "\n" for row in [*gone, *rows]))


def _tool(name: str, *words: str) -> str:
    return subprocess.run([TOOLS / name, *words], capture_output=True, text=True, check=True).stdout


def resident_programs(row: Row) -> int:
    """Return how many programs of a kernel a multiprocessor holds at once."""
    limits, warps = MULTIPROCESSORS[row["arch"]], row["warps"]
    by_registers = REGISTERS // (256 * -(-row["registers"] * 32 // 256)) // warps
    by_shared = limits.shared // (row["shared"] + 1024)
    return min(limits.programs, limits.threads // (32 * warps), by_registers, by_shared)


def floor(row: Row, gpu: GPU, cost: float) -> Row:
    """Return what bounds a kernel, and the time that its bytes or products take at least.

    cost: time of a product beside one in bfloat16.
    """
    times = {"bytes": 1e3 * row["gb"] / gpu.tbps, "products": 1e3 * cost * row["gflop"] / gpu.tflops}
    bound = max(times, key=lambda name: times[name])
    return {"bound": bound, "us": round(times[bound], 2)}


def worse(row: Row, committed: Row | None) -> list[str]:
    """Name what a kernel does worse than its committed row, one line each."""
    name = f"{row['case']} {row['kernel']} sm_{row['arch']}"
    if committed is None:
        return [f"{name}: no committed row"]
    lines = [
        f"{column} {committed[column]} -> {row[column]}"
        for column in ("stack", "spills")
        if row[column] > committed[column]
    ]
    if row["programs"] < committed["programs"]:
        lines.append(f"programs of a multiprocessor {committed['programs']} -> {row['programs']}")
    if row["tensor_cores"] != committed["tensor_cores"]:
        lines.append(f"tensor cores {committed['tensor_cores']} -> {row['tensor_cores']}")
    return [f"{name}: {line}" for line in lines]


def key(row: Row) -> tuple[str, str, int]:
    return row["case"], row["kernel"], row["arch"]


def line(row: Row) -> str:
    """Return a row as text."""
    floors = ", ".join(f"{name} {x['us']} us {x['bound']}" for name, x in row["floor"].items())
    return (
        f"{row['case']:<52} {row['kernel']:<34} sm_{row['arch']:<4} {row['warps']:>2} warps "
        f"{row['registers']:>3} regs {row['stack']:>5} stack {row['spills']:>4} spills "
        f"{row['shared']:>6} shared {row['programs']:>2} programs {'+'.join(row['tensor_cores']):<6} {floors}"
    )


def main(words: Sequence[str] | None = None) -> int:
    """Audit kernels and write or check their rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", type=int, nargs="*", default=list(MULTIPROCESSORS))
    parser.add_argument("--only", nargs="*", default=[""], help="parts of the names of cases")
    parser.add_argument("--check", action="store_true", help="compare with the committed rows")
    parser.add_argument("--csrc", action="store_true", help="audit the kernels of csrc/ instead")
    parser.add_argument("--print", action="store_true", help="show the committed rows, compile nothing")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args(words)
    if options.csrc:
        write_csrc()
        return 0
    committed = read_rows(TABLE) if TABLE.exists() else []
    if options.print:
        print(*(line(row) for row in committed), sep="\n")
        return 0
    names = [case.name for case in sass_cases() if any(word in case.name for word in options.only)]
    if not names:
        parser.error(f"--only: expected a part of the name of a case, found {options.only}")
    known = {key(row): row for row in committed}
    rows: list[Row] = []
    faults: list[str] = []
    work = [(name, arch) for name in names for arch in options.arch]
    with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
        for audited, fault in pool.map(_audit_named, *zip(*work, strict=True)):
            rows += audited
            faults += [fault] if fault else []
            print(*(line(row) for row in audited), sep="\n", flush=True)
            if not options.check:
                write(rows, committed)
    if options.check:
        faults += [x for row in rows for x in worse(row, known.get(key(row)))]
    print(*faults, sep="\n", file=sys.stderr)
    return 1 if faults else 0


def write(rows: Sequence[Row], committed: Sequence[Row]) -> None:
    """Write the table: these rows in place of the committed ones of the same cases, without deleted cases."""
    order = [case.name for case in sass_cases()]
    audited = {(row["case"], row["arch"]) for row in rows}
    kept = [x for x in committed if x["case"] in order and (x["case"], x["arch"]) not in audited]
    ordered = sorted([*kept, *rows], key=lambda row: (order.index(row["case"]), row["kernel"], row["arch"]))
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text("".join(json.dumps(row) + "\n" for row in ordered))


def _audit_named(name: str, arch: int) -> tuple[list[Row], str]:
    """Audit a case; a kernel that does not compile is returned as one line of text."""
    try:
        return audit(next(case for case in sass_cases() if case.name == name), arch), ""
    except (TritonError, RuntimeError) as error:  # RuntimeError: of a pass of the compiler
        return [], f"{name} sm_{arch}: does not compile: {str(error).splitlines()[-1]}"


if __name__ == "__main__":
    sys.exit(main())
