"""The temporal basis: a clip and its reverse get different features, and the start is mean pooling."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from discovla.methods.base import reverse_frames
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


ORDER = {"reversed_negatives": 0.5, "swapped_captions": 0.25}
TELLS = torch.tensor([True, False, True, True])
HAS_FALSE = torch.tensor([False, True, True, False])


def order_batch():
    """Four clips of four frames, of which one has two; the exchanges are other captions."""
    data = batch()
    mask = data.frame_mask.clone()
    mask[1, 2:] = False
    ids, seen = data.text_ids.roll(1, 0), data.text_mask.roll(1, 0)
    return replace(
        data,
        frame_mask=mask,
        tells_order=TELLS,
        false_text_ids=torch.where(HAS_FALSE[:, None], ids, data.text_ids),
        false_text_mask=torch.where(HAS_FALSE[:, None], seen, data.text_mask),
        has_false_text=HAS_FALSE,
    )


def backwards(data):
    rows = torch.tensor([[3, 2, 1, 0], [1, 0, 2, 3], [3, 2, 1, 0], [3, 2, 1, 0]])
    return replace(data, frames=data.frames[torch.arange(4)[:, None], rows])


@pytest.mark.parametrize("when", ["order_words", "always"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_order_losses_are_their_formula(variant, when):
    """Scores of whole matrices, with the reverses encoded by themselves, give the same losses."""
    method = make(variant, temporal="basis", mask_padded_frames=True, reversed_when=when, **ORDER)
    torch.nn.init.normal_(method.temporal.weight, std=0.3)
    method, data = method.double().eval(), order_batch()
    method.compute_dtype = torch.float64
    got = method.losses(*method.encode(data))
    video, reverse = method.encode_videos(data), method.encode_videos(backwards(data))
    text = method.encode_text(data.text_ids, data.text_mask)
    false = method.encode_text(data.false_text_ids, data.false_text_mask)
    true = method.similarity(text, video).diagonal()
    wrong = F.softplus(method.similarity(text, reverse).diagonal() - true)
    counted = TELLS if when == "order_words" else torch.ones(4)
    torch.testing.assert_close(got.terms["reversed"], (wrong * counted).sum() / 4, rtol=1e-11, atol=1e-12)
    wrong = F.softplus(method.similarity(false, video).diagonal() - true)
    torch.testing.assert_close(got.terms["swapped"], (wrong * HAS_FALSE).sum() / 4, rtol=1e-11, atol=1e-12)
    plain = make(variant, temporal="basis", mask_padded_frames=True).double().eval()
    plain.compute_dtype = torch.float64
    plain.load_state_dict(method.state_dict())
    total = (
        plain.losses(*plain.encode(data)).total + 0.5 * got.terms["reversed"] + 0.25 * got.terms["swapped"]
    )
    torch.testing.assert_close(got.total, total, rtol=1e-11, atol=1e-12)


def test_clips_are_encoded_once():
    method, data = make("clip", temporal="basis", **ORDER), order_batch()
    calls = []
    method.vision.register_forward_hook(lambda *_: calls.append(1))
    method.encode_videos(data)
    assert len(calls) == 1


def test_reversed_clips_are_encoded_again_from_the_first_block_that_sees_order():
    method = make("clip", fused_vision_blocks=1, frame_position=True, **ORDER)
    calls = []
    for number, block in enumerate(method.vision.blocks):
        block.register_forward_hook(lambda *_, number=number: calls.append(number))
    torch.nn.init.normal_(method.vision.blocks[-1].attention.frame_position)
    video, last = method.encode_videos(order_batch()), len(method.vision.blocks) - 1
    assert sorted(calls) == [*range(last), last, last]
    reverse = method.encode_videos(backwards(order_batch()))
    torch.testing.assert_close(video.false.pooled, reverse.pooled)
    assert not torch.allclose(video.pooled, reverse.pooled, rtol=1e-3)


def test_a_batch_without_exchanges_has_no_loss_of_them():
    method, data = (
        make("clip", **ORDER),
        replace(order_batch(), has_false_text=torch.zeros(4, dtype=torch.bool)),
    )
    losses = method.losses(*method.encode(data))
    assert losses.terms["swapped"] == 0


@pytest.mark.parametrize("own", [0, 1, 4])
def test_processes_with_fewer_readable_clips_read_the_logit_scale_as_often(own, monkeypatch):
    """Stage 3 gathers it at each call; 5 pairs in blocks of two are three calls for a rank of any size."""
    monkeypatch.setattr("discovla.methods.base.PAIRS", 2)
    method, data = make("clip", similarity="tokens", **ORDER).double().eval(), order_batch()
    method.compute_dtype = torch.float64
    text, video = method.encode(data)
    calls, rows = [], slice(0, own)
    method.logit_scale.register_forward_hook(lambda *_: calls.append(1))
    scores = method.pair_scores(text[rows], video[rows], 5)
    assert len(calls) == 3
    torch.testing.assert_close(scores, method.similarity(text, video).diagonal()[rows], rtol=1e-12, atol=0)


def test_a_blind_method_cannot_lower_the_loss_of_reversed_clips():
    """Without places a clip and its reverse score alike: the loss is log 2 for each caption that counts."""
    method, data = make("clip", **ORDER).double().eval(), order_batch()
    method.compute_dtype = torch.float64
    losses = method.losses(*method.encode(data))
    assert losses.terms["reversed"].item() == pytest.approx(math.log(2) * 3 / 4, rel=1e-12)


def test_real_frames_are_reversed_wherever_they_are():
    frames = torch.arange(10).view(2, 5)
    mask = torch.tensor([[True, True, True, False, False], [False, True, False, True, True]])
    assert reverse_frames(frames, mask).tolist() == [[2, 1, 0, 3, 4], [5, 9, 7, 8, 6]]


def test_the_recipe_trains_places_of_words_but_not_their_embeddings():
    names = set(make("clip", name="basis").trained_state())
    assert {"temporal.weight", "text.position_embedding", "text.projection"} <= names
    assert "text.token_embedding.weight" not in names
    assert not any(name.startswith("vision.") for name in names)
    assert "text.position_embedding" not in set(make("clip", name="basis", tune="frozen").trained_state())


def test_tuning_the_text_tower_leaves_vision_and_scale_frozen():
    method = make("clip", tune="text", freeze_embeddings=True)
    names = set(method.trained_state())
    assert "text.blocks.0.attention.qkv.weight" in names and "text.token_embedding.weight" not in names
    assert all(name.startswith("text.") for name in names)
    assert method.frozen_frames and not make("clip").frozen_frames
