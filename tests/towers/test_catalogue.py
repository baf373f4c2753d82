"""The list of open_clip's models: sizes and operations are counted, refusals have a reason."""

import json

import open_clip
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.measure import flops
from discovla import cli
from discovla.methods.clip import CLIP, CLIPConfig
from discovla.testing import tiny_towers
from discovla.towers.catalogue import caption_operations, count_parameters, frame_operations, list_models
from discovla.towers.weights import clip_names

TOWERS = tiny_towers()


@pytest.mark.parametrize("tower", TOWERS)
def test_parameters_are_those_of_the_towers(tower):
    method = CLIP(TOWERS[tower], CLIPConfig())
    assert count_parameters(TOWERS[tower]) == sum(p.numel() for p in method.parameters())


@pytest.mark.parametrize("tower", TOWERS)
def test_operations_are_those_that_torch_counts(tower):
    architecture = TOWERS[tower]
    method = CLIP(architecture, CLIPConfig()).eval()
    pixels = torch.zeros(1, 1, 3, architecture.image_size, architecture.image_size)
    rows = architecture.patches + architecture.frames.class_row
    # the fused attention of CPUs is not counted
    method.requires_grad_(False)
    with sdpa_kernel(SDPBackend.MATH):
        counted, last = flops(lambda: method.vision(pixels)), 0
    if architecture.frames.pool == "class":  # whose last block computes one row of queries, output and MLP
        width, mlp = architecture.vision.width, architecture.vision.mlp_width
        products = 3 if architecture.vision.activation == "swiglu" else 2
        last = 2 * (rows - 1) * (2 * width**2 + products * width * mlp + 2 * rows * width)
    assert counted + last == frame_operations(architecture)


@pytest.mark.slow
def test_every_model_is_taken_or_refused_with_a_reason(capsys):
    rows = {row.name: row for row in list_models()}
    assert set(rows) == set(open_clip.list_models())
    taken = [row for row in rows.values() if row.refused is None]
    assert all(row.parameters and row.vision_operations and row.text_operations for row in taken)
    assert rows["RN50"].refused.endswith("a ResNet") and rows["MobileCLIP2-S0"].refused
    assert rows["PE-Core-B-16"].licences == ("Apache-2.0",)
    assert {"PE-Core-bigG-14-448", "ViT-gopt-16-SigLIP2-384", "EVA02-L-14-336", "coca_ViT-L-14"} <= {
        row.name for row in taken
    }
    # sizes that open_clip's table of models gives, in millions
    assert round(rows["ViT-B-32"].parameters / 1e6) == 151
    assert round(rows["ViT-L-14"].parameters / 1e6) == 428


@pytest.mark.slow
def test_the_command_lists_models_by_a_part_of_their_names(capsys):
    assert cli.main(["models", "pe-core", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 5 and all("PE-Core" in row["name"] for row in rows)
    assert cli.main(["models", "PE-Core-B"]) == 0
    assert "448" in capsys.readouterr().out
    assert cli.main(["models", "nothing"]) == 2


def test_names_of_parameters_are_unique():
    for architecture in TOWERS.values():
        names = clip_names(architecture)
        assert len(names) == len(set(names)) and caption_operations(architecture) > 0
