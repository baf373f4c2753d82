"""Models that say what is in a picture: open_clip's CoCa and those of Hugging Face, in this process."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from discovla import torchvision_cpu

PROMPT = "Describe this picture in one short sentence."  # to models that take instructions
_COCA_START, _COCA_END = 49406, 49407


@dataclass(frozen=True, kw_only=True)
class Failed:
    """Why a picture got no caption."""

    reason: str


class Captioner(Protocol):
    """Says what is in pictures.

    identity: model, weights and how it is asked: all that its captions depend on but the picture.
    """

    identity: str

    def __call__(self, images: Sequence[np.ndarray]) -> list[str | Failed]:
        """A caption of each picture, uint8 RGB y x 3, or why it got none."""
        ...


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How a model is asked.

    prompt: None for the model's own way.  max_tokens: of a caption.  device: of a model in this process.
    """

    prompt: str | None = None
    max_tokens: int = 30
    device: str = "cpu"


class CoCaCaptioner:
    """A CoCa model of open_clip, decoded greedily.

    Args:
        name: `ARCHITECTURE@WEIGHTS`; a name open_clip knows or a JSON file of the same form, and an open_clip
            tag or a file.
        asking: without a prompt, which CoCa does not take.

    Raises:
        ValueError: there is no such model, or it is no CoCa, or it takes no prompt.
    """

    def __init__(self, name: str, asking: Asking) -> None:
        architecture, _, weights = name.partition("@")
        if not weights:
            raise ValueError(f"--model coca:{name}: expected coca:ARCHITECTURE@WEIGHTS, found no weights")
        if asking.prompt is not None:
            raise ValueError("--prompt: expected none with a CoCa model, which takes none")
        torchvision_cpu.install()
        import open_clip  # takes seconds, and only those who ask for CoCa need it

        if architecture.endswith(".json"):
            open_clip.add_model_config(architecture)
        known = Path(architecture).stem if architecture.endswith(".json") else architecture
        if open_clip.get_model_config(known) is None:
            raise ValueError(f"--model coca:{name}: expected an architecture open_clip knows, found {known}")
        try:
            made: Any = open_clip.create_model_and_transforms(known, pretrained=weights, device=asking.device)
        except (RuntimeError, OSError) as error:
            raise ValueError(f"--model coca:{name}: its weights do not load: {_first_line(error)}") from error
        self.model, self._prepare = made[0].eval(), made[2]
        if not isinstance(self.model, open_clip.CoCa):
            raise ValueError(f"--model coca:{name}: expected a CoCa model, found {type(self.model).__name__}")
        self.asking = asking
        self._tokenizer: Any = open_clip.get_tokenizer(known)
        length = min(asking.max_tokens + 1, self.model.context_length - 1)  # with the start
        self._length = length
        self.identity = f"coca {name} {_state(weights)} {_state(architecture)} {length}"

    @torch.inference_mode()
    def __call__(self, images: Sequence[np.ndarray]) -> list[str | Failed]:
        """A caption of each picture: at each step the likeliest token, until the end."""
        pixels = torch.stack([self._prepare(Image.fromarray(image)) for image in images])  # b c y x
        seen = self.model(pixels.to(self.asking.device))
        ids = torch.full((len(images), 1), _COCA_START, device=self.asking.device)  # b l
        done = torch.zeros(len(images), dtype=torch.bool, device=self.asking.device)
        while ids.shape[1] < self._length and not done.all():
            out = self.model(
                None,
                ids,
                image_latent=seen["image_features"],
                image_embs=seen["image_embs"],
                output_labels=False,
            )
            chosen = out["logits"][:, ids.shape[1] - 1].argmax(-1).masked_fill(done, self.model.pad_id)
            done |= chosen == _COCA_END
            ids = torch.cat([ids, chosen[:, None]], 1)
        return [said(self._text(row)) for row in ids.tolist()]

    def _text(self, ids: list[int]) -> str:
        """The words between start and end."""
        end = ids.index(_COCA_END) if _COCA_END in ids else len(ids)
        return self._tokenizer.decode([i for i in ids[1:end] if i != self.model.pad_id])


