"""The picture of clips, their reverses and their scores."""

import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.time_picture import FRAME, KINDS, Story, first_clips, share, svg
from discovla.drawn_world.scenes import make_scene
from discovla.methods.clip import CLIP, CLIPConfig
from discovla.testing import tiny_architecture
from discovla.towers.weights import initialise

SVG = "{http://www.w3.org/2000/svg}"


def test_the_clips_are_the_first_with_their_events():
    places = first_clips(0, 200)
    for place, kinds in zip(places, KINDS, strict=True):
        events = [tuple(sorted(a.kind for a in make_scene(0, "test", i).actors)) for i in range(place + 1)]
        assert events.index(kinds) == place
    with pytest.raises(ValueError, match=r"clips: expected one with .*, found none in 1"):
        first_clips(0, 1)


def test_a_story_is_a_strip_of_frames_and_a_bar_before_and_after():
    frames = np.zeros((8, 64, 64, 3), np.uint8)
    made = svg([Story(caption="a < b", frames=frames, before=0.5, after=0.9)])
    root = ElementTree.fromstring(made)
    assert len(root.findall(f"{SVG}image")) == 8
    assert root.findall(f"{SVG}image")[0].get("width") == str(FRAME)
    texts = [text.text for text in root.findall(f"{SVG}text")]
    assert texts == ["a < b", "before", "50 %", "after", "90 %"]
    grey, colour = (float(root.findall(f"{SVG}rect")[i].get("width")) for i in (2, 4))
    assert colour / grey == pytest.approx(0.9 / 0.5, rel=1e-2)


def test_a_blind_method_shares_evenly_between_a_clip_and_its_reverse():
    architecture = replace(tiny_architecture(), vocab_size=49408)
    method = CLIP(architecture, CLIPConfig())
    initialise(method, architecture, seed=0)
    side = architecture.image_size
    frames = torch.randint(0, 256, (1, 3, side, side, 3), dtype=torch.uint8)
    mask = torch.ones(1, 3, dtype=torch.bool)
    assert share(method, "a", [frames, frames.flip(1)], mask) == pytest.approx(0.5, abs=1e-4)
    assert share(method, "a", [frames, torch.zeros_like(frames)], mask) != pytest.approx(0.5, abs=1e-4)
