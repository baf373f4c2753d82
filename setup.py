"""The two source roots, and the CUDA kernels of csrc/ where there is an nvcc. The rest is in pyproject.toml.

DISCOVLA_CUDA: auto (build them where nvcc is found; a failure is a warning), 1 (a failure is an error), 0.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
BUILDER = ROOT / "discovla/ops/cuda/build.py"
WISH = os.environ.get("DISCOVLA_CUDA", "auto")
packages = find_packages(str(ROOT), include=["discovla", "discovla.*"])
package_dir = {"discovla": "discovla"}

# kernels/ is a source root and never a package itself: PyPI has another project of that name.
if (ROOT / "kernels").is_dir():
    packages += find_packages(str(ROOT / "kernels"))
    package_dir["discovla_kernels"] = "kernels/discovla_kernels"


class Build(build_py):
    """Modules, and beside them the CUDA library: in place for an editable install."""

    def run(self) -> None:
        super().run()
        folder = ROOT if self.editable_mode else Path(self.build_lib).resolve()
        out = folder / "discovla/ops/cuda/discovla_cuda.so"
        # pip's isolated environment shows no torch: this interpreter without what pip put in its way does
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
        command = [sys.executable, "-P", str(BUILDER), "--out", str(out)]
        if subprocess.run(command, env=environment | {"DISCOVLA_CUDA": WISH}).returncode:
            sys.exit("DISCOVLA_CUDA: the CUDA kernels were not built; the line above says why")


class Kernels(Distribution):
    """A wheel with a compiled library is no wheel for every machine."""

    def has_ext_modules(self) -> bool:
        return WISH != "0" and runpy.run_path(str(BUILDER))["find_nvcc"]() is not None


setup(packages=packages, package_dir=package_dir, cmdclass={"build_py": Build}, distclass=Kernels)
