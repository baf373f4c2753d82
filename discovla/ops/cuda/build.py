"""Builds the CUDA kernels of csrc/ into the package, by calling nvcc: no torch with CUDA is needed for it.

    python -m discovla.ops.cuda.build               build, or say in one line why not

setup.py runs this file as a script, since the isolated environment pip builds in has no torch. It imports the
standard library only.
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
# For A100, for H100 and H200, and as PTX for what comes after them.
ARCHITECTURES = (
    "-gencode=arch=compute_80,code=[sm_80,compute_80]",
    "-gencode=arch=compute_90a,code=sm_90a",
)
OLDEST_TORCH = "0x020b000000000000"  # 2.11: the library runs with this one and every later one


class BuildError(RuntimeError):
    """The kernels cannot be built; one line."""


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, of PATH, or where CUDA's packages put it."""
    folders = [f"{os.environ['CUDA_HOME']}/bin"] if "CUDA_HOME" in os.environ else []
    folders += [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    return shutil.which("nvcc", path=os.pathsep.join(folders))


def build(out: Path = LIBRARY) -> bool:
    """Compile every csrc/*.cu at once and link them; False where `out` is newer than all of csrc/.

    Raises:
        BuildError: nvcc, torch or csrc/ is not there, or nvcc fails.
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
    # -O1 is for launchers; device code is optimised as far as can be, whatever it says
    options = ["-std=c++17", "-O1", *ARCHITECTURES, "-Xcompiler=-fPIC", "-DUSE_CUDA"]
    options += [f"-DTORCH_TARGET_VERSION={OLDEST_TORCH}", f"-I{torch / 'include'}"]
    # libtorch needs the library with CUDA where there is one, and so finds the current stream
    link = ["-shared", f"-L{torch / 'lib'}", "-Xlinker=--no-as-needed", "-ltorch", "-ltorch_cpu"]
    with tempfile.TemporaryDirectory() as folder:
        objects = [f"{folder}/{path.stem}.o" for path in sources]
        calls = [
            [nvcc, *options, "-c", str(source), "-o", target]
            for source, target in zip(sources, objects, strict=True)
        ]
        _run_all(calls)
        partial = out.with_name(f"{out.name}.{os.getpid()}")  # never half a library under its name
        _run_all([[nvcc, *link, *objects, "-o", str(partial)]])
        partial.replace(out)


def _run_all(calls: list[list[str]]) -> None:
    """Run commands side by side.

    Raises:
        BuildError: one failed; its first line of error.
    """
    running = [
        subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for call in calls
    ]
    ended = [(process.communicate()[0], process.returncode) for process in running]
    for said, status in ended:
        if status:
            lines = [line for line in said.splitlines() if "error" in line or "fatal" in line]
            raise BuildError("nvcc failed: " + (lines or said.splitlines() or ["no output"])[0])


def main(words: list[str] | None = None) -> int:
    """Build as DISCOVLA_CUDA says; without it as `1`."""
    parser = argparse.ArgumentParser(description="Builds the CUDA kernels of csrc/.")
    parser.add_argument("--out", type=Path, default=LIBRARY, help="where to; into the package if not given")
    given = parser.parse_args(words)
    wish = os.environ.get("DISCOVLA_CUDA", "1")
    if wish not in ("auto", "0", "1"):
        print(f"DISCOVLA_CUDA: expected auto, 0 or 1, found {wish!r}", file=sys.stderr)
        return 2
    if wish == "0" or (wish == "auto" and find_nvcc() is None):
        return 0
    try:
        print(f"{given.out}: {'built' if build(given.out) else 'up to date'}")
    except BuildError as error:
        kind = "warning: no CUDA kernels" if wish == "auto" else "error"
        print(f"discovla: {kind}: {error}", file=sys.stderr)
        return 0 if wish == "auto" else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
