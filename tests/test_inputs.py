"""Frames and captions have to be prepared as the towers need them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
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


@pytest.mark.parametrize("resize", ["squash", "shortest"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_pixels_are_those_of_open_clips_transform(resize, interpolation):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 80, 3), dtype=np.uint8))
    options = {"mean": (0.5, 0.4, 0.3), "std": (0.5, 0.6, 0.7)}
    settings = PreprocessCfg(size=32, resize_mode=resize, interpolation=interpolation, **options)
    want = image_transform_v2(settings, is_train=False)(image)
    frame = torch.from_numpy(resize_and_crop(image, 32, resize, interpolation).copy())
    got = preprocess_frames(frame[None, None], **options)[0, 0]
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
