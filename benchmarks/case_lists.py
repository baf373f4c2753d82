"""Cases of the ops for checks and timing: ragged sizes of every dtype, and the sizes of training steps."""

from __future__ import annotations

import torch

from discovla.ops.cases import Case, case
from discovla.ops.tower_cases import (
    FRAMES,
    PATCH,
    TOKENS,
    TowerCase,
    patch_case,
    rounding_case,
    row_case,
    sequence_case,
)


def timed_cases(suite: str) -> list[Case]:
    """Return the cases to time, the smallest first; those of `small` take less than a second on a GPU."""
    f, half = (12, 12), torch.bfloat16
    cases = [
        case(op, n, frames=(1, 1) if op in ("info_nce", "sigmoid_loss") else f, dtype=dtype)
        for n in (16, 128, 512, 1024)
        for op in ("info_nce", "sigmoid_loss", "frame_similarity", "alignment_losses", "late_interaction")
        for dtype in (torch.float32, half)
    ]
    cases += [case(op, 128, frames=(38, 18)) for op in ("token_similarity", "token_training_similarity")]
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
        case("sigmoid_loss", 16_384),
        case("sigmoid_loss", 65_536, dim=768, target_ms=46.9),
        case("frame_similarity", 16_384, frames=f),
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
            for op in ("info_nce", "sigmoid_loss", "rank_of_positive", "top_k"):
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
                "token_training_similarity",
                "soft_vlad",
            )
            cases += [case(op, n, frames=frames, dim=65, dtype=dtype) for op in ops]
            if dtype == torch.float32:
                cases += [case(op, n, frames=frames, dim=65, dtype=dtype, masked=True) for op in ops]
    large = {"info_nce": (1, 1), "frame_similarity": (2, 2), "alignment_losses": (2, 2)}
    large["late_interaction"] = (2, 2)
    cases += [case(op, 4100, frames=frames, dim=64) for op, frames in large.items()]
    return cases


def timed_tower_cases(suite: str) -> list[TowerCase]:
    """Return the cases of a step of 128 clips of 12 frames: ViT-B/32; with `full` also B/16 and L/14."""
    frames, captions = 128 * FRAMES, 128 * (FRAMES + 1)
    cases = [
        row_case("layer_norm", 50 * frames, 768),
        row_case("lora_norm", 50 * frames, 768),
        row_case("mlp", 50 * frames, 768),
        sequence_case("attention", frames, 50, 768, 12),
        sequence_case("short_attention", frames, 50, 768, 12),
        sequence_case("short_attention", captions, TOKENS, 512, 8, packed=True),
        sequence_case("temporal_fusion", frames, 50, 768, 12),
        sequence_case("readout_attention", frames, 50, 768, 12),
        row_case("fusion_norm", 50 * frames, 768),
        row_case("unit_mean", frames // FRAMES, 512),
        sequence_case("temporal_fusion", frames, TOKENS, 512, 8, packed=True),
        patch_case(frames, 224, torch.bfloat16),
        row_case("fp8_linear", 50 * frames, 768),
        rounding_case(50 * frames, 768, masked=True),
        rounding_case(50 * frames, 3072, masked=True),
    ]
    if suite == "small":
        return cases
    return [
        *cases,
        sequence_case("short_attention", frames, 197, 768, 12),
        sequence_case("short_attention", frames, 257, 1024, 16),
        sequence_case("temporal_fusion", frames, 197, 768, 12),
        row_case("layer_norm", 257 * frames, 1024),
        row_case("mlp", 257 * frames, 1024),
    ]


def checked_tower_cases() -> list[TowerCase]:
    """Return the cases to check: ragged sizes, one tile and several, every dtype."""
    cases = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for n, dim in ((1, 40), (7, 64), (130, 96), (1100, 512)):
            ops = ("layer_norm", "lora_norm", "readout_lora_norm", "fusion_norm", "unit_mean", "mlp")
            cases += [row_case(op, n, dim, dtype=dtype) for op in ops]
            cases += [rounding_case(n, dim, dtype=dtype)]
        for n, rows, dim, heads in ((1, 1, 16, 1), (6, 7, 40, 4), (12, 50, 128, 2), (4, 130, 128, 2)):
            # the gradient by a query that sees one key is zero, of which no share is close
            for op in ("short_attention", "temporal_fusion", *(["readout_attention"] if rows > 1 else [])):
                cases += [sequence_case(op, n, rows, dim, heads, dtype=dtype)]
        cases += [sequence_case("attention", 12, 50, 128, 2, dtype=dtype)]
        if dtype == torch.bfloat16:
            cases += [row_case("fp8_linear", n, 512) for n in (16, 1104)]
        for op in ("short_attention", "temporal_fusion", "readout_attention"):
            cases += [sequence_case(op, 24, 0, 128, 2, packed=True, dtype=dtype)]
            cases += [sequence_case(op, 3, 257, 64, 1, dtype=dtype)]
    return [*cases, *(patch_case(3, 2 * PATCH, dtype) for dtype in (torch.float32, torch.bfloat16))]
