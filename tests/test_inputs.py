"""Frames and captions have to be prepared as the towers need them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image, ImageDraw
from timm.layers import resample_abs_pos_embed

from discovla.config import read_config
from discovla.data.config import DataConfig
from discovla.data.video.frames import resize_and_crop
from discovla.inputs import check_inputs, tower_inputs
from discovla.methods import METHODS
from discovla.methods.clip import CLIP, CLIPConfig
from discovla.ops.preprocess_frames import preprocess_frames
from discovla.testing import tiny_towers
from discovla.towers.architecture import Architecture, Preprocessing
from discovla.towers.configs import architecture_from_config
from discovla.towers.weights import (
    Pretrained,
    initialise,
    load_weights,
    openai_weights,
    preprocessing,
    resized,
)


def data(architecture: Architecture, **changes) -> DataConfig:
    return DataConfig.model_validate({"manifest": Path(), **tower_inputs(architecture), **changes})


def siglip() -> Architecture:
    return architecture_from_config("ViT-B-16-SigLIP2", open_clip.get_model_config("ViT-B-16-SigLIP2"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_length": 65}, "data.context_length: expected at most 64, found 65"),
        ({"context_length": 32}, "data.context_length: expected 64, since this text tower reads padding"),
        ({"tokenizer": "clip"}, "data.tokenizer: expected 'gemma' for these towers, found 'clip'"),
        ({"resize": "squash"}, "data.resize: expected 'shortest' for these towers, found 'squash'"),
        ({"interpolation": "bilinear"}, "data.interpolation: expected 'bicubic'"),
    ],
)
def test_other_inputs_are_refused_by_their_option(changes, message):
    architecture = siglip()
    check_inputs(architecture, data(architecture))
    with pytest.raises(ValueError, match=message):
        check_inputs(architecture, data(architecture, **changes))


@pytest.mark.parametrize(
    "path",
    sorted((Path(__file__).parents[1] / "configs").glob("discovla_*_msrvtt.toml")),
    ids=lambda p: p.stem,
)
def test_recipes_of_other_towers_prepare_data_for_them(path):
    config = read_config(path)
    name = config.model.architecture
    architecture = architecture_from_config(name, open_clip.get_model_config(name))
    architecture = replace(architecture, preprocessing=preprocessing(name, config.model.pretrained))
    check_inputs(architecture, config.data)
    with torch.device("meta"):
        method = METHODS[config.method.name](architecture, config.method)
    method.check_loss()
    method.freeze()


@pytest.mark.parametrize(
    ("name", "resize", "interpolation", "mean"),
    [
        ("PE-Core-B-16", "squash", "bilinear", 0.5),
        ("ViT-B-16-SigLIP2", "squash", "bicubic", 0.5),
        ("MobileCLIP2-B", "shortest", "bilinear", 0.0),
        ("EVA02-B-16", "shortest", "bicubic", 0.48145466),
        ("ViT-H-14-worldwide-378", "squash", "bicubic", 0.48145466),
    ],
)
def test_preprocessing_is_that_of_open_clips_weights(name, resize, interpolation, mean):
    found = preprocessing(name)
    assert (found.resize, found.interpolation, found.mean[0]) == (resize, interpolation, mean)


def kinds_of_preprocessing() -> dict[Preprocessing, tuple[str, str]]:
    """One model and tag of open_clip for each kind of preprocessing that its weights name."""
    pairs = [(name, tag) for name in open_clip.list_models() for tag in list_pretrained_tags_by_model(name)]
    return {preprocessing(*pair): pair for pair in reversed(pairs)}


@pytest.mark.parametrize("kind", kinds_of_preprocessing().items(), ids=lambda kind: "@".join(kind[1]))
def test_pixels_are_those_of_open_clips_transform(kind):
    ours, pair = kind
    settings = {k: get_pretrained_cfg(*pair)[k] for k in ("mean", "std", "resize_mode", "interpolation")}
    transform = image_transform_v2(PreprocessCfg(size=32, **settings), is_train=False)
    rng = np.random.default_rng(0)
    for size in [(80, 50), (37, 91), (33, 32), (32, 57), (19, 23), (320, 181), (32, 32)]:
        image = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
        ImageDraw.Draw(image).ellipse((3, 5, size[0] - 4, size[1] - 3), fill="orange", outline="blue")
        want = transform(image)
        frame = torch.from_numpy(resize_and_crop(image, 32, ours.resize, ours.interpolation).copy())
        mean, std = (torch.tensor(x)[:, None, None] for x in (ours.mean, ours.std))
        pixels = ((want * std + mean) * 255).round().permute(1, 2, 0)
        assert torch.equal(frame.float(), pixels), size  # the bytes are equal
        # one multiplication and addition for a division, a subtraction and a division, in float32
        got = preprocess_frames(frame[None, None], mean=ours.mean, std=ours.std)[0, 0]
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_a_tower_normalises_with_its_own_statistics():
    own = Preprocessing(mean=(0.5,) * 3, std=(0.25,) * 3)
    method = CLIP(replace(tiny_towers()["clip"], preprocessing=own), CLIPConfig())
    frames = torch.full((1, 1, 16, 16, 3), 255, dtype=torch.uint8)
    torch.testing.assert_close(method.pixels(frames), torch.full((1, 1, 3, 16, 16), 2.0))


@pytest.mark.parametrize(("tower", "size"), [("clip", 40), ("siglip", 24), ("pe", 32)])
def test_positions_at_another_size_are_those_of_timm(tower, size):
    architecture = tiny_towers()[tower]
    method = CLIP(architecture, CLIPConfig())
    initialise(method, architecture, 0)
    weights = openai_weights(method, architecture)
    larger = resized(Pretrained(architecture=architecture, weights=weights), size)
    side, prefix = size // architecture.patch_size, int(architecture.frames.class_row)
    assert larger.architecture.side == side
    table = method.vision.position_embedding.detach()
    want = resample_abs_pos_embed(table[None], new_size=[side, side], num_prefix_tokens=prefix)[0]
    other = CLIP(larger.architecture, CLIPConfig())
    load_weights(other, larger.architecture, larger.weights)
    torch.testing.assert_close(other.vision.position_embedding.detach(), want, rtol=0, atol=1e-7)
    frames = torch.zeros(1, 2, size, size, 3, dtype=torch.uint8)
    assert other.encode_video(frames, torch.ones(1, 2, dtype=torch.bool)).pooled.isfinite().all()
