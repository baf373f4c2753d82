"""What streamed ops hold beside inputs and outputs grows with the batch, not with its square."""

import pytest
import torch
from torch import Tensor

from discovla.ops.alignment_losses import AlignmentInputs, alignment_losses
from discovla.ops.frame_similarity import frame_similarity
from discovla.ops.info_nce import info_nce
from discovla.ops.sigmoid_loss import sigmoid_loss
from discovla.testing import exponent, peak_bytes

SIZES = [64, 128, 256, 512, 1024]
SCALE = torch.tensor(10.0)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """One block is a constant; at its usual size it would hold all of the smaller batches."""
    for module in ("frame_similarity", "contrastive", "sigmoid_loss"):
        monkeypatch.setattr(f"discovla.ops.streamed.{module}.ELEMENTS", 1 << 14)


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape).requires_grad_() for shape in shapes]


def of_info_nce(n: int, impl: str) -> int:
    x = leaves((n, 8), (n, 8))
    return peak_bytes(lambda: info_nce(*x, SCALE, impl=impl).backward()) - 4 * 2 * n * 8


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


def of_sigmoid_loss(n: int, impl: str) -> int:
    x = leaves((n, 8), (n, 8))
    bias = torch.tensor(-10.0)
    return peak_bytes(lambda: sigmoid_loss(*x, SCALE, bias, impl=impl).backward()) - 4 * 2 * n * 8


OPS = {
    "info_nce": of_info_nce,
    "alignment_losses": of_alignment,
    "frame_similarity": of_frame_similarity,
    "sigmoid_loss": of_sigmoid_loss,
}


@pytest.mark.parametrize("op", OPS)
def test_memory_beside_inputs_and_outputs_grows_with_the_batch(op):
    assert exponent(SIZES, [OPS[op](n, "torch") for n in SIZES]) <= 1.05


@pytest.mark.parametrize("op", OPS)
def test_the_reference_grows_with_its_square(op):
    assert exponent(SIZES[:4], [OPS[op](n, "reference") for n in SIZES[:4]]) >= 1.8
