"""open_clip's CoCa as a captioner."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from discovla import torchvision_cpu
from discovla.data.captions.captioning import NoCaption, as_caption

_START, _END = 49406, 49407  # token ids


class CoCaCaptioner:
    """A CoCa model of open_clip, decoded greedily.

    Args:
        name: `ARCHITECTURE@WEIGHTS`.  The architecture is a name known to open_clip or a JSON file of
            open_clip's form; the weights are an open_clip tag or a file.
        max_tokens: of a caption.
        device: of the model.

    Raises:
        ValueError: the model does not exist, does not load, or is no CoCa.
    """

    def __init__(self, name: str, max_tokens: int = 30, device: str = "cpu") -> None:
        architecture, _, weights = name.partition("@")
        if not weights:
            raise ValueError(f"--model coca:{name}: expected coca:ARCHITECTURE@WEIGHTS, found no weights")
        torchvision_cpu.install()
        import open_clip  # takes seconds, and only CoCa needs it

        if architecture.endswith(".json"):
            open_clip.add_model_config(architecture)
        known = Path(architecture).stem if architecture.endswith(".json") else architecture
        if open_clip.get_model_config(known) is None:
            raise ValueError(f"--model coca:{name}: expected an architecture of open_clip, found {known}")
        try:
            made: Any = open_clip.create_model_and_transforms(known, pretrained=weights, device=device)
        except (RuntimeError, OSError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise ValueError(f"--model coca:{name}: its weights do not load: {reason}") from error
        self.model, _, self._preprocess = made
        if not isinstance(self.model, open_clip.CoCa):
            raise ValueError(f"--model coca:{name}: expected a CoCa model, found {type(self.model).__name__}")
        self.model.eval()
        self.device = device
        self._tokenizer: Any = open_clip.get_tokenizer(known)
        self._length = min(max_tokens + 1, self.model.context_length - 1)  # with the start token
        files = f"{_file_version(weights)} {_file_version(architecture)}"
        self.identity = f"coca {name} {files} {self._length}"

    @torch.inference_mode()
    def __call__(self, images: Sequence[np.ndarray]) -> list[str | NoCaption]:
        """Return a caption for each picture: the most likely token at each step, until the end token."""
        pixels = torch.stack([self._preprocess(Image.fromarray(image)) for image in images])  # b c y x
        image_out = self.model(pixels.to(self.device))
        ids = torch.full((len(images), 1), _START, device=self.device)  # b l
        done = torch.zeros(len(images), dtype=torch.bool, device=self.device)
        while ids.shape[1] < self._length and not done.all():
            out = self.model(
                None,
                ids,
                image_latent=image_out["image_features"],
                image_embs=image_out["image_embs"],
                output_labels=False,
            )
            tokens = out["logits"][:, ids.shape[1] - 1].argmax(-1).masked_fill(done, self.model.pad_id)
            done |= tokens == _END
            ids = torch.cat([ids, tokens[:, None]], 1)
        return [as_caption(self._decode(row)) for row in ids.tolist()]

    def _decode(self, ids: list[int]) -> str:
        """Decode the tokens between start and end."""
        end = ids.index(_END) if _END in ids else len(ids)
        return self._tokenizer.decode([i for i in ids[1:end] if i != self.model.pad_id])


def _file_version(name: str) -> str:
    """Return a hash of path, size and modification time of a file; empty if `name` is no file."""
    path = Path(name)
    if not path.is_file():
        return ""
    stat = path.stat()
    return hashlib.sha256(f"{path}\n{stat.st_size}\n{stat.st_mtime_ns}\n".encode()).hexdigest()[:12]
