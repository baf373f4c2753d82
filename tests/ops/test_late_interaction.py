import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from discovla.ops.dispatch import IMPLEMENTATIONS
from discovla.ops.late_interaction import _late_interaction, late_interaction
from discovla.ops.token_similarity import TokenInputs
from tests.ops.kernels import DEVICE, skip_what_no_gpu_kernel_takes

IMPLS = IMPLEMENTATIONS["late_interaction"]
STREAMED = [impl for impl in IMPLS if impl != "reference"]
# t i v j d
SHAPES = [(1, 1, 1, 1, 1), (7, 3, 5, 1, 63), (2, 12, 3, 7, 130), (3, 63, 2, 7, 5), (1, 130, 2, 5, 3)]
# rounding of unit vectors, times the number of matches that are added up; fp16 inputs are widened first
BUDGET = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-6}
CASES = [(dtype, shape) for dtype in (torch.float64, torch.float32) for shape in SHAPES]
CASES += [(torch.float16, SHAPES[2])]
CASES += [(torch.float32, shape) for shape in ((2, 16, 2, 32, 64), (2, 64, 2, 16, 32), (2, 8, 2, 128, 16))]


def noise(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE)


def mask(rows: int, parts: int) -> Tensor:
    """Ragged rows, the first with a hole; the last has no real part."""
    real = torch.arange(parts) <= torch.arange(rows)[:, None] % parts
    real[0, parts // 2], real[0, -1], real[-1] = False, True, False
    return real.to(DEVICE)


def leaves(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Rows of texts and videos."""
    t, i, v, j, d = shape
    return [x.to(dtype).requires_grad_() for x in (noise(t, i, d), noise(v, j, d, seed=1))]


def inputs(x: list[Tensor], masked: bool) -> TokenInputs:
    masks = [mask(*y.shape[:2]) if masked else None for y in x]
    return TokenInputs(text=x[0], video=x[1], text_mask=masks[0], video_mask=masks[1])


def run(x: list[Tensor], masked: bool, impl: str) -> list[Tensor]:
    """Scores and gradients."""
    out = late_interaction(inputs(x, masked), impl=impl)
    direction = noise(*out.shape, seed=4)
    return [out.detach(), *torch.autograd.grad((out * direction.to(out.dtype)).sum(), x)]


def by_hand(x: list[Tensor], masked: bool) -> Tensor:
    """Pair by pair, on the real rows only."""
    given = inputs(x, masked)
    out = torch.zeros(len(x[0]), len(x[1]), dtype=torch.float64, device=DEVICE)
    for a in range(len(x[0])):
        for b in range(len(x[1])):
            rows = slice(None) if given.text_mask is None else given.text_mask[a]
            columns = slice(None) if given.video_mask is None else given.video_mask[b]
            cosines = F.normalize(x[0][a][rows], dim=-1) @ F.normalize(x[1][b][columns], dim=-1).T
            if cosines.numel():
                out[a, b] = cosines.max(1).values.sum()
    return out


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_reference_is_the_formula_pair_by_pair(shape, masked):
    x = leaves(shape, torch.float64)
    want = by_hand(x, masked)
    got = run(x, masked, "reference")
    torch.testing.assert_close(got[0], want, atol=1e-12, rtol=1e-12)
    if want.requires_grad:
        direction = noise(*want.shape, seed=4)
        expected = torch.autograd.grad((want * direction).sum(), x, materialize_grads=True)
        torch.testing.assert_close(got[1:], list(expected), atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("impl", STREAMED)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize(("dtype", "shape"), CASES, ids=str)
def test_values_and_gradients_are_those_of_the_reference(impl, masked, dtype, shape):
    skip_what_no_gpu_kernel_takes(impl, dtype)
    x = leaves(shape, dtype)
    wide = [y.detach().double().requires_grad_() for y in x]
    for g, w in zip(run(x, masked, impl), run(wide, masked, "reference"), strict=True):
        # a gradient comes back in the dtype of its input, so fp16 inputs add a rounding of fp16
        budget = 1e-3 if g.dtype == torch.float16 else BUDGET[dtype]
        assert (g.double() - w).abs().max() <= budget * max(shape[1], w.abs().max())


@pytest.mark.parametrize("impl", STREAMED)
def test_any_cut_into_blocks_gives_the_same(impl, monkeypatch):
    skip_what_no_gpu_kernel_takes(impl, torch.float64)
    x = leaves((5, 3, 4, 2, 6), torch.float64)
    whole = run(x, True, impl)
    monkeypatch.setattr("discovla.ops.streamed.late_interaction.BLOCK", 30)
    monkeypatch.setattr("discovla_kernels.pairs.BLOCK_BYTES", 8 * 30)
    torch.testing.assert_close(run(x, True, impl), whole, atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize("impl", IMPLS)
def test_of_equal_matches_the_lowest_index_gets_the_gradient(impl):
    eye = torch.eye(3, device=DEVICE)
    text = eye[None, :1].clone().requires_grad_()  # t i d = 1 1 3
    video = (eye[None, [1, 0, 0]] + 0.1).requires_grad_()  # rows 1 and 2 are the same
    late_interaction(TokenInputs(text=text, video=video), impl=impl).sum().backward()
    assert video.grad[0].any(-1).tolist() == [False, True, False]


def test_the_reference_passes_gradcheck():
    x = leaves((2, 3, 3, 2, 4), torch.float64)
    assert torch.autograd.gradcheck(lambda *x: late_interaction(inputs(list(x), True), impl="reference"), x)


@pytest.mark.parametrize("impl", STREAMED)
def test_the_op_is_registered_soundly(impl):
    skip_what_no_gpu_kernel_takes(impl, torch.float64)
    text, video = leaves((2, 3, 3, 2, 4), torch.float64)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(_late_interaction, (text, video, mask(2, 3), mask(3, 2), impl), test_utils=tests)
