import pytest
import torch
from torch import Tensor

from discovla.ops import blocks
from discovla.ops.dispatch import KernelUnavailable
from discovla.ops.frame_similarity import _frame_similarity, frame_similarity
from discovla.testing import relative_error
from tests.ops.kernels import DEVICE, runnable, skip_what_no_gpu_kernel_takes

SCALE = 7.0
STREAMED = [impl for impl in runnable("frame_similarity") if impl != "reference"]
# t i v j d
SHAPES = [
    *[(1, 1, 1, 1, 1), (7, 3, 5, 1, 63), (2, 12, 3, 12, 130), (3, 63, 2, 7, 5)],
    *[(2, 7, 1, 130, 5), (2, 130, 2, 7, 3), (63, 1, 130, 2, 7), (130, 2, 7, 3, 4)],
]
# rounding of unit vectors, times the scale; half-precision inputs are widened first
BUDGET = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 5e-6}
FULL = [(4, 16, 4, 16, 32), (2, 64, 2, 32, 64)]  # tiles are filled exactly
CASES = [(torch.float64, shape) for shape in SHAPES]
CASES += [(torch.float32, shape) for shape in SHAPES[:4]] + [(torch.float16, SHAPES[2])]
CASES += [(torch.float32, shape) for shape in FULL]


def noise(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def mask(rows: int, parts: int) -> Tensor:
    """Ragged rows, the first with a hole; the last has no real part."""
    real = torch.arange(parts) <= torch.arange(rows)[:, None] % parts
    real[0, parts // 2] = False
    real[0, -1] = True
    real[-1] = False
    return real.to(DEVICE)


def run(impl, text, video, scale, masks, direction):
    leaves = [x.detach().clone().requires_grad_() for x in (text, video, scale)]
    out = frame_similarity(*leaves, text_mask=masks[0], video_mask=masks[1], impl=impl)
    (out * direction.to(out.dtype)).sum().backward()
    return out.detach(), *(x.grad for x in leaves)


@pytest.mark.parametrize("impl", STREAMED)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize(("dtype", "shape"), CASES, ids=str)
def test_values_and_gradients_are_those_of_the_formula(impl, masked, dtype, shape):
    skip_what_no_gpu_kernel_takes(impl, dtype)
    t, i, v, j, d = shape
    text, video = noise((t, i, d), dtype), noise((v, j, d), dtype)
    scale = torch.tensor(SCALE, dtype=torch.promote_types(dtype, torch.float32), device=DEVICE)
    masks = (mask(t, i), mask(v, j)) if masked else (None, None)
    direction = noise((t, v))
    want = run("reference", text.double(), video.double(), scale.double(), masks, direction)
    got = run(impl, text, video, scale, masks, direction)
    for name, g, w in zip(("value", "text", "video", "scale"), got, want, strict=True):
        # a gradient comes back in the dtype of its input, so fp16 inputs add a rounding of fp16
        budget = 1e-3 if g.dtype == torch.float16 else BUDGET[dtype]
        # of the scale's and of parallel vectors' gradients little is left but the rounding of what cancels
        cancels = direction.norm() if name == "scale" or d == 1 else 0
        assert (g.double() - w).abs().max() <= budget * max(w.abs().max(), cancels), name


@pytest.mark.parametrize("impl", STREAMED)
def test_many_blocks_give_the_result_of_one(impl, monkeypatch):
    skip_what_no_gpu_kernel_takes(impl, torch.float64)
    text, video, scale = noise((9, 4, 6)), noise((5, 3, 6)), torch.tensor(SCALE, device=DEVICE).double()
    direction = noise((9, 5))
    whole = run(impl, text, video, scale, (None, None), direction)
    monkeypatch.setattr("discovla.ops.streamed.frame_similarity.ELEMENTS", 130)
    monkeypatch.setattr("discovla_kernels.frame_similarity.BLOCK_BYTES", 2500)
    cut = run(impl, text, video, scale, (None, None), direction)
    for c, w in zip(cut, whole, strict=True):
        assert relative_error(c, w) < 1e-13


@pytest.mark.parametrize("impl", runnable("frame_similarity"))
def test_of_equal_matches_the_lowest_index_gets_the_gradient(impl):
    eye = torch.eye(3, device=DEVICE)
    text = eye[None, :1].clone().requires_grad_()  # t i d = 1 1 3
    video = (eye[None, [1, 0, 0]] + 0.1).requires_grad_()  # frames 1 and 2 are the same
    out = frame_similarity(text, video, torch.tensor(0.0, device=DEVICE), impl=impl)
    out.sum().backward()
    # the video's side pools all frames evenly; the text's side has its one best match in frame 1
    grad = video.grad[0].norm(dim=-1)
    assert grad[1] == pytest.approx(4 * grad[2].item(), rel=1e-4)


@pytest.mark.parametrize("impl", STREAMED)
def test_the_op_is_registered_soundly(impl):
    skip_what_no_gpu_kernel_takes(impl, torch.float64)
    text, video = (x / x.norm(dim=-1, keepdim=True) for x in (noise((3, 2, 4)), noise((2, 3, 4))))
    arguments = (
        text.requires_grad_(),
        video.requires_grad_(),
        torch.tensor(SCALE, device=DEVICE).double().requires_grad_(),
    )
    torch.library.opcheck(_frame_similarity, (*arguments, mask(3, 2), None, impl))


def test_torch_streams_a_large_similarity_on_a_cpu(monkeypatch):
    text, video = noise((4, 3, 5)).cpu(), noise((4, 3, 5)).cpu()
    small = frame_similarity(text, video, torch.tensor(SCALE))
    assert blocks.ELEMENTS > 4 * 3 * 4 * 3
    monkeypatch.setattr("discovla.ops.frame_similarity.ELEMENTS", 8)
    with torch.profiler.profile() as profile:
        large = frame_similarity(text, video, torch.tensor(SCALE))
    assert any("frame_similarity_streamed" in event.key for event in profile.key_averages())
    assert relative_error(large, small) < 1e-6


def test_more_parts_than_the_kernel_takes_are_refused_by_name():
    with pytest.raises(KernelUnavailable, match=r"16384 products of a pair's rows, .* found 256 x 128"):
        frame_similarity(noise((1, 129, 4)), noise((1, 65, 4)), torch.tensor(SCALE), impl="triton")


def test_bfloat16_is_refused_by_the_interpreter():
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled here, not interpreted")
    x = noise((1, 2, 4), torch.bfloat16)
    with pytest.raises(KernelUnavailable, match="computes bfloat16 wrongly"):
        frame_similarity(x, x, torch.tensor(SCALE), impl="triton")
