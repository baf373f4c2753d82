"""The two source roots: `discovla` here, `discovla_kernels` under kernels/. The rest is in pyproject.toml."""

from __future__ import annotations

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
packages = find_packages(str(ROOT), include=["discovla", "discovla.*"])
package_dir = {"discovla": "discovla"}

# kernels/ is a source root and never a package itself: PyPI has another project of that name.
if (ROOT / "kernels").is_dir():
    packages += find_packages(str(ROOT / "kernels"))
    package_dir["discovla_kernels"] = "kernels/discovla_kernels"

setup(packages=packages, package_dir=package_dir)
