"""Half-precision ops sum in float32: their error is that of rounding the exact result once or twice."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from discovla.ops.mlp import MLPWeights, mlp
from discovla.ops.short_attention import short_attention
from discovla.ops.temporal_fusion import FrameGroups, temporal_fusion
from discovla.ops.unit_mean import unit_mean
from tests.ops.kernels import DEVICE

HALF = torch.float16


def noise(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE)


def attended(x: Tensor, impl: str) -> Tensor:
    """Values near 1 under nearly even weights: sums of many terms of one sign."""
    return short_attention(x, 2, impl=impl)


def fused(x: Tensor, impl: str) -> Tensor:
    readout = torch.arange(0, len(x) * x.shape[1], x.shape[1], device=DEVICE)[None]
    return temporal_fusion(x, FrameGroups(heads=2, readout_rows=readout), impl=impl)


def projected(x: Tensor, impl: str) -> Tensor:
    up, down = noise(256, 32).abs() / 32, noise(32, 256).abs() / 256
    return mlp(
        x,
        MLPWeights(
            up=up.to(x.dtype),
            up_bias=torch.zeros(256, dtype=x.dtype, device=DEVICE),
            down=down.to(x.dtype),
            down_bias=torch.zeros(32, dtype=x.dtype, device=DEVICE),
        ),
        activation="quick_gelu",
        impl=impl,
    )


def pooled(x: Tensor, impl: str) -> Tensor:
    return unit_mean(x, None, impl=impl)


def qkv(*shape: int) -> Tensor:
    x = 0.1 * noise(*shape)
    x[..., -shape[-1] // 3 :] += 1.5
    return x


# bound: of the error, in errors of rounding the exact result; weights of keys and hidden rows are rounded too
CASES: dict[str, tuple[Callable[[Tensor, str], Tensor], Callable[[], Tensor], float]] = {
    "short_attention": (attended, lambda: qkv(1, 130, 24), 1.2),
    "temporal_fusion": (fused, lambda: qkv(2, 128, 24), 1.2),
    "mlp": (projected, lambda: 1 + 0.1 * noise(32, 32), 1.4),
    "unit_mean": (pooled, lambda: 1 + 0.1 * noise(2, 64, 24), 1.2),
}


@pytest.mark.parametrize("name", CASES)
def test_sums_of_half_precision_are_rounded_once(name):
    call, make, bound = CASES[name]
    x = make().to(HALF)
    exact = call(x.double(), "reference")
    error = (call(x, "triton").double() - exact).square().mean().sqrt()
    rounding = (exact.to(HALF).double() - exact).square().mean().sqrt()
    assert rounding > 0
    assert error <= bound * rounding, (error / rounding).item()
