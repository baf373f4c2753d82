import dataclasses
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from discovla.batch import Embedding
from discovla.config import ConfigError, parse_config
from discovla.data.tokens import Tokenizer, special_ids
from discovla.methods import build
from discovla.methods.released import load_released
from discovla.methods.t2vparser import HEAD_RULES, T2VParser, T2VParserConfig
from discovla.testing import noise_batch, tiny_architecture
from discovla.towers.weights import ModelConfig, clip_names, initialise
from tests.methods.golden_t2vparser import head_parameters, heads, tower_state, towers

RANDOM = ModelConfig(
    architecture=str(Path(__file__).parents[2] / "configs/drawn_clip.json"), pretrained="random"
)
SMALL = {"stan_layers": 2, "views": 3, "decomposition_layers": 1}


def make(**options) -> T2VParser:
    torch.manual_seed(0)
    method = T2VParser(tiny_architecture(), T2VParserConfig(**{**SMALL, **options}))
    initialise(method, method.architecture, 0)
    method.initialise_from_clip()
    method.freeze()
    return method.eval()


def config(**method):
    values = {"directory": "runs/x", "data": {"manifest": "m"}, "method": {"name": "t2vparser", **method}}
    return parse_config(values).method


def padded(frames: int = 4):
    """A batch whose second video has its last frames padded."""
    batch = noise_batch(tiny_architecture(), frames=frames)
    mask = batch.frame_mask.clone()
    mask[1, frames // 2 :] = False
    return dataclasses.replace(batch, frame_mask=mask)


def test_padding_does_not_change_real_embeddings():
    method, batch = make(), padded()
    other = dataclasses.replace(
        batch,
        text_ids=torch.where(batch.text_mask, batch.text_ids, 1),
        frames=torch.where(batch.frame_mask[..., None, None, None], batch.frames, 255 - batch.frames),
    )
    (text, video), (other_text, other_video) = method.encode(batch), method.encode(other)
    assert not torch.equal(video.tokens, other_video.tokens), "padding itself differs"
    assert torch.equal(text.tokens, other_text.tokens), "padded words are not computed"
    for one, two in ((text, other_text), (video, other_video)):
        torch.testing.assert_close(one.tokens[one.mask], two.tokens[two.mask], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(one.pooled, two.pooled, atol=1e-5, rtol=1e-5)
    pairs = [method.encode(batch), method.encode(other)]
    for score in (method.similarity, method.training_logits):
        torch.testing.assert_close(*(score(*pair) for pair in pairs), atol=1e-3, rtol=1e-4)


def test_official_padding_is_seen_by_stack_and_similarity():
    method = make(padding="official")
    batch = noise_batch(method.architecture)
    other = dataclasses.replace(batch, text_ids=torch.where(batch.text_mask, batch.text_ids, 1))
    (one, video), (two, _) = method.encode(batch), method.encode(other)
    views = method.config.views
    assert (one.tokens[:, -views:] - two.tokens[:, -views:]).abs().max() > 1e-4
    assert video.mask is None
    noise = (
        one.tokens.masked_fill(~one.mask[..., None], 0) + torch.randn_like(one.tokens) * ~one.mask[..., None]
    )
    moved = method.training_logits(dataclasses.replace(one, tokens=noise), video)
    assert (moved - method.training_logits(one, video)).abs().max() > 1e-3


def test_masks_are_lengths_not_ids():
    method = make()
    batch = noise_batch(method.architecture)
    ids, mask = batch.text_ids.clone(), torch.ones_like(batch.text_mask)
    ids[:, 3] = 0  # a real piece of a word
    text = method.encode_text(ids, mask)
    assert text.mask.all()


def test_a_caption_longer_than_the_context_is_read_at_its_end_token():
    ids, mask = Tokenizer(8).encode(["a very long caption about a dog that runs after a ball"])
    assert ids[0, -1] == special_ids()[1] and mask.all()
    assert ids.argmax(-1).item() == 7


@pytest.mark.parametrize("frames", [1, 3])
def test_short_clips_work(frames):
    method, batch = make(), noise_batch(tiny_architecture(), frames=frames)
    _, video = method.encode(batch)
    assert video.tokens.shape == (4, frames + 3, 16)
    normalised = method.pixels(
        batch.frames
    )  # three frames of three channels are not mistaken for one another
    same = method.encode_video(normalised, batch.frame_mask)
    torch.testing.assert_close(same.tokens, video.tokens)


@pytest.mark.parametrize(
    ("options", "text_rows", "video_rows"),
    [
        ({}, 12 + 3, 4 + 3),
        ({"concat": True}, 1 + 12 + 3, 1 + 4 + 3),
        ({"concat": True, "concat_local": False}, 1 + 3, 1 + 3),
        ({"concat_local": False, "plus": False}, 3, 3),
    ],
    ids=["local", "global+local", "global", "views"],
)
def test_composition_decides_which_rows_are_compared(options, text_rows, video_rows):
    method, batch = make(**options), padded()
    text, video = method.encode(batch)
    assert text.tokens.shape[1] == text.mask.shape[1] == text_rows
    assert video.tokens.shape[1] == video.mask.shape[1] == video_rows
    losses = method.losses(text, video)
    losses.total.backward()
    assert losses.total.isfinite()


def test_an_empty_caption_or_video_is_refused():
    method, batch = make(), noise_batch(tiny_architecture())
    with pytest.raises(ValueError, match="caption 2: expected at least one entry that is no padding"):
        method.encode_text(batch.text_ids, batch.text_mask & (torch.arange(4) != 2)[:, None])
    with pytest.raises(ValueError, match="video 1: expected at least one entry that is no padding"):
        method.encode_video(batch.frames, batch.frame_mask & (torch.arange(4) != 1)[:, None])


def test_imagenet_statistics_are_the_released_ones():
    white = torch.full((1, 1, 16, 16, 3), 255, dtype=torch.uint8)
    got = make(pixel_statistics="imagenet").pixels(white)[0, 0, :, 0, 0]
    want = [(255 - m) / s for m, s in ((123.675, 58.395), (116.28, 57.12), (103.53, 57.3751))]
    torch.testing.assert_close(got, torch.tensor(want))
    assert not torch.allclose(make().pixels(white)[0, 0, :, 0, 0], got)


def test_groups_are_the_recipes():
    method = make()
    clip, names = set(clip_names(method.architecture)), set(method.trained_state())
    found = {
        name: (group.lr_scale, group.weight_decay)
        for group in method.parameter_groups()
        for name in group.names
    }
    for name in names:
        tower = name in clip
        undecayed = tower and ("bias" in name or ".ln_" in name)
        want = (0.1 if tower else 1.0, 0.0 if undecayed else None)
        assert found.get(name, (1.0, None)) == want, name
    assert "vision.class_embedding" in found and found["vision.class_embedding"][1] is None
    assert "logit_scale.log" not in names


@pytest.mark.parametrize("tune", ["full", "lora", "frozen"])
def test_every_trained_parameter_gets_a_gradient(tune):
    method = make(tune=tune).train()
    for layer in method.stan.layers:
        torch.nn.init.normal_(layer.temporal_fc.weight, std=0.1)
    method.losses(*method.encode(padded())).total.backward()
    lacking = [n for n, p in method.named_parameters() if p.requires_grad and p.grad is None]
    assert not lacking
    assert {n for n, p in method.named_parameters() if p.grad is not None} == set(method.trained_state())


def test_fusion_blocks_and_frame_captions_combine_with_it():
    method = make(fused_vision_blocks=1, fused_text_blocks=1, alpha=0.3, beta=0.5, tune="lora")
    losses = method.losses(*method.encode(padded()))
    assert set(losses.terms) == {"nce", "diversity", "frame", "distill"}
    losses.total.backward()


def test_same_video_negatives_can_be_left_out():
    method, batch = make(exclude_same_video=True), noise_batch(tiny_architecture())
    text, video = method.encode(batch)
    same = torch.eye(4, dtype=torch.bool)
    same[0, 1] = same[1, 0] = True
    kept = method.losses(text, video).terms["nce"]
    assert method.losses(text, video, same_video=same).terms["nce"] < kept


def test_without_stan_the_tower_is_clips():
    method, batch = make(stan_layers=0), noise_batch(tiny_architecture())
    got = method.encode_frames(batch.frames, batch.frame_mask)
    torch.testing.assert_close(got, method.vision(method.pixels(batch.frames)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"similarity": "pooled"}, "method.similarity: .*expected 'tokens'"),
        ({"views": 1}, "method.views: .*greater than or equal to 2"),
        ({"centers": 5}, "method.centers: unknown key"),
        ({"padding": "none"}, "method.padding: .*'masked' or 'official'"),
    ],
)
def test_a_bad_option_is_one_line_that_names_it(options, message):
    with pytest.raises(ConfigError, match=message):
        config(**options)


