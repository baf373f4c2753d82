import subprocess
import sys

import torch

from discovla import torchvision_cpu


def test_torchvision_open_clip_and_timm_import_after_install():
    code = (
        "from discovla import torchvision_cpu as shim; shim.install(); shim.install()\n"
        "import torchvision, open_clip, timm; print('imported')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "imported\n", done.stderr


def test_install_leaves_defined_operators_alone():
    torchvision_cpu.install()
    libraries = list(torchvision_cpu._libraries)
    torchvision_cpu.install()
    assert torchvision_cpu._libraries == libraries
    assert hasattr(torch.ops.torchvision, "nms")


def test_empty_tensors_are_poisoned_in_tests():
    assert torch.empty(3).isnan().all()
    assert torch.empty_like(torch.ones(2)).isnan().all()
    assert torch.empty(2, dtype=torch.int64).shape == (2,)
