"""Package both source roots, and build the CUDA kernels of csrc/ if nvcc is found.  The rest: pyproject.toml.

DISCOVLA_CUDA: auto (build if nvcc is found; a failure is a warning), 1 (a failure is an error), 0 (no build).
"""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
BUILDER = ROOT / "discovla/ops/cuda/build.py"
CUDA_MODE = os.environ.get("DISCOVLA_CUDA", "auto")
packages = find_packages(str(ROOT), include=["discovla", "discovla.*"])
package_dir = {"discovla": "discovla"}

# kernels/ is a source root, not a package: PyPI has another project of that name.
if (ROOT / "kernels").is_dir():
    packages += find_packages(str(ROOT / "kernels"))
    package_dir["discovla_kernels"] = "kernels/discovla_kernels"


class Build(build_py):
    """Build modules, with the configs, and the CUDA library, in place for an editable install."""

    def run(self) -> None:
        super().run()
        folder = ROOT if self.editable_mode else Path(self.build_lib).resolve()
        if not self.editable_mode:
            shutil.copytree(ROOT / "configs", folder / "discovla/configs", dirs_exist_ok=True)
        out = folder / "discovla/ops/cuda/discovla_cuda.so"
        # without PYTHONPATH of pip's isolated environment this interpreter finds torch
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
        command = [sys.executable, "-P", str(BUILDER), "--out", str(out)]
        if subprocess.run(command, env=environment | {"DISCOVLA_CUDA": CUDA_MODE}).returncode:
            sys.exit("DISCOVLA_CUDA: the CUDA kernels were not built; the line above says why")


class Kernels(Distribution):
    """Mark a wheel with a compiled library as platform-specific."""

    def has_ext_modules(self) -> bool:
        return CUDA_MODE != "0" and runpy.run_path(str(BUILDER))["find_nvcc"]() is not None


setup(packages=packages, package_dir=package_dir, cmdclass={"build_py": Build}, distclass=Kernels)
