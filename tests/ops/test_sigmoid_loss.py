import pytest
import torch

from discovla.ops import sigmoid_loss as module
from discovla.ops.cases import case
from discovla.ops.column_shard import ColumnShard
from discovla.ops.sigmoid_loss import sigmoid_loss


@pytest.mark.parametrize("masked", [False, True])
def test_blocks_give_the_loss_and_gradients_of_all_pairs(masked, monkeypatch):
    monkeypatch.setattr(module, "ELEMENTS", 4 * 50)  # ragged blocks, on the diagonal and beside it
    one = case("sigmoid_loss", 41, dim=16, dtype=torch.float32, masked=masked)
    leaves = one.leaves("cpu")
    errors = one.errors("torch", leaves, one.truth(leaves))
    assert errors["err_fro"] < 1e-6 and errors["err_gradient"] < 2e-6
    for got, want in zip(one.run(leaves, "torch"), one.run(leaves, "reference"), strict=True):
        torch.testing.assert_close(got, want)


def test_bias_and_scale_have_their_gradients_and_shards_add_up():
    text, video = torch.randn(2, 6, 8, dtype=torch.float64)
    scalars = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (9.0, -3.0)]
    whole = sigmoid_loss(text, video, *scalars, impl="reference")
    expected = torch.autograd.grad(whole, scalars)
    parts = []
    for first in (0, 2):
        rows = slice(first, first + 2 if first == 0 else 6)
        shard = ColumnShard(first_text=first, all_reduce=lambda x: (x,), all_reduce_max=torch.Tensor.detach)
        parts.append(sigmoid_loss(text, video[rows], *scalars, columns=shard, impl="torch"))
    torch.testing.assert_close(sum(parts), whole)
    for got, want in zip(torch.autograd.grad(sum(parts), scalars), expected, strict=True):
        torch.testing.assert_close(got, want)