class HuggingFaceCaptioner:
    """A model of `transformers` that takes a picture and gives text: BLIP-2, Florence-2, Qwen-VL and others.

    A model with a chat template is asked in it, Florence-2 by its task, another by the prompt's text, which
    its answer continues.  Code that comes with weights is not run.

    Args:
        name: a repository of the Hub, or a folder.
        asking: of tokens, the likeliest each.

    Raises:
        ValueError: `transformers` is not installed, or there is no such model.
    """

    def __init__(self, name: str, asking: Asking) -> None:
        torchvision_cpu.install()
        try:
            import transformers  # an extra  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ValueError(
                f"--model hf:{name}: expected transformers (pip install 'discovla[captions]'), {error}"
            ) from error
        dtype = torch.bfloat16 if torch.device(asking.device).type == "cuda" else torch.float32
        try:
            self.processor = transformers.AutoProcessor.from_pretrained(name)
            self.model: Any = transformers.AutoModelForImageTextToText.from_pretrained(name, dtype=dtype)
        except (OSError, ValueError, ImportError) as error:
            raise ValueError(f"--model hf:{name}: it does not load: {_first_line(error)}") from error
        self.model.to(asking.device).eval()
        self.processor.tokenizer.padding_side = "left"  # what is generated follows the prompt
        self.asking, self.dtype = asking, dtype
        self._chats = bool(getattr(self.processor, "chat_template", None))
        florence = "<CAPTION>" if self.model.config.model_type == "florence2" else ""
        self.prompt = (PROMPT if self._chats else florence) if asking.prompt is None else asking.prompt
        self.identity = f"hf {name} {_state(name)} {self.prompt!r} {asking.max_tokens} {dtype}"

    @torch.inference_mode()
    def __call__(self, images: Sequence[np.ndarray]) -> list[str | Failed]:
        """A caption of each picture."""
        inputs = self._inputs([Image.fromarray(image) for image in images])
        inputs = inputs.to(self.asking.device, self.dtype)
        ids = self.model.generate(**inputs, max_new_tokens=self.asking.max_tokens, do_sample=False)
        ids = _without_prompt(ids, inputs.get("input_ids"))
        texts = self.processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [said(text) for text in texts]

    def _inputs(self, images: list[Image.Image]) -> Any:
        """The pictures with the prompt, as the model takes them."""
        if self._chats:
            content = [{"type": "image"}, {"type": "text", "text": self.prompt}]
            talk = [{"role": "user", "content": content}]
            text = self.processor.apply_chat_template(talk, add_generation_prompt=True, tokenize=False)
            return self.processor(
                text=[text] * len(images),
                images=[[image] for image in images],
                padding=True,
                return_tensors="pt",
            )
        if not self.prompt:
            return self.processor(images=images, return_tensors="pt")
        text = [self.prompt] * len(images)
        return self.processor(images=images, text=text, padding=True, return_tensors="pt")


def said(text: str) -> str | Failed:
    """A caption on one line, or that there is none."""
    text = " ".join(text.split())
    return text or Failed(reason="the model said nothing")


def _without_prompt(ids: Tensor, prompt: Tensor | None) -> Tensor:
    """What was generated: some models repeat the prompt before it."""
    if prompt is None or ids.shape[1] < prompt.shape[1]:
        return ids
    length = prompt.shape[1]
    return ids[:, length:] if torch.equal(ids[:, :length], prompt) else ids


def _state(name: str) -> str:
    """What tells versions of local files apart; empty for a name that is resolved elsewhere."""
    path = Path(name)
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    rows = [f"{p}\n{p.stat().st_size}\n{p.stat().st_mtime_ns}\n" for p in files if p.is_file()]
    return hashlib.sha256("".join(rows).encode()).hexdigest()[:12] if rows else ""


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
