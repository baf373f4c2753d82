"""Operations of frozen towers, and equality of their counts with torch's, in small."""

from dataclasses import replace

import pytest
import torch

from benchmarks import frozen_features
from benchmarks.frozen_features import CLIPS, Sizes, frame_flops, tower_flops
from benchmarks.measure import flops
from discovla.testing import tiny_architecture
from discovla.towers.vision import VisionTower


def test_the_operations_of_a_frame_are_those_that_torch_counts():
    architecture = tiny_architecture()
    tower, shape = VisionTower(architecture), architecture.vision
    tower.requires_grad_(False)
    side = architecture.image_size
    sizes = Sizes(
        vision=(shape.width, shape.layers, shape.mlp_width),
        text=(1, 1, 1),
        tokens=1 + architecture.patches,
        patch=architecture.patch_size,
        embed_dim=architecture.embed_dim,
    )
    frame = torch.zeros(1, 1, side, side, 3, dtype=torch.uint8)
    counted = flops(lambda: tower(tower.pixels(frame, dtype=torch.float32), None))
    # the last block computes keys and values of all tokens, everything else of the one that is read
    width, tokens = shape.width, sizes.tokens
    read = 2 * (tokens - 1) * (2 * width**2 + 2 * width * shape.mlp_width) + 4 * tokens * (tokens - 1) * width
    assert counted == pytest.approx(frame_flops(sizes) - read, rel=0.02)


def test_a_tower_with_twice_the_layers_has_twice_the_operations():
    width, layers, mlp = CLIPS["ViT-B/32"].vision
    assert tower_flops((width, 2 * layers, mlp), 50) == 2 * tower_flops((width, layers, mlp), 50)
    vit = CLIPS["ViT-B/32"]
    assert frame_flops(replace(vit, pooling=50)) > frame_flops(vit)


def test_operations_are_of_the_four_clips_and_add_up():
    rows = list(frozen_features.operations())
    assert [row["name"] for row in rows] == list(CLIPS)
    for row in rows:
        assert row["from_frames_gflop"] == pytest.approx(row["once_gflop"] + row["from_features_gflop"])
