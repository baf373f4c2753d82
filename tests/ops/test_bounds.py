"""Every kernel once under ttsem, which finds accesses out of bounds and races between programs."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("ttsem") is None,
    reason="ttsem is not installed: pip install --no-deps --ignore-requires-python ttsem",
)
def test_no_kernel_leaves_its_tensors_or_writes_an_element_in_two_programs():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    words = [sys.executable, "-m", "ttsem.sanitize", str(Path(__file__).with_name("kernels_once.py"))]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=900)
    assert "0 faults; kernels not launched: none" in done.stdout, done.stdout[-8000:] + done.stderr[-2000:]
