"""Blocks whose products are the vendor's and whose rest torch.compile fuses."""

import pytest
import torch

from discovla.ops import sigmoid_loss
from discovla.ops.cases import case
from discovla.ops.streamed import chunks, contrastive, frame_similarity
from discovla.ops.streamed.chunks import power_of_four


def test_blocks_are_squares_that_divide_large_batches():
    assert [power_of_four(x) for x in (1, 3, 4, 15, 16, 1000, 1 << 24)] == [1, 1, 4, 4, 16, 256, 1 << 24]


@pytest.mark.slow
@pytest.mark.parametrize("op", ["info_nce", "frame_similarity", "sigmoid_loss"])
def test_chunks_give_values_and_gradients_of_the_formula(op, monkeypatch):
    monkeypatch.setattr(chunks, "FACTOR", 1)
    monkeypatch.setattr(sigmoid_loss, "FACTOR", 1)
    monkeypatch.setattr(sigmoid_loss, "ELEMENTS", 4 * 256)
    monkeypatch.setattr(contrastive, "ELEMENTS", 4 * 256)
    monkeypatch.setattr(frame_similarity, "ELEMENTS", 64 * 6)
    parts = (3, 2) if op == "frame_similarity" else (1, 1)
    one = case(op, 32, frames=parts, dim=16, dtype=torch.float32)
    leaves = one.leaves("cpu")
    errors = one.errors("chunks", leaves, one.truth(leaves))
    assert errors["err_fro"] < 1e-6 and errors["err_gradient"] < 1e-5


def test_a_shift_as_a_tensor_marks_the_same_pairs_as_a_number():
    text, video = ((torch.randn(n, 8), torch.rand(n) + 0.5) for n in (5, 7))
    scale, teacher = torch.tensor(3.0), torch.randn(5, 7)
    sums = (torch.randn(3, 5), torch.randn(3, 7), torch.rand(3), False)
    for shift in (-6, -2, 0, 3, 5):
        given = (text, video, scale, teacher, None)
        for function, rest in ((contrastive.statistics, ()), (contrastive.derivative, sums)):
            results = [function(*given, s, *rest) for s in (shift, torch.tensor(shift))]
            for one, other in zip(*results, strict=True):
                torch.testing.assert_close(one, other)
