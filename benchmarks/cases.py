"""Cases of the similarity ops for checks and timing: inputs, calls, needed work and targets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from discovla.ops.alignment_losses import AlignmentInputs, alignment_losses
from discovla.ops.dispatch import Impl
from discovla.ops.frame_similarity import frame_similarity
from discovla.ops.info_nce import info_nce
from discovla.ops.late_interaction import late_interaction
from discovla.ops.rank_of_positive import rank_of_positive
from discovla.ops.soft_vlad import soft_vlad
from discovla.ops.token_similarity import TokenInputs, token_similarity, token_training_similarity
from discovla.ops.top_k import top_k

Call = Callable[[list[Tensor], Impl, bool], Any]  # leaves, impl, masked -> a tensor or several


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
    def limits(self) -> tuple[float, float] | None:
        """Largest errors of values and of gradients; None for those of similarities."""
        return None

    @property
    def reference_bytes(self) -> float:
        """Least memory of the reference: five matrices of all products in float32."""
        return 20.0 * self.n * self.m * self.frames[0] * self.frames[1]

    def leaves(self, device: torch.device | str, seed: int = 0) -> list[Tensor]:
        """Return inputs of noise, then logit_scale if the op has one."""
        generator = torch.Generator(device).manual_seed(seed)
        noise = [torch.randn(s, generator=generator, device=device).to(self.dtype) for s in self.shapes]
        scale = torch.tensor(20.0, device=device, dtype=torch.promote_types(self.dtype, torch.float32))
        return [x.requires_grad_(self.backward) for x in [*noise, *([scale] if self.scaled else [])]]

    def run(self, leaves: list[Tensor], impl: Impl) -> list[Tensor]:
        """Return the result, and with `backward` the gradients by all leaves."""
        with torch.set_grad_enabled(self.backward):
            out = self.call(leaves, impl, self.masked)
        if not self.backward:
            return [out]
        return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]


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
    text, video = leaves[:2]
    text_mask, video_mask = (_mask(x) if masked else None for x in leaves[:2])
    inputs = TokenInputs(text=text, video=video, text_mask=text_mask, video_mask=video_mask)
    return late_interaction(inputs, impl=impl)


def _tokens(leaves: list[Tensor], impl: Impl, masked: bool) -> Tensor:
    text, video, scale = leaves
    text_mask, video_mask = (_mask(x) if masked else None for x in leaves[:2])
    inputs = TokenInputs(text=text, video=video, text_mask=text_mask, video_mask=video_mask)
    ranking = token_similarity(inputs, kappa=20.0, impl=impl)
    return scale * (ranking + token_training_similarity(inputs, kappa=20.0, impl=impl))


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
    "soft_vlad": _soft_vlad,
    "token_similarity": _tokens,
    "top_k": _top_k,
}


def case(op: str, n: int, *, m: int = 0, frames: tuple[int, int] = (1, 1), dim: int = 512, **options) -> Case:
    """Make a case with its shapes; the default of m is n."""
    m = m or n
    pooled, parts = ((n, dim), (m, dim)), ((n, frames[0], dim), (m, frames[1], dim))
    of_parts = {"frame_similarity": parts, "late_interaction": parts, "alignment_losses": (*pooled, *parts)}
    of_parts |= {"token_similarity": parts, "soft_vlad": (parts[0], (5, dim), (5, dim))}
    shapes = of_parts.get(op, pooled)
    return Case(op=op, call=CALLS[op], n=n, m=m, frames=frames, dim=dim, shapes=shapes, **options)


def timed_cases(suite: str) -> list[Case]:
    """Return the cases to time, the smallest first; those of `small` take less than a second on a GPU."""
    f, half = (12, 12), torch.bfloat16
    cases = [
        case(op, n, frames=f if op != "info_nce" else (1, 1), dtype=dtype)
        for n in (16, 128, 512, 1024)
        for op in ("info_nce", "frame_similarity", "alignment_losses", "late_interaction")
        for dtype in (torch.float32, half)
    ]
    cases += [case(op, 1000, backward=False) for op in ("rank_of_positive", "top_k")]
    if suite == "small":
        return cases
    return [
        *cases,
        case("rank_of_positive", 59_800, m=1000, backward=False, target_ms=1),
        case("frame_similarity", 4096, frames=f, backward=False, target_ms=5.2, target_gb=0.3),
        case("frame_similarity", 4096, frames=f, target_ms=25, target_gb=0.3),
        case("alignment_losses", 4096, frames=f, target_ms=27, target_gb=0.5),
        case("late_interaction", 4096, frames=f),
        case("info_nce", 4096),
        case("info_nce", 16_384),
        case("info_nce", 65_536, target_ms=40, target_gb=0.2),
        case("rank_of_positive", 100_000, backward=False, target_ms=20),
        case("top_k", 1000, m=100_000, backward=False),
        case("alignment_losses", 16_384, frames=f),
    ]


def checked_cases() -> list[Case]:
    """Return the cases to check: ragged sizes, every dtype, and bf16 products from 4096 pairs on."""
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    cases = []
    for dtype in dtypes:
        for n in (1, 7, 63, 130, 1100):
            for op in ("info_nce", "rank_of_positive", "top_k"):
                cases += [case(op, n, dim=65, dtype=dtype, masked=masked) for masked in (False, True)]
        for n, frames in (
            (1, (1, 1)),
            (7, (12, 12)),
            (63, (7, 1)),
            (130, (3, 63)),
            (20, (63, 130)),
            (300, (12, 12)),
        ):
            ops = (
                "frame_similarity",
                "alignment_losses",
                "late_interaction",
                "token_similarity",
                "soft_vlad",
            )
            cases += [case(op, n, frames=frames, dim=65, dtype=dtype) for op in ops]
            if dtype == torch.float32:
                cases += [case(op, n, frames=frames, dim=65, dtype=dtype, masked=True) for op in ops]
    large = {"info_nce": (1, 1), "frame_similarity": (2, 2), "alignment_losses": (2, 2)}
    large["late_interaction"] = (2, 2)
    cases += [case(op, 4100, frames=frames, dim=64) for op, frames in large.items()]
    return cases
