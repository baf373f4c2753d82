"""A GPU is not waited for between the pixels and the features."""

import pytest
import torch

from discovla.testing import noise_batch
from tests.nn.test_block import made


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("case", ["published", "every block fused, positions, masks", "words"])
def test_encoding_reads_values_of_masks_only(case, impl):
    method, batch = made(case, torch.float32)
    method.vision.impl = method.text.impl = impl
    moved = batch.to("meta")
    assert moved.frames.is_meta and not moved.text_mask.is_meta
    text, video = method.to("meta").encode(moved)  # whose numbers nobody can read
    every = [x for side in (text, video) for x in side.tensors().values()]
    assert all(x.is_meta for x in every)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("text_mask", "caption 1: expected at least one entry that is no padding, found none in its mask"),
        ("frame_mask", "video 1: expected at least one entry that is no padding, found none in its mask"),
    ],
)
def test_a_row_without_an_entry_is_refused_before_it_reaches_the_device(name, message):
    method, batch = made("published", torch.float32)
    getattr(batch, name)[1] = False
    with pytest.raises(ValueError, match=message):
        method.to("meta").encode(batch.to("meta"))


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_encoding_does_not_sync_with_the_gpu(impl):
    method, _ = made("published", torch.float32)
    method.vision.impl = method.text.impl = impl
    method.cuda()
    batch = noise_batch(method.architecture, size=3, frames=2).to("cuda")
    method.encode(batch)  # compiles, and starts the libraries
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        method.encode(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
