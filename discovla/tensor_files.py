"""Write safetensors files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors to a safetensors file with the permissions of any new file.

    safetensors itself writes through a temporary file that only its owner may read.
    """
    path.touch()
    mode = path.stat().st_mode
    named = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    save_file(named, path, metadata=None if metadata is None else dict(metadata))
    path.chmod(mode & 0o777)
