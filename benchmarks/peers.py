"""Kernels of other libraries for the same computations as our ops, timed beside ours if they are installed.

They are optional: `pip install --no-deps inf_cl liger-kernel late-interaction-kernels memeff siglip-kernel`;
open_clip_torch is a dependency of training already.  What can serve our ops in a run (torch.compile, torch's
attention, flash-attn, QuACK) is among the candidates of `discovla/ops/dispatch.py`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from discovla import torchvision_cpu
from discovla.ops.alignment_losses import kl_weight
from discovla.ops.cases import SCALE
from discovla.ops.frame_similarity import frame_similarity_reference
from discovla.ops.info_nce import contrastive_loss, cosine_similarity
from discovla.ops.tower_cases import gain_and_shift


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A library's function that computes the result of a case from its leaves."""

    name: str
    op: str
    package: str
    """On PyPI."""
    module: str
    call: Callable[[list[Tensor]], Any]
    stores: bool = True
    """True if it stores whole matrices."""
    differs: str = ""
    """Difference from our op."""

    def missing(self) -> str:
        """Return how it is installed; empty if it is."""
        if importlib.util.find_spec(self.module) is None:
            return f"not installed: pip install --no-deps {self.package}"
        return ""

    def absent(self) -> str:
        """Return why it cannot run; empty if it can."""
        if reason := self.missing():
            return reason
        torchvision_cpu.install()  # open_clip needs it to import beside a CPU torch
        try:
            importlib.import_module(self.module)
        except (ImportError, RuntimeError, OSError) as error:
            return f"does not import: {(str(error).splitlines() or [type(error).__name__])[0]}"
        return ""


def _open_clip(leaves: list[Tensor]) -> Tensor:
    text, video, scale = leaves
    return _module("open_clip").ClipLoss()(F.normalize(video, dim=-1), F.normalize(text, dim=-1), scale)


def _inf_cl(leaves: list[Tensor]) -> Tensor:
    """Its loss has one direction and a value for each row."""
    text, video = (F.normalize(x, dim=-1) for x in leaves[:2])
    width = 256 if text.shape[1] % 256 == 0 else text.shape[1]  # it splits rows into heads of that width
    both = (
        _module("inf_cl").cal_flash_loss(x, y, scale=leaves[2], head_dim=width).mean()
        for x, y in ((text, video), (video, text))
    )
    return (next(both) + next(both)) / 2


def _liger(leaves: list[Tensor]) -> Tensor:
    """The reference, with both divergences by Liger's kernel."""
    text, video, text_frames, video_frames, scale = leaves
    wide = torch.promote_types(text.dtype, torch.float32)
    frames = frame_similarity_reference(text_frames.to(wide), video_frames.to(wide), scale, None, None)
    student, teacher = scale * cosine_similarity(text, video), scale * frames
    divergence = _module("liger_kernel.transformers.kl_div").LigerKLDIVLoss(reduction="sum", log_target=True)
    fixed = teacher.detach()
    distill = sum(
        divergence(s.log_softmax(-1), t.log_softmax(-1)) for s, t in ((student, fixed), (student.T, fixed.T))
    )
    losses = contrastive_loss(student) + 0.3 * contrastive_loss(teacher)
    return losses + kl_weight("official", len(text)) * distill / 2


def _late_interaction(leaves: list[Tensor]) -> Tensor:
    return _module("late_interaction_kernels").maxsim(leaves[0], leaves[1], normalize=True)


def _siglip(leaves: list[Tensor]) -> Tensor:
    text, video, scale = leaves
    bias = torch.full_like(scale, -10.0)
    rows = F.normalize(video, dim=-1), F.normalize(text, dim=-1)
    return _module("siglip_kernel").fused_siglip_loss(*rows, scale.log(), bias)


def _memeff(leaves: list[Tensor]) -> Tensor:
    return _module("memeff").MemoryEfficientCLIPLoss(temperature=1 / SCALE)(leaves[1], leaves[0])


def _liger_norm(leaves: list[Tensor]) -> tuple[Tensor, Tensor]:
    total = leaves[0] + leaves[1]
    gain, shift = (x.to(total.dtype) for x in gain_and_shift(total.shape[-1], total.device))
    return total, _module("liger_kernel.transformers.functional").liger_layer_norm(total, gain, shift, 1e-5)


def _module(name: str):
    return importlib.import_module(name)


PEERS = (
    Peer(name="open_clip", op="info_nce", package="open_clip_torch", module="open_clip", call=_open_clip),
    Peer(name="inf_cl", op="info_nce", package="inf_cl", module="inf_cl", call=_inf_cl, stores=False),
    Peer(
        name="liger",
        op="alignment_losses",
        package="liger-kernel",
        module="liger_kernel",
        call=_liger,
        differs="its divergence has no gradient by the teacher",
    ),
    Peer(
        name="siglip_kernel",
        op="sigmoid_loss",
        package="siglip-kernel",
        module="siglip_kernel",
        call=_siglip,
        stores=False,
    ),
    Peer(
        name="memeff",
        op="info_nce",
        package="memeff",
        module="memeff",
        call=_memeff,
        stores=False,
        differs="its scale is a number, without a gradient",
    ),
    Peer(
        name="liger",
        op="layer_norm",
        package="liger-kernel",
        module="liger_kernel",
        call=_liger_norm,
        differs="the sum before the norm is torch's",
    ),
    Peer(
        name="late_interaction_kernels",
        op="late_interaction",
        package="late-interaction-kernels",
        module="late_interaction_kernels",
        call=_late_interaction,
        stores=False,
    ),
)
