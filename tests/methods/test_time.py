"""The temporal basis: a clip and its reverse get different features, and the start is mean pooling."""

import math

import pytest
import torch

from discovla.nn.temporal_heads import TemporalBasis
from tests.methods.test_composition import VARIANTS, batch, make


def basis(terms: int = 4, width: int = 8) -> TemporalBasis:
    made = TemporalBasis(width, terms).double()
    torch.manual_seed(1)
    torch.nn.init.normal_(made.weight, std=0.5)
    return made


def frames(*lengths: int, count: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(2)
    mask = torch.arange(count) < torch.tensor(lengths)[:, None]
    return torch.randn(len(lengths), count, 8, dtype=torch.float64), mask


def test_the_basis_is_its_formula():
    head, (x, mask) = basis(), frames(6, 4)
    out = head(x, mask)
    for b, length in enumerate((6, 4)):
        for t in range(length):
            expected = x[b, t].clone()
            for k in range(1, 5):
                wave = math.sqrt(2) * math.cos(math.pi * k * (t + 0.5) / length)
                expected += wave * head.weight[k - 1] @ x[b, t]
            torch.testing.assert_close(out[b, t], expected, rtol=1e-13, atol=1e-13)


def test_padding_changes_no_real_frame_and_stays_as_it_is():
    head, (x, mask) = basis(), frames(3)
    other = torch.where(mask[..., None], x, torch.randn_like(x))
    assert torch.equal(head(x, mask)[mask], head(other, mask)[mask])
    torch.testing.assert_close(head(x, mask)[:, :3], head(x[:, :3], mask[:, :3]))
    assert torch.equal(head(other, mask)[~mask], other[~mask])


def test_odd_terms_tell_the_direction_and_even_ones_do_not():
    head, (x, mask) = basis(), frames(6)
    with torch.no_grad():
        head.weight[::2] = 0
    torch.testing.assert_close(head(x.flip(1), mask).flip(1), head(x, mask))
    torch.nn.init.normal_(head.weight)
    assert not torch.allclose(head(x.flip(1), mask).flip(1), head(x, mask))


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_untrained_basis_changes_no_method(variant):
    plain, timed = make(variant), make(variant, temporal="basis")
    timed.load_state_dict({**timed.state_dict(), **plain.state_dict()})
    data = batch()
    for got, want in zip(timed.eval().encode(data), plain.eval().encode(data), strict=True):
        for name, tensor in want.tensors().items():
            torch.testing.assert_close(got.tensors()[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_method_trains_the_basis_and_then_knows_a_clip_from_its_reverse(variant):
    method, data = make(variant, temporal="basis", tune="frozen").eval(), batch()
    method.losses(*method.encode(data)).total.backward()
    assert method.temporal is not None
    gradient = method.temporal.weight.grad
    assert gradient is not None and gradient.abs().amax((1, 2)).min() > 0
    torch.nn.init.normal_(method.temporal.weight, std=0.3)
    seen, back = (method.encode_video(x, data.frame_mask) for x in (data.frames, data.frames.flip(1)))
    assert not torch.allclose(seen.pooled, back.pooled, rtol=1e-3)


def test_alignment_compares_frames_without_their_place():
    method, data = make("clip", temporal="basis", alpha=0.3), batch()
    assert method.temporal is not None
    torch.nn.init.normal_(method.temporal.weight)
    video = method.encode_videos(data)
    torch.testing.assert_close(video.frames, method.encode_frames(data.frames, data.frame_mask))


def test_a_checkpoint_from_before_the_option_still_fits_the_method():
    assert "temporal" not in make("clip").fingerprint()["method"]
    assert make("clip", temporal="basis").fingerprint()["method"]["temporal"] == "basis"
