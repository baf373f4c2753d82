"""Ops at one size: noise, the call, the error that an implementation may have, and the needed work.

`discovla.tune` measures cases on a user's GPU, `benchmarks/gpu.py` all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from discovla.ops.alignment_losses import AlignmentInputs, alignment_losses
from discovla.ops.dispatch import Impl
from discovla.ops.frame_similarity import frame_similarity
from discovla.ops.info_nce import info_nce
from discovla.ops.late_interaction import late_interaction
from discovla.ops.rank_of_positive import rank_of_positive
from discovla.ops.sigmoid_loss import sigmoid_loss
from discovla.ops.soft_vlad import soft_vlad
from discovla.ops.token_similarity import TokenInputs, token_similarity, token_training_similarity
from discovla.ops.top_k import top_k

Call = Callable[[list[Tensor], Impl, bool], Any]  # leaves, impl, masked -> a tensor or several
# Largest ‖error‖ / ‖truth‖ of values and of gradients. A float32 product is three TF32 products.
# Half-precision inputs are exact in float32, and a gradient is rounded to its input's dtype.
BUDGET = {torch.float32: (2e-5, 2e-4), torch.float16: (2e-5, 2e-3), torch.bfloat16: (2e-5, 8e-3)}
TF32 = (1e-3, 4e-3)  # of float32 inputs where products may be in TF32
SCALE = 20.0  # logit scale of cases
STRIP = 32  # texts whose maxima are compared at once
MARGIN = 1e-4  # maxima closer to each other than this may be exchanged by rounding


@dataclass(frozen=True, kw_only=True)
class Case:
    """One op at one size."""

    op: str
    call: Call
    n: int
    """Pairs, or queries."""
    m: int
    """Pairs, or items."""
    frames: tuple[int, int] = (1, 1)
    """Parts of a text and of a video."""
    dim: int = 512
    """Embedding dimension."""
    dtype: torch.dtype = torch.bfloat16
    backward: bool = True
    target_ms: float | None = None
    """To reach on an H200; with backward if `backward` is True."""
    target_gb: float | None = None
    shapes: tuple[tuple[int, ...], ...] = field(default=())
    masked: bool = False

    @property
    def name(self) -> str:
        step = "step" if self.backward else "fwd"
        step += " masked" if self.masked else ""
        frames = "" if self.frames == (1, 1) else f" F={self.frames[0]}x{self.frames[1]}"
        return f"{self.op} {step} {self.n}x{self.m}{frames} D={self.dim} {str(self.dtype)[6:]}"

    @property
    def flops(self) -> float:
        """Needed operations: one pass forward; with backward that again, and one for each gradient."""
        one = 2.0 * self.n * self.m * self.frames[0] * self.frames[1] * self.dim
        if self.op == "alignment_losses":
            one += 2.0 * self.n * self.m * self.dim
        return one * (4 if self.backward else 1)

    @property
    def scaled(self) -> bool:
        """True if the last leaf is logit_scale."""
        return self.op != "late_interaction"

    @property
    def limits(self) -> tuple[float, float]:
        """Largest relative errors of values and of gradients."""
        if self.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32:
            return TF32
        return BUDGET[self.dtype]

    @property
    def reference_bytes(self) -> float:
        """Least memory of the reference: five matrices of all products in float32."""
        return 20.0 * self.n * self.m * self.frames[0] * self.frames[1]

    def leaves(self, device: torch.device | str, seed: int = 0) -> list[Tensor]:
        """Return inputs of noise, then logit_scale if the op has one."""
        generator = torch.Generator(device).manual_seed(seed)
        noise = [torch.randn(s, generator=generator, device=device).to(self.dtype) for s in self.shapes]
        scale = torch.tensor(SCALE, device=device, dtype=torch.promote_types(self.dtype, torch.float32))
        return [x.requires_grad_(self.backward) for x in [*noise, *([scale] if self.scaled else [])]]

    def run(self, leaves: list[Tensor], impl: Impl) -> list[Tensor]:
        """Return the result, and with `backward` the gradients by all leaves."""
        with torch.set_grad_enabled(self.backward):
            out = self.call(leaves, impl, self.masked)
        if not self.backward:
            return [out]
        return [out.detach(), *torch.autograd.grad(out, leaves, self._direction(leaves, out))]

    def _direction(self, leaves: list[Tensor], out: Tensor) -> Tensor:
        """Return ones, and zeros for pairs with two maxima so close that rounding may exchange them.

        Rounding changes such a pair's value by as little, but moves its gradient from one row to another.
        """
        ones = torch.ones_like(out)
        if self.op not in ("frame_similarity", "late_interaction"):
            return ones
        text, video = (F.normalize(x.detach().double(), dim=-1) for x in leaves[:2])
        masks = [
            _mask(x) if self.masked else torch.ones_like(x[..., 0], dtype=torch.bool) for x in (text, video)
        ]
        for first in range(0, len(text), STRIP):
            rows = slice(first, first + STRIP)
            match = torch.einsum("tid,vjd->tvij", text[rows], video)
            real = masks[0][rows, None, :, None] & masks[1][None, :, None, :]
            match = match.masked_fill(~real, -2)
            for axis in (2, 3) if self.op == "frame_similarity" else (3,):
                if match.shape[axis] > 1:
                    best = match.topk(2, axis).values
                    gap = best.select(axis, 0) - best.select(axis, 1)
                    ones[rows][((gap < MARGIN) & (best.select(axis, 1) > -2)).any(-1)] = 0
        return ones

    def truth(self, leaves: list[Tensor]) -> list[Tensor]:
        """Return the reference in float64 on the same numbers."""
        wide = [x.detach().double().requires_grad_(self.backward) for x in leaves]
        return self.run(wide, "reference")

    def errors(self, impl: Any, leaves: list[Tensor], truth: list[Tensor]) -> dict[str, float]:
        """Return relative errors: of the value, of the worst gradient, and of the value's worst entry."""
        (got, *gradients), (value, *true_gradients) = self.run(leaves, impl), truth
        if self.scaled:  # the derivative by the scale is a sum of numbers that nearly cancel
            gradients, true_gradients = gradients[:-1], true_gradients[:-1]
        gradient_errors = [
            _relative(g, w)
            for g, w in zip(gradients, true_gradients, strict=True)
            if w.double().norm() > 1e-9
        ]
        worst = (got.double() - value).abs().max() / value.abs().max().clamp(min=1e-30)
        return {
            "err_fro": _relative(got, value) if value.double().norm() > 1e-9 else 0.0,
            "err_gradient": max(gradient_errors, default=0.0),
            "err_max": worst.item(),
        }

    def step(self, leaves: list[Tensor], impl: Any) -> list[Tensor]:
        """Compute the results and the gradients of their sum, for timing."""
        return gradients_of(self, leaves, lambda leaves: self.call(leaves, impl, self.masked))


