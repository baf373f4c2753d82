"""LoRA in PEFT's format: features are equal under peft with open_clip and with transformers."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from discovla.methods.clip import CLIP, CLIPConfig
from discovla.methods.discovla import DiscoVLA, DiscoVLAConfig
from discovla.peft_format import CONFIG, WEIGHTS, apply_peft, read_peft, write_peft
from discovla.testing import relative_error, tiny_architecture, tiny_towers
from discovla.towers.hugging_face import from_hugging_face, without_prefixes
from discovla.towers.weights import initialise, load_weights
from tests.towers.open_clip_towers import build_theirs, captions, small_config

peft = pytest.importorskip("peft")


def with_lora(architecture, state=None, rank=3) -> CLIP:
    """A CLIP with random LoRA on given weights by open_clip's names, or random ones."""
    torch.manual_seed(0)
    method = CLIP(architecture, CLIPConfig(tune="lora", lora_rank=rank))
    if state is None:
        initialise(method, architecture, 0)
    else:
        load_weights(method, architecture, state)
    method.freeze()
    with torch.no_grad():
        for p in method.trained_state().values():
            p.normal_(0, 0.1)
    return method.eval()


def features(method: CLIP, images: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return method.vision(images[:, None])[:, 0], method.text(ids, None)


@pytest.mark.parametrize("name", ["ViT-S-32-alt", "PE-Core-T-16-384", "EVA02-B-16"])
def test_features_under_peft_and_open_clip_are_equal_and_come_back(name, tmp_path):
    config, architecture = small_config(name, layers=2, side=2)
    theirs = build_theirs(config, architecture=architecture)
    state = {n.removeprefix("text."): t for n, t in theirs.state_dict().items()}
    method = with_lora(architecture, state)
    images = torch.randn(2, 3, architecture.image_size, architecture.image_size)
    ids = captions(architecture)
    write_peft(method, tmp_path, "open_clip", name)
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path).eval().base_model.model
    with torch.no_grad():
        want = adapted.encode_image(images), adapted.encode_text(ids)
    for got, other in zip(features(method, images, ids), want, strict=True):
        assert relative_error(got, other) <= 1e-5
    updates = read_peft(tmp_path, architecture)
    again = with_lora(architecture, state, rank=len(updates["text.blocks.0.attention"][0]))
    apply_peft(again, updates)
    for got, other in zip(features(again, images, ids), features(method, images, ids), strict=True):
        assert relative_error(got, other) <= 1e-5


def test_features_under_peft_and_transformers_are_equal_and_come_back(tmp_path):
    transformers = pytest.importorskip("transformers")
    architecture = tiny_architecture()
    shape = {"hidden_act": "quick_gelu", "projection_dim": 16, "num_hidden_layers": 2}
    vision = {"hidden_size": 32, "intermediate_size": 128, "image_size": 16, "patch_size": 8}
    text = {"hidden_size": 24, "intermediate_size": 96, "vocab_size": 50, "max_position_embeddings": 12}
    torch.manual_seed(1)
    config = transformers.CLIPConfig(
        vision_config={**shape, **vision, "num_attention_heads": 2},
        text_config={**shape, **text, "num_attention_heads": 2, "eos_token_id": 49},
        projection_dim=16,
    )
    model: nn.Module = transformers.CLIPModel(config).eval()
    method = CLIP(architecture, CLIPConfig(tune="lora", lora_rank=3))
    own = {n: p for n, p in method.named_parameters() if ".lora." not in n and "logit_scale" not in n}
    state = {
        n.replace(".embeddings.", ".").replace(".encoder.", ".") if n.startswith("vision_model") else n: t
        for n, t in model.state_dict().items()
    }
    state = without_prefixes(state, ["class_embedding"])
    with torch.no_grad():
        for name, tensor in from_hugging_face(own, (), state).items():
            own[name].copy_(tensor)
        method.freeze()
        for p in method.trained_state().values():
            p.normal_(0, 0.1)
    method.eval()
    images, ids = torch.randn(2, 3, 16, 16), captions(architecture)
    before = features(method, images, ids)
    write_peft(method, tmp_path, "transformers", "tiny")
    adapted = peft.PeftModel.from_pretrained(model, tmp_path).eval().base_model.model
    with torch.no_grad():
        vision_rows = adapted.vision_model(pixel_values=images).pooler_output
        text_rows = adapted.text_model(input_ids=ids).pooler_output
        want = adapted.visual_projection(vision_rows), adapted.text_projection(text_rows)
    for got, other in zip(before, want, strict=True):
        assert relative_error(got, other) <= 1e-5
    updates = read_peft(tmp_path, architecture)
    again = CLIP(architecture, CLIPConfig(tune="lora", lora_rank=9)).eval()
    again.load_state_dict({n: t for n, t in method.state_dict().items() if ".lora." not in n}, strict=False)
    apply_peft(again, updates)
    for got, other in zip(features(again, images, ids), before, strict=True):
        assert relative_error(got, other) <= 1e-5


def test_a_run_with_fusion_is_refused_by_what_it_trains_beside_lora(tmp_path):
    method = DiscoVLA(tiny_architecture(), DiscoVLAConfig(fused_vision_blocks=1, fused_text_blocks=0))
    method.freeze()
    with pytest.raises(ValueError, match=r"trains LoRA alone, found \d+ other parameters, .*\.adapter\."):
        write_peft(method, tmp_path, "open_clip", "x")


def test_transformers_has_no_other_towers(tmp_path):
    with pytest.raises(ValueError, match="expected the towers of a plain CLIP for transformers"):
        write_peft(with_lora(tiny_towers()["pe"]), tmp_path, "transformers", "x")


def test_another_kind_of_adapter_is_refused_by_its_key(tmp_path):
    method = with_lora(tiny_architecture())
    write_peft(method, tmp_path, "open_clip", "x")
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(ValueError, match="use_dora: expected False, found True"):
        read_peft(tmp_path, method.architecture)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    tensors = load_file(tmp_path / WEIGHTS)
    output = next(n for n in tensors if n.endswith("out_proj.lora_B.weight"))
    save_file({**tensors, output: torch.ones_like(tensors[output])}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="expected zeros, since only qkv is updated here"):
        read_peft(tmp_path, method.architecture)
    save_file({**tensors, "base_model.model.visual.conv1.lora_A.weight": torch.ones(1)}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=r"attention projections, found visual\.conv1\.lora_A\.weight"):
        read_peft(tmp_path, method.architecture)
