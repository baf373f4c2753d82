import pytest
import torch

from discovla.ops.preprocess_frames import CLIP_MEAN, CLIP_STD, preprocess_frames


def test_bytes_become_normalised_channels_first_pixels():
    frames = torch.randint(0, 256, (2, 3, 4, 5, 3), dtype=torch.uint8)
    got = preprocess_frames(frames, dtype=torch.float64)
    assert got.shape == (2, 3, 3, 4, 5)
    for c in range(3):
        want = (frames[..., c].double() / 255 - CLIP_MEAN[c]) / CLIP_STD[c]
        torch.testing.assert_close(got[:, :, c], want, atol=1e-12, rtol=1e-12)


def test_normalised_frames_pass_unchanged():
    frames = torch.randn(1, 2, 3, 4, 4)
    assert preprocess_frames(frames) is frames


def test_another_integer_type_is_refused():
    with pytest.raises(ValueError, match=r"frames: expected uint8 .*found torch\.int64"):
        preprocess_frames(torch.zeros(1, 1, 2, 2, 3, dtype=torch.int64))