def gradients_of(case: Case, leaves: list[Tensor], function: Callable[[list[Tensor]], Any]) -> list[Tensor]:
    """Return the results of a function, and with `case.backward` the gradients of their sum."""
    with torch.set_grad_enabled(case.backward):
        out = function(leaves)
    if not case.backward:
        return [out]
    results = [out] if isinstance(out, Tensor) else list(out)
    ones = [torch.ones_like(x) for x in results]
    gradients = torch.autograd.grad(results, leaves, ones, allow_unused=True)
    return [*(x.detach() for x in results), *(g for g in gradients if g is not None)]


def _relative(x: Tensor, truth: Tensor) -> float:
    """Return ‖x - truth‖ / ‖truth‖; infinite if x is not finite."""
    truth = truth.double()
    error = ((x.double() - truth).norm() / truth.norm().clamp(min=1e-30)).item()
    return error if error == error else float("inf")


def _mask(x: Tensor) -> Tensor:
    """Return a ragged mask of n k d, empty in the last row."""
    real = (
        torch.arange(x.shape[1], device=x.device)
        <= torch.arange(len(x), device=x.device)[:, None] % x.shape[1]
    )
    real[-1] = False
    return real


def _ignore(x: Tensor) -> Tensor:
    """Return the mask of pairs to ignore, with two or three captions a clip."""
    clip = torch.arange(len(x), device=x.device) % max(1, len(x) // 2)
    return (clip[:, None] == clip).fill_diagonal_(False)


def _frames(leaves: list[Tensor], impl: Impl, masked: bool) -> Tensor:
    text_mask, video_mask = (_mask(x) if masked else None for x in leaves[:2])
    return frame_similarity(*leaves, text_mask=text_mask, video_mask=video_mask, impl=impl)


def _info_nce(leaves: list[Tensor], impl: Impl, masked: bool) -> Tensor:
    return info_nce(*leaves, ignore=_ignore(leaves[0]) if masked else None, impl=impl)


def _sigmoid(leaves: list[Tensor], impl: Impl, masked: bool) -> Tensor:
    (text, video, scale), bias = leaves, torch.full_like(leaves[2], -10.0)
    return sigmoid_loss(text, video, scale, bias, ignore=_ignore(text) if masked else None, impl=impl)


def _alignment(leaves: list[Tensor], impl: Impl, masked: bool) -> Tensor:
    text, video, text_frames, video_frames, scale = leaves
    inputs = AlignmentInputs(
        text=text,
        video=video,
        text_frames=text_frames,
        video_frames=video_frames,
        text_mask=_mask(text_frames) if masked else None,
        video_mask=_mask(video_frames) if masked else None,
    )
    losses = alignment_losses(inputs, scale, ignore=_ignore(text) if masked else None, impl=impl)
    return losses.video + 0.3 * losses.frame + losses.distill


def _late_interaction(leaves: list[Tensor], impl: Impl, masked: bool) -> Tensor:
    return late_interaction(_token_inputs(leaves, masked), impl=impl)


def _tokens(leaves: list[Tensor], impl: Impl, masked: bool) -> Tensor:
    return leaves[2] * token_similarity(_token_inputs(leaves, masked), kappa=20.0, impl=impl)


def _training_tokens(leaves: list[Tensor], impl: Impl, masked: bool) -> Tensor:
    return leaves[2] * token_training_similarity(_token_inputs(leaves, masked), kappa=20.0, impl=impl)


def _communication(leaves: list[Tensor], impl: Impl, masked: bool) -> Tensor:
    options = {"kappa": 20.0, "communication": True}
    return leaves[2] * token_training_similarity(_token_inputs(leaves, masked), **options, impl=impl)


def _token_inputs(leaves: list[Tensor], masked: bool) -> TokenInputs:
    text_mask, video_mask = (_mask(x) if masked else None for x in leaves[:2])
    return TokenInputs(text=leaves[0], video=leaves[1], text_mask=text_mask, video_mask=video_mask)


def _soft_vlad(leaves: list[Tensor], impl: Impl, masked: bool) -> Tensor:
    tokens, assignment, centres, scale = leaves
    mask = _mask(tokens) if masked else torch.ones_like(tokens[..., 0], dtype=torch.bool)
    mask[:, 0] = True
    return scale * soft_vlad(tokens, mask, assignment / 8, centres / 8, impl=impl)


def _groups(items: Tensor) -> Tensor:
    """Return groups of three or four items."""
    return torch.arange(len(items), device=items.device) % max(1, len(items) // 3)


def _ranks(leaves: list[Tensor], impl: Impl, masked: bool) -> Tensor:
    query, items = leaves[:2]
    groups = _groups(items) if masked else None
    count = len(items) if groups is None else int(groups.max()) + 1
    right = torch.arange(len(query), device=query.device) % count
    return torch.stack(rank_of_positive(query, items, right, groups=groups, impl=impl))


def _top_k(leaves: list[Tensor], impl: Impl, masked: bool) -> Tensor:
    query, items = leaves[:2]
    groups = _groups(items) if masked else None
    count = len(items) if groups is None else int(groups.max()) + 1
    return top_k(query, items, min(10, count), groups=groups, impl=impl)[1]


CALLS: dict[str, Call] = {
    "frame_similarity": _frames,
    "info_nce": _info_nce,
    "alignment_losses": _alignment,
    "late_interaction": _late_interaction,
    "rank_of_positive": _ranks,
    "sigmoid_loss": _sigmoid,
    "soft_vlad": _soft_vlad,
    "token_communication": _communication,
    "token_similarity": _tokens,
    "token_training_similarity": _training_tokens,
    "top_k": _top_k,
}


def case(op: str, n: int, *, m: int = 0, frames: tuple[int, int] = (1, 1), dim: int = 512, **options) -> Case:
    """Make a case with its shapes; the default of m is n."""
    m = m or n
    pooled, parts = ((n, dim), (m, dim)), ((n, frames[0], dim), (m, frames[1], dim))
    of_parts = {"frame_similarity": parts, "late_interaction": parts, "alignment_losses": (*pooled, *parts)}
    of_parts |= {f"token_{kind}": parts for kind in ("similarity", "training_similarity", "communication")}
    of_parts |= {"soft_vlad": (parts[0], (5, dim), (5, dim))}
    shapes = of_parts.get(op, pooled)
    return Case(op=op, call=CALLS[op], n=n, m=m, frames=frames, dim=dim, shapes=shapes, **options)
