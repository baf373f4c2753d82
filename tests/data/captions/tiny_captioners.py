"""Captioners of a few thousand random parameters, saved as real ones come."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<image>"]
VISION = [
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|im_start|>",
    "<|im_end|>",
]
WORDS = [*SPECIAL, *VISION, *(f"w{i}" for i in range(53))]
TEMPLATE = (
    "{% for message in messages %}<|im_start|> {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %} {{ part['text'] }}{% endif %}{% endfor %}<|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
SEED, STD = 2, 0.6  # with these the answers depend on the picture
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def coca(folder: Path) -> str:
    """A CoCa of open_clip, as `ARCHITECTURE@WEIGHTS`."""
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
    torch.save(random(open_clip.create_model("tiny_coca")).state_dict(), folder / "coca.pt")
    return f"{path}@{folder / 'coca.pt'}"


def blip2(folder: Path) -> str:
    """A BLIP-2 with an OPT."""
    import transformers  # pyright: ignore[reportMissingImports]

    text = SMALL | {"model_type": "opt", "vocab_size": len(WORDS), "ffn_dim": 32, "word_embed_proj_dim": 32}
    ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64}
    config = transformers.Blip2Config(
        vision_config=SMALL | {"intermediate_size": 32, "image_size": 32, "patch_size": 16},
        qformer_config=SMALL
        | {
            "intermediate_size": 32,
            "vocab_size": 64,
            "encoder_hidden_size": 32,
            "cross_attention_frequency": 1,
        },
        text_config=text | ids,
        num_query_tokens=4,
        image_token_index=WORDS.index("<image>"),
    )
    pictures = transformers.BlipImageProcessor(size={"height": 32, "width": 32})
    processor = transformers.Blip2Processor(pictures, tokenizer(), num_query_tokens=4)
    return saved(folder, transformers.Blip2ForConditionalGeneration(config), processor)


def qwen2_vl(folder: Path) -> str:
    """A Qwen2-VL, which is asked in a chat."""
    import transformers  # pyright: ignore[reportMissingImports]

    rope = {"type": "mrope", "mrope_section": [2, 3, 3]}
    text = SMALL | {"intermediate_size": 32, "num_key_value_heads": 2, "vocab_size": len(WORDS)}
    ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 512}
    sizes = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 14, "mlp_ratio": 2}
    start, end, image, video = (WORDS.index(word) for word in VISION[:4])
    config = transformers.Qwen2VLConfig(
        text_config=text | ids | {"rope_scaling": rope},
        vision_config=sizes,
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    processor = transformers.Qwen2VLProcessor(
        transformers.Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=56 * 56),
        tokenizer(additional_special_tokens=VISION),
        transformers.Qwen2VLVideoProcessor(),
        chat_template=TEMPLATE,
    )
    return saved(folder, transformers.Qwen2VLForConditionalGeneration(config), processor)


def tokenizer(**options: Any) -> Any:
    """Words as they are."""
    import transformers  # pyright: ignore[reportMissingImports]
    from tokenizers import Tokenizer, models, pre_tokenizers  # pyright: ignore[reportMissingImports]

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, **ends, **options)


def random(model: nn.Module) -> Any:
    """A model with parameters far enough from 0 for its answers to depend on the picture."""
    generator = torch.Generator().manual_seed(SEED)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=STD, generator=generator)
    return model


def saved(folder: Path, model: Any, processor: Any) -> str:
    """The folder of a model and its processor."""
    random(model).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)
