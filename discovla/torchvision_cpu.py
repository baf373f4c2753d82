"""Lets torchvision, open_clip and timm import beside a CPU build of torch.

PyPI carries torchvision for Linux as a CUDA build only. Beside a CPU torch its compiled library does not
load, and the bare import then stops at `operator torchvision::nms does not exist`. Naming the two operators
it asks for is all it needs: this project uses transforms from it, never boxes.
"""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_OPS = ("nms", "qnms")
_libraries: list[torch.library.Library] = []  # a Library takes its operators with it when it is collected


def install() -> None:
    """Define `torchvision::nms` and `torchvision::qnms` where torchvision's own library cannot load.

    Call it before importing torchvision, open_clip or timm. It does nothing where torchvision is whole or
    absent, and on a second call. The operators get a name and no code: calling one stays an error.
    """
    if _libraries or _own_library_loads():
        return
    library = torch.library.Library("torchvision", "DEF")
    for name in _OPS:
        library.define(name + _SCHEMA)
    _libraries.append(library)
    logger.info("torchvision's operators do not load beside torch %s: named them only", torch.__version__)


def _own_library_loads() -> bool:
    """Whether torchvision needs no help: absent, imported already, or with a compiled library that loads."""
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
