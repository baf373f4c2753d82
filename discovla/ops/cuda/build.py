"""Build the CUDA kernels of csrc/ into the package by calling nvcc; a torch without CUDA is enough.

    python -m discovla.ops.cuda.build               build, or print the reason for failure in one line

setup.py runs this file as a script, since pip builds in an isolated environment without torch.  It imports
the standard library only.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parents[3] / "csrc"
LIBRARY = Path(__file__).with_name("discovla_cuda.so")
# A100; H100 and H200; PTX for later GPUs
ARCHITECTURES = (
    "-gencode=arch=compute_80,code=[sm_80,compute_80]",
    "-gencode=arch=compute_90a,code=sm_90a",
)
CALL_SECONDS = 3600.0  # that nvcc may take for a file
OLDEST_TORCH = "0x020b000000000000"  # 2.11: the library runs with it and every later version


class BuildError(RuntimeError):
    """The kernels cannot be built; the message is one line."""


def find_nvcc() -> str | None:
    """Return the path of nvcc from CUDA_HOME, PATH, or CUDA's usual folder; None if there is none."""
    folders = [f"{os.environ['CUDA_HOME']}/bin"] if "CUDA_HOME" in os.environ else []
    folders += [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    return shutil.which("nvcc", path=os.pathsep.join(folders))


def build(out: Path = LIBRARY) -> bool:
    """Compile every csrc/*.cu in parallel and link them; return False if `out` is newer than all of csrc/.

    Raises:
        BuildError: nvcc, torch or csrc/ is missing, or nvcc fails.
    """
    sources = sorted(SOURCES.glob("*.cu"))
    if not sources:
        raise BuildError(f"{SOURCES}: no CUDA sources; they come with a checkout, not with a wheel")
    if out.is_file() and out.stat().st_mtime > max(path.stat().st_mtime for path in SOURCES.iterdir()):
        return False
    nvcc = find_nvcc()
    if nvcc is None:
        raise BuildError("nvcc is not on PATH, nor in CUDA_HOME: install the CUDA toolkit, 12.8 or later")
    torch = importlib.util.find_spec("torch")
    if torch is None or not torch.submodule_search_locations:
        raise BuildError("torch, whose headers the kernels need, is not installed for " + sys.executable)
    _compile(nvcc, Path(torch.submodule_search_locations[0]), sources, out)
    return True


def _compile(nvcc: str, torch: Path, sources: list[Path], out: Path) -> None:
    # -O1 applies to launchers; device code is always fully optimised
    options = ["-std=c++17", "-O1", *ARCHITECTURES, "-Xcompiler=-fPIC", "-DUSE_CUDA"]
    options += [f"-DTORCH_TARGET_VERSION={OLDEST_TORCH}", f"-I{torch / 'include'}"]
    # with --no-as-needed libtorch brings in its CUDA library, if any, which has the current stream
    link = ["-shared", f"-L{torch / 'lib'}", "-Xlinker=--no-as-needed", "-ltorch", "-ltorch_cpu"]
    with tempfile.TemporaryDirectory() as folder:
        objects = [f"{folder}/{path.stem}.o" for path in sources]
        calls = [
            [nvcc, *options, "-c", str(source), "-o", target]
            for source, target in zip(sources, objects, strict=True)
        ]
        _run_all(calls)
        partial = out.with_name(f"{out.name}.{os.getpid()}")  # renamed once complete
        _run_all([[nvcc, *link, *objects, "-o", str(partial)]])
        partial.replace(out)


def _run_all(calls: list[list[str]]) -> None:
    """Run commands in parallel.

    Raises:
        BuildError: one failed, with its first line of error, or took longer than `CALL_SECONDS`.
    """
    running = [
        subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for call in calls
    ]
    try:
        ended = [(process.communicate(timeout=CALL_SECONDS)[0], process.returncode) for process in running]
    except subprocess.TimeoutExpired:
        raise BuildError(f"nvcc took longer than {CALL_SECONDS:g} s") from None
    finally:
        for process in running:
            process.kill()  # nothing for one that has ended
    for output, status in ended:
        if status:
            lines = [line for line in output.splitlines() if "error" in line or "fatal" in line]
            raise BuildError("nvcc failed: " + (lines or output.splitlines() or ["no output"])[0])


def main(words: list[str] | None = None) -> int:
    """Build as DISCOVLA_CUDA demands, by default `1`."""
    parser = argparse.ArgumentParser(description="Build the CUDA kernels of csrc/.")
    parser.add_argument("--out", type=Path, default=LIBRARY, help="default: in the package")
    out = parser.parse_args(words).out
    mode = os.environ.get("DISCOVLA_CUDA", "1")
    if mode not in ("auto", "0", "1"):
        print(f"DISCOVLA_CUDA: expected auto, 0 or 1, found {mode!r}", file=sys.stderr)
        return 2
    if mode == "0" or (mode == "auto" and find_nvcc() is None):
        return 0
    try:
        print(f"{out}: {'built' if build(out) else 'up to date'}")
    except BuildError as error:
        kind = "warning: no CUDA kernels" if mode == "auto" else "error"
        print(f"discovla: {kind}: {error}", file=sys.stderr)
        return 0 if mode == "auto" else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
