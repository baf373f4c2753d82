"""Makes torchvision, open_clip and timm importable with a CPU build of torch.

PyPI has torchvision for Linux as a CUDA build only. Its compiled library does not load with a CPU torch, and
the import fails with `operator torchvision::nms does not exist`. Declaring the two missing operators is
enough, because this project uses only transforms.
"""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_OPS = ("nms", "qnms")
_libraries: list[torch.library.Library] = []  # kept, because a collected Library removes its operators


def install() -> None:
    """Declare `torchvision::nms` and `torchvision::qnms` if torchvision's own library cannot load.

    Call it before importing torchvision, open_clip or timm. It does nothing if torchvision works or is not
    installed, or on a second call. The operators have no implementation: calling one stays an error.
    """
    if _libraries or _own_library_loads():
        return
    library = torch.library.Library("torchvision", "DEF")
    for name in _OPS:
        library.define(name + _SCHEMA)
    _libraries.append(library)
    logger.debug(
        "torchvision's operators do not load with torch %s: declared without code", torch.__version__
    )


def _own_library_loads() -> bool:
    """Return True if torchvision is absent, already imported, or has a compiled library that loads."""
    if hasattr(torch.ops.torchvision, "nms"):
        return True
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return True
    compiled = sorted(Path(spec.origin).parent.glob("_C*.so"))
    try:
        for path in compiled:
            torch.ops.load_library(path)
    except OSError as error:
        logger.debug("%s", error)
        return False
    return bool(compiled) and hasattr(torch.ops.torchvision, "nms")
