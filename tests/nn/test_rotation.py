"""Rotary positions: one multiplication of complex numbers, forward and backward."""

import pytest
import torch

from discovla.nn.rotation import Rotation, rotate, rotate_reference

TABLE = Rotation(grid=2, offset=1.0, order="xy").table(2, 8, class_row=True)  # 5 rows of heads of 8 channels


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_values_and_gradients_are_those_of_the_formula(dtype, parts):
    x = torch.randn(3, 5, (parts + 1) * 16, dtype=dtype)
    grad, table = torch.randn_like(x), TABLE.double() if dtype == torch.float64 else TABLE
    results = []
    for turn, leaf in ((rotate, x.mT.contiguous().mT), (rotate_reference, x.double())):  # other strides too
        leaf.requires_grad_()
        y = turn(leaf, 2, table, parts)
        results.append((y, *torch.autograd.grad(y, leaf, grad.to(leaf.dtype))))
    # both are rounded to the dtype once
    tolerance = {torch.float64: 1e-15, torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
    for got, want in zip(*results, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


def test_a_class_row_and_what_follows_the_turned_parts_stay():
    x = torch.randn(2, 5, 48)
    y = rotate(x, 2, TABLE, 2)
    assert torch.equal(y[:, 0], x[:, 0]) and torch.equal(y[..., 32:], x[..., 32:])
    assert not torch.isclose(y[:, 1:, :32], x[:, 1:, :32]).all(-1).any()
