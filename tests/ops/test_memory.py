"""Memory of streamed ops beside inputs and outputs grows with the batch, not with its square."""

import pytest
import torch
from torch import Tensor

from discovla.ops.alignment_losses import AlignmentInputs, alignment_losses
from discovla.ops.frame_similarity import frame_similarity
from discovla.ops.info_nce import info_nce
from discovla.ops.late_interaction import late_interaction
from discovla.ops.soft_vlad import soft_vlad
from discovla.ops.token_similarity import TokenInputs, token_similarity, token_training_similarity
from discovla.testing import exponent, peak_bytes

pytestmark = pytest.mark.slow

SIZES = [64, 128, 256, 512, 1024]
SCALE = torch.tensor(10.0)


@pytest.fixture
def small_blocks(monkeypatch):
    """One block is a constant; at its usual size it would hold all of the smaller batches."""
    for module in ("frame_similarity", "contrastive"):
        monkeypatch.setattr(f"discovla.ops.streamed.{module}.ELEMENTS", 1 << 14)
    for module in ("token_similarity", "late_interaction"):
        monkeypatch.setattr(f"discovla.ops.streamed.{module}.BLOCK", 1 << 14)


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape).requires_grad_() for shape in shapes]


def of_info_nce(n: int, impl: str, d: int = 8, dtype: torch.dtype = torch.float32) -> int:
    x = [torch.randn(n, d).to(dtype).requires_grad_() for _ in "tv"]
    return peak_bytes(lambda: info_nce(*x, SCALE, impl=impl).backward()) - dtype.itemsize * 2 * n * d


def of_alignment(n: int, impl: str) -> int:
    text, video, text_frames, video_frames = x = leaves((n, 8), (n, 8), (n, 3, 8), (n, 2, 8))
    inputs = AlignmentInputs(text=text, video=video, text_frames=text_frames, video_frames=video_frames)

    def run():
        out = alignment_losses(inputs, SCALE, impl=impl)
        (out.video + out.frame + out.distill).backward()

    return peak_bytes(run) - 4 * sum(leaf.numel() for leaf in x)


def of_frame_similarity(n: int, impl: str) -> int:
    x = leaves((n, 3, 8), (n, 2, 8))
    grad = torch.ones(n, n)
    outputs = 4 * (n * n + sum(leaf.numel() for leaf in x))
    return peak_bytes(lambda: frame_similarity(*x, SCALE, impl=impl).backward(grad)) - outputs


def of_pairs(score):
    """Extra bytes of a similarity of the rows of n texts and videos."""

    def measured(n: int, impl: str) -> int:
        x = leaves((n, 3, 8), (n, 2, 8))
        grad, outputs = torch.ones(n, n), 4 * (n * n + sum(leaf.numel() for leaf in x))
        given = TokenInputs(text=x[0], video=x[1])
        return peak_bytes(lambda: score(given, impl=impl).backward(grad)) - outputs

    return measured


def of_soft_vlad(n: int, impl: str) -> int:
    tokens, centres = torch.randn(n, 3, 8).requires_grad_(), leaves((4, 8), (4, 8))
    mask = torch.ones(n, 3, dtype=torch.bool)
    grad = torch.ones(n, 8)
    outputs = 4 * n * (3 + 1) * 8
    return peak_bytes(lambda: soft_vlad(tokens, mask, *centres, impl=impl).backward(grad)) - outputs


OPS = {
    "info_nce": of_info_nce,
    "alignment_losses": of_alignment,
    "frame_similarity": of_frame_similarity,
    "token_similarity": of_pairs(token_similarity),
    "token_training_similarity": of_pairs(token_training_similarity),
    "late_interaction": of_pairs(late_interaction),
}


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("op", OPS)
def test_memory_beside_inputs_and_outputs_grows_with_the_batch(op):
    assert exponent(SIZES, [OPS[op](n, "torch") for n in SIZES]) <= 1.05


@pytest.mark.parametrize("op", OPS)
def test_the_reference_grows_with_its_square(op):
    assert exponent(SIZES[:4], [OPS[op](n, "reference") for n in SIZES[:4]]) >= 1.8


def test_memory_of_soft_vlad_grows_with_the_batch():
    assert exponent(SIZES, [of_soft_vlad(n, "torch") for n in SIZES]) <= 1.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_info_nce_of_65536_pairs_needs_less_than_200_mb(dtype, monkeypatch):
    """Counted: one block of the size it has at that batch, and what each further number of a row costs."""
    block = of_info_nce(1024, "torch", d=512, dtype=dtype)
    for module in ("streamed.contrastive", "blocks"):
        monkeypatch.setattr(f"discovla.ops.{module}.ELEMENTS", 1 << 14)
    one, two = (of_info_nce(n, "torch", d=128, dtype=dtype) for n in (512, 1024))
    slope = (two - one) / (512 * 128)
    assert block + slope * (65_536 - 1024) * 512 < 200e6