def test_more_stan_layers_than_the_trunk_has_blocks_are_refused():
    with pytest.raises(ValueError, match=r"method.stan_layers: expected at most 2 layers, found 3"):
        make(stan_layers=3)


# --- released checkpoints


@pytest.mark.parametrize("prefix", ["", "backbone.", "module.model.vision_and_text."])
def test_a_mug_stan_checkpoint_loads_into_both_towers_and_leaves_the_heads(golden, tmp_path, prefix):
    want = towers(golden, torch.float32)
    method = T2VParser(want.architecture, want.config)
    fresh = {n: p.clone() for n, p in method.video_mlp.named_parameters()}
    state = {f"{prefix}{name}": t.contiguous() for name, t in tower_state(golden).items()}
    save_file(
        {**state, f"{prefix}text_model.embeddings.position_ids": torch.arange(3)}, tmp_path / "c.safetensors"
    )
    load_released(method, tmp_path / "c.safetensors")
    for side in ("vision", "text", "stan"):
        for name, value in getattr(want, side).state_dict().items():
            assert torch.equal(getattr(method, side).state_dict()[name], value), name
    assert all(torch.equal(p, fresh[n]) for n, p in method.video_mlp.named_parameters())


def whole_state(golden, method: T2VParser) -> dict:
    """A T2VParser checkpoint in the released form: golden towers and noise for the heads of `method`."""
    state = tower_state(golden)
    for name, parameter in head_parameters(method).items():
        for ours, theirs in HEAD_RULES:
            name = re.sub(ours, theirs, name)
        state[name] = torch.randn(parameter.shape)
    state["multiview_dis.query_tokens"] = state["multiview_dis.query_tokens"][None]
    return state


