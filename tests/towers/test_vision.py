"""The patch embedding with the frames' normalisation folded into it."""

import copy
from dataclasses import replace

import pytest
import torch

from benchmarks.measure import Launches
from discovla.engine.strategy import cast_frozen
from discovla.methods.base import Method
from discovla.ops.dispatch import Impl
from discovla.testing import relative_error
from discovla.towers.vision import CentredPatches
from tests.nn.test_block import made
from tests.ops.kernels import DEVICE, skip_what_no_gpu_kernel_takes


def embedded(method: Method, frames: torch.Tensor, impl: Impl) -> torch.Tensor:
    method.vision.impl = impl
    return method.vision.embed(method.pixels(frames).flatten(0, 1))


@pytest.mark.parametrize(
    ("case", "impl"), [("published", "reference"), ("published", "triton"), ("branch", "reference")]
)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_tokens_of_a_folded_embedding_are_those_of_normalised_frames(case, dtype, limit, impl):
    skip_what_no_gpu_kernel_takes(impl, dtype)
    method, batch = made(case, dtype)
    method.vision.patch_embedding.requires_grad_(False)
    method, frames = method.to(DEVICE), batch.frames.to(DEVICE)
    want = embedded(method, frames, "torch")
    assert isinstance(method.pixels(frames), torch.Tensor)
    got = embedded(method, frames, impl)
    assert isinstance(method.pixels(frames), CentredPatches)
    assert got.dtype == dtype and relative_error(got, want) <= limit


@pytest.mark.parametrize("case", ["published", "branch"])
def test_features_are_those_of_normalised_frames(case):
    method, batch = made(case, torch.float64)
    method.vision.patch_embedding.requires_grad_(False)
    features = []
    for method.vision.impl in ("torch", "reference"):
        features.append(method.encode_videos(batch).pooled)
    assert relative_error(*features) <= 1e-12


@pytest.mark.parametrize("statistics", ["clip", "imagenet"])
def test_statistics_are_those_of_the_method(statistics):
    method, batch = made("branch", torch.float64)
    method.vision.patch_embedding.requires_grad_(False)
    method.config = method.config.model_copy(update={"pixel_statistics": statistics})
    want, got = (embedded(method, batch.frames, impl) for impl in ("torch", "reference"))
    assert relative_error(got, want) <= 1e-12


def test_trained_embeddings_and_normalised_frames_are_not_folded():
    method, batch = made("fine-tuned in full", torch.float32)
    method.vision.impl = "reference"
    assert isinstance(method.pixels(batch.frames), torch.Tensor)
    method, batch = made("published", torch.float32)
    normalised = method.pixels(batch.frames)
    want = embedded(method, batch.frames, "torch")
    assert torch.equal(embedded(method, normalised, "reference"), want)


def test_the_folded_embedding_follows_its_weights_and_is_not_in_the_state_dict():
    impl: Impl = "reference"
    method, batch = made("published", torch.float32)
    names = list(method.state_dict())
    embedded(method, batch.frames, impl)
    with torch.no_grad():
        method.vision.patch_embedding.mul_(3).add_(0.01)
    want, got = (embedded(method, batch.frames, which) for which in ("torch", impl))
    assert relative_error(got, want) <= 1e-5
    loaded = copy.deepcopy(method.state_dict())
    loaded["vision.patch_embedding"] *= -1
    method.load_state_dict(loaded)
    want, got = (embedded(method, batch.frames, which) for which in ("torch", impl))
    assert relative_error(got, want) <= 1e-5
    assert torch.equal(method.plain_weights()["visual.conv1.weight"], loaded["vision.patch_embedding"])
    method.vision.patch_embedding.data = method.vision.patch_embedding.data * 0.5  # as a cast puts it there
    want, got = (embedded(method, batch.frames, which) for which in ("torch", impl))
    assert relative_error(got, want) <= 1e-5
    assert list(method.state_dict()) == names


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16], ids=str)
def test_a_folded_embedding_is_as_accurate_in_bfloat16(kept):
    """W' is rounded where rows were; weights that were in bfloat16 before are rounded again."""
    method, _ = made("published", torch.float32)
    cast_frozen(method, kept)
    wide = copy.deepcopy(method).double()
    wide.compute_dtype = torch.float64
    frames = torch.randint(0, 256, (8, 12, 16, 16, 3), dtype=torch.uint8)
    want = embedded(wide, frames, "torch")
    method.compute_dtype = torch.bfloat16
    plain, folded = (
        ((embedded(method, frames, impl).double() - want).norm() / want.norm()).item()
        for impl in ("torch", "reference")
    )
    assert folded <= 1.2 * plain
    assert folded <= 4e-3


def test_folding_starts_no_more_kernels_than_normalising():
    method, batch = made("published", torch.float32)
    method, frames = method.to("meta"), replace(batch, valid=None).to("meta").frames
    counts = {}
    for impl in ("torch", "triton"):
        with Launches() as counted:
            embedded(method, frames, impl)
        counts[impl] = counted.count
    assert counts["triton"] <= counts["torch"]
