"""A CoCa with a few thousand random parameters."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

SEED, STD = 2, 0.6  # with these, captions depend on the picture


def tiny_coca(folder: Path) -> str:
    """Write a CoCa of open_clip and return its name, `ARCHITECTURE@WEIGHTS`."""
    import open_clip

    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 1}
    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
    config = {
        "embed_dim": 32,
        "vision_cfg": vision | {"attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True},
        "text_cfg": text | {"embed_cls": True, "output_tokens": True},
        "multimodal_cfg": text | {"attn_pooler_heads": 4},
        "custom_text": True,
    }
    path = folder / "tiny_coca.json"
    path.write_text(json.dumps(config))
    open_clip.add_model_config(path)
    model = open_clip.create_model("tiny_coca")
    generator = torch.Generator().manual_seed(SEED)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=STD, generator=generator)
    torch.save(model.state_dict(), folder / "coca.pt")
    return f"{path}@{folder / 'coca.pt'}"