def whole_method(golden) -> T2VParser:
    stan = towers(golden, torch.float32)
    return T2VParser(stan.architecture, stan.config.model_copy(update={"decomposition_layers": 2}))


def test_a_t2vparser_checkpoint_loads_whole(golden, tmp_path):
    method = whole_method(golden)
    state = whole_state(golden, method)
    save_file({f"module.{n}": t.contiguous() for n, t in state.items()}, tmp_path / "c.safetensors")
    load_released(method, tmp_path / "c.safetensors")
    assert torch.equal(method.decomposition.tokens, state["multiview_dis.query_tokens"][0])
    second = state["multiview_dis.textBlock.cross_attn_layers.1.in_proj_bias"]
    assert torch.equal(method.decomposition.text.layers[1].memory.qkv.bias, second)
    assert torch.equal(method.video_mlp.down.weight, state["video_mlp.net.3.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("layers.0.mlp.fc1.bias"), "missing layers.0.mlp.fc1.bias"),
        (lambda s: s.update(other=torch.zeros(1)), "unexpected other"),
        (lambda s: s.pop("STAN_time_embed.weight"), "named ...STAN_time_embed.weight, found 0"),
        (lambda s: s.pop("multiview_dis.query_tokens"), "named ...multiview_dis.query_tokens, found 0"),
        (
            lambda s: s.update(class_embedding=torch.zeros(7)),
            r"class_embedding: expected \(\d+,\), found \(7,\)",
        ),
    ],
    ids=["missing", "unexpected", "no STAN", "half a head", "shape"],
)
def test_a_checkpoint_that_does_not_fit_is_refused(golden, tmp_path, change, message):
    method = whole_method(golden)
    state = whole_state(golden, method)
    change(state)
    save_file({n: t.contiguous() for n, t in state.items()}, tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match=message):
        load_released(method, tmp_path / "c.safetensors")


def test_a_run_starts_from_the_released_checkpoint_its_config_names(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"c\.bin"):
        build(RANDOM, T2VParserConfig(**SMALL, released=tmp_path / "c.bin"))


def test_spatial_halves_start_from_the_pretrained_trunk():
    method = build(RANDOM, T2VParserConfig(**SMALL, tune="lora"))
    for layer, block in zip(method.stan.layers, method.vision.blocks[-2:], strict=True):
        assert torch.equal(layer.spatial.attention.qkv.weight, block.attention.qkv.weight)
        assert torch.equal(layer.spatial.mlp.up.bias, block.mlp.up.bias)


def test_features_are_float32_in_bf16_compute():
    method, batch = make(), padded()
    method.compute_dtype = torch.bfloat16
    text, video = method.encode(batch)
    assert text.tokens.dtype == video.tokens.dtype == torch.float32
    assert method.losses(text, video).total.isfinite()


def test_views_of_one_input_that_agree_have_the_largest_diversity_loss(golden):
    method = heads(golden, torch.float64)
    same = torch.randn(2, 1, 6, dtype=torch.float64).expand(-1, method.config.views, -1)
    x = Embedding(pooled=same[:, 0], tokens=same)
    assert method.losses(x, x).terms["diversity"].item() == pytest.approx(1, rel=1e-12)
