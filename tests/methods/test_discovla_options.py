"""Options, exports, parameter counts and padding of DiscoVLA, which the golden files do not cover."""

import dataclasses

import open_clip
import pytest
import torch

from discovla.batch import Batch
from discovla.methods.clip import CLIP, CLIPConfig
from discovla.methods.discovla import DiscoVLA, DiscoVLAConfig
from discovla.testing import noise_batch, relative_error, tiny_architecture
from discovla.towers.configs import architecture_from_config
from discovla.towers.weights import initialise, load_weights


def tiny(seed: int = 0, **options) -> DiscoVLA:
    """A small model whose trained parameters have moved off their start."""
    config = DiscoVLAConfig(**{"fused_vision_blocks": 1, "fused_text_blocks": 1, "lora_rank": 3, **options})
    model = DiscoVLA(tiny_architecture(), config)
    initialise(model, model.architecture, seed)
    model.freeze()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in model.trained_state().values():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return model


def padded(batch: Batch, real: int, *, noise: int) -> Batch:
    """The batch with frames after `real` masked, their pixels drawn from a seed."""
    mask = batch.frame_mask.clone()
    mask[:, real:] = False
    frames = batch.frames.clone()
    generator = torch.Generator().manual_seed(noise)
    shape = frames[:, real:].shape
    frames[:, real:] = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return dataclasses.replace(batch, frames=frames, frame_mask=mask)


def test_the_published_counts_of_trained_parameters():
    for name in ("ViT-B-32-quickgelu", "ViT-B-16-quickgelu"):
        config = open_clip.get_model_config(name)
        assert config is not None
        with torch.device("meta"):
            model = DiscoVLA(architecture_from_config(name, config), DiscoVLAConfig())
        model.freeze()
        assert sum(p.numel() for p in model.trained_state().values()) == 561_200
        assert len(model.trained_state()) == 72


def test_padded_frames_reach_the_video_as_published_and_not_where_masked():
    batch = noise_batch(tiny_architecture())
    first, other = padded(batch, 2, noise=1), padded(batch, 2, noise=2)

    def videos(model, b):
        return model.encode_video(b.frames, b.frame_mask).pooled

    published, repaired = tiny(), tiny(mask_padded_frames=True)
    assert relative_error(videos(published, first), videos(published, other)) > 1e-4
    assert torch.equal(videos(repaired, first), videos(repaired, other))


def test_padded_frames_do_not_reach_the_loss_where_masked():
    batch = noise_batch(tiny_architecture())
    model = tiny(mask_padded_frames=True)
    losses = [model.losses(*model.encode(padded(batch, 2, noise=n))).total for n in (1, 2)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)


def test_a_reversed_clip_has_the_same_feature():
    # the method has no frame position anywhere: it is blind to order, exactly
    batch = noise_batch(tiny_architecture(), frames=5)
    model = tiny().double()
    model.compute_dtype = torch.float64
    forward = model.encode_video(batch.frames, batch.frame_mask).pooled
    backward = model.encode_video(batch.frames.flip(1), batch.frame_mask).pooled
    torch.testing.assert_close(forward, backward, atol=1e-12, rtol=1e-12)


def test_without_training_and_fusion_it_is_clip_with_mean_pooling():
    batch = noise_batch(tiny_architecture())
    model = DiscoVLA(tiny_architecture(), DiscoVLAConfig(fused_vision_blocks=0, fused_text_blocks=0))
    plain = CLIP(tiny_architecture(), CLIPConfig())
    for m in (model, plain):
        initialise(m, m.architecture, 0)
    a, b = (m.encode_video(batch.frames, batch.frame_mask).pooled for m in (model, plain))
    assert relative_error(a, b) <= 1e-6
    a, b = (m.encode_text(batch.text_ids, batch.text_mask).pooled for m in (model, plain))
    assert relative_error(a, b) <= 1e-6


def test_without_alignment_no_frame_captions_are_needed():
    batch = dataclasses.replace(noise_batch(tiny_architecture()), frame_text_ids=None, frame_text_mask=None)
    model = tiny(alpha=0, beta=0)
    assert not model.needs_frame_captions
    assert set(model.losses(*model.encode(batch)).terms) == {"video"}
    with pytest.raises(ValueError, match="batch: expected frame captions"):
        tiny().encode(batch)


def test_same_video_captions_are_no_negatives_where_excluded():
    batch = noise_batch(tiny_architecture())
    same = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 1]], dtype=torch.bool)
    for options, differs in (({}, False), ({"exclude_same_video": True}, True)):
        model = tiny(**options)
        encoded = model.encode(batch)
        a, b = (model.losses(*encoded, same_video=s).total.item() for s in (None, same))
        assert (a != b) == differs


def test_more_fused_blocks_than_layers_is_an_error():
    with pytest.raises(ValueError, match="expected at most 2 fused blocks, found 3"):
        tiny(fused_vision_blocks=3)


def test_the_merged_text_tower_is_open_clips_and_the_vision_tower_is_ours():
    model = tiny()
    a = model.architecture
    merged = model.plain_weights()
    reference = open_clip.CLIP(
        embed_dim=a.embed_dim,
        quick_gelu=True,
        vision_cfg={
            "image_size": a.image_size,
            "patch_size": a.patch_size,
            "width": 32,
            "layers": 2,
            "head_width": 16,
        },
        text_cfg={
            "context_length": a.context_length,
            "vocab_size": a.vocab_size,
            "width": 24,
            "heads": 2,
            "layers": 2,
        },
    )
    reference.load_state_dict(merged)
    batch = noise_batch(a)
    text = model.encode_text(batch.text_ids, batch.text_mask).pooled
    assert relative_error(text, reference.encode_text(batch.text_ids)) <= 1e-5
    again = DiscoVLA(a, model.config)  # merged weights, LoRA at zero, the trained adapters
    load_weights(again, a, merged)
    again.freeze()
    trained = model.trained_state()
    again.load_trained_state({n: t * 0 if ".lora." in n else t for n, t in trained.items()})
    video, other = (m.encode_video(batch.frames, batch.frame_mask).pooled for m in (model, again))
    assert relative_error(video, other) <= 1e-5


def test_a_checkpoint_of_another_shape_is_named():
    state = tiny().trained_state()
    with pytest.raises(
        ValueError, match=r"vision\.blocks\.0\.attention\.lora\.a: expected \(4, 32\), found \(3, 32\)"
    ):
        tiny(lora_rank=4).load_trained_state(state)
    with pytest.raises(
        ValueError, match=r"expected parameter vision\.blocks\.0\.attention\.lora\.a, found none"
    ):
        tiny().load_trained_state({})


def test_bf16_towers_give_float32_features_near_the_float32_ones():
    batch = noise_batch(tiny_architecture())
    model = tiny()
    exact = model.encode_video(batch.frames, batch.frame_mask).pooled
    model.compute_dtype = torch.bfloat16
    rough = model.encode_video(batch.frames, batch.frame_mask).pooled
    assert rough.dtype == torch.float32
    assert 0 < relative_error(rough, exact) < 0.05
