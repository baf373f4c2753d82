import pytest
import torch
import torch.nn.functional as F

from discovla.ops.dispatch import IMPLEMENTATIONS
from discovla.ops.frame_patches import fold_normalisation, frame_patches
from discovla.ops.preprocess_frames import CLIP_MEAN, CLIP_STD, preprocess_frames
from tests.ops.kernels import DEVICE, skip_what_no_gpu_kernel_takes

IMPLS = IMPLEMENTATIONS["frame_patches"]
BUDGET = {torch.float64: 1e-13, torch.float32: 5e-7, torch.float16: 1e-3}
SIZES = [(1, 1, 1, 1), (7, 1, 2, 3), (3, 3, 5, 2), (16, 1, 2, 2)]  # patch, frames, patches down and across


def bytes_of(patch: int, frames: int, down: int, across: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(patch)
    shape = (2, frames, down * patch, across * patch, 3)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(DEVICE)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", BUDGET, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_rows_times_a_flat_patch_embedding_are_its_convolution(size, dtype, impl):
    skip_what_no_gpu_kernel_takes(impl, dtype)
    frames, patch = bytes_of(*size), size[0]
    got = frame_patches(frames, patch, dtype=dtype, impl=impl)
    assert got.dtype == dtype
    weight = torch.randn(4, 3, patch, patch, dtype=torch.float64, device=DEVICE) / patch
    pixels = preprocess_frames(frames, dtype=torch.float64, impl="reference").flatten(0, 1)
    want = F.conv2d(pixels, weight, stride=patch).flatten(2).transpose(1, 2)  # n p w
    product = got.double() @ weight.flatten(1).T
    assert (product - want).abs().max() <= 5 * BUDGET[dtype] * want.abs().max()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_folded_patch_embedding_gives_the_same_on_bytes_less_128(size, impl):
    frames, patch = bytes_of(*size), size[0]
    weight = torch.randn(4, 3, patch, patch, dtype=torch.float64, device=DEVICE)
    folded, bias = fold_normalisation(weight, impl="reference")
    rows = frame_patches(frames, patch, statistics=None, dtype=torch.float16, impl=impl)
    want = frame_patches(frames, patch, dtype=torch.float64, impl="reference") @ weight.flatten(1).T
    torch.testing.assert_close(rows.double() @ folded.T + bias, want, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", BUDGET, ids=str)
@pytest.mark.parametrize("patch", [1, 7, 16])
def test_every_implementation_folds_alike(patch, dtype, impl):
    skip_what_no_gpu_kernel_takes(impl, dtype)
    wide = torch.randn(5, 3, patch, patch, dtype=torch.float64, device=DEVICE)
    want = fold_normalisation(wide, impl="reference")
    for stored, made in ((dtype, None), (torch.float32, dtype)):
        got = fold_normalisation(wide.to(stored), dtype=made, impl=impl)
        for x, y in zip(got, want, strict=True):
            limit = max(BUDGET[dtype], BUDGET[stored])
            assert x.dtype == dtype and x.shape == y.shape
            assert (x.double() - y).abs().max() <= 4 * limit * y.abs().max()


def test_bytes_less_128_are_exact_in_bfloat16():
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16, 1).expand(-1, -1, -1, -1, 3)
    rows = frame_patches(every, 16, statistics=None, dtype=torch.bfloat16)
    assert torch.equal(rows[0, 0, :256].double(), torch.arange(-128, 128).double())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS["preprocess_frames"])
@pytest.mark.parametrize("dtype", BUDGET, ids=str)
def test_whole_frames_are_normalised_channels_first(dtype, impl):
    skip_what_no_gpu_kernel_takes(impl, dtype)
    frames = bytes_of(1, 2, 33, 70)
    got = preprocess_frames(frames, dtype=dtype, impl=impl)
    assert got.shape == (2, 2, 3, 33, 70) and got.dtype == dtype
    for c in range(3):
        want = (frames[..., c].double() / 255 - CLIP_MEAN[c]) / CLIP_STD[c]
        torch.testing.assert_close(got[:, :, c].double(), want, atol=4 * BUDGET[dtype], rtol=BUDGET[dtype])


@pytest.mark.parametrize("impl", IMPLS)
def test_shapes_that_do_not_fit_are_refused_by_name(impl):
    frames = torch.zeros(1, 1, 4, 6, 3, dtype=torch.uint8)
    half = ((0.5, 0.5), (0.5, 0.5))
    for message, call in (
        ("frames: expected uint8, b f y x c, found", lambda: frame_patches(frames.float(), 2, impl=impl)),
        ("frames: expected uint8, b f y x c, found", lambda: frame_patches(frames[0], 2, impl=impl)),
        ("frames: expected sides .* of 4, found 4 x 6", lambda: frame_patches(frames, 4, impl=impl)),
        ("statistics: expected 4 means", lambda: fold_normalisation(torch.ones(2, 4, 1, 1), impl=impl)),
        ("statistics: expected 3 means", lambda: frame_patches(frames, 2, statistics=half, impl=impl)),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            call()
