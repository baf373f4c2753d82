"""Encoder of a run or a plain CLIP for MTEB, whose benchmark of video embeddings is MVEB.

    import mteb
    from discovla.mteb_encoder import MTEBEncoder

    mteb.evaluate(MTEBEncoder("runs/mine"), mteb.get_tasks(tasks=["MSRVTTT2V"]))

MTEB's MSR-VTT has 879 of the 1,000 clips of the 1k-A protocol: its figures are not those of papers.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from discovla import torchvision_cpu
from discovla.model import load

torchvision_cpu.install()  # before mteb imports transformers, and that torchvision
try:
    from mteb.models.abs_encoder import AbsEncoder  # pyright: ignore[reportMissingImports]
    from mteb.models.modality_collators import FramesCollator  # pyright: ignore[reportMissingImports]
    from mteb.models.model_meta import ModelMeta, ScoringFunction  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise ImportError(f"mteb: expected it installed (pip install 'discovla[mteb]'), found {error}") from None

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

MODALITIES = {"text", "image", "audio", "video"}


class MTEBEncoder(AbsEncoder):
    """Features of texts and videos, compared by their cosine.

    Frames are sampled by MTEB at the run's `data.sample_rate`, at most `data.frames`, spread evenly; longer
    texts than the context are cut.

    Args:
        model_name: what `discovla.load` opens: a run, an export, "hf:USER/NAME" or "clip:ARCH@TAG".
        revision: of the results; None: a checksum of weights and options.
        device: as in `discovla.load`; None: "auto".
        options: further options of `discovla.load`.

    Raises:
        ValueError: the method's scores are no cosines of features, or what `discovla.load` refuses.
    """

    def __init__(
        self, model_name: str, revision: str | None = None, *, device: str | None = None, **options: Any
    ) -> None:
        data = {"long_captions": "truncate", **options.pop("data", {})}
        self.model = load(model_name, device=device or "auto", data=data, **options)
        method = self.model.method
        if not method.scores_pooled:
            raise ValueError(
                f"{model_name}: expected a method whose scores are cosines of features, as MTEB computes "
                f"them, found {method.config.name}"
            )
        identity = json.dumps(self.model.identity(), sort_keys=True, default=str)
        self.mteb_model_meta = ModelMeta.create_empty(
            {
                "name": f"discovla/{Path(model_name).name}",
                "revision": revision or f"{zlib.crc32(identity.encode()):08x}",
                "n_parameters": sum(p.numel() for p in method.parameters()),
                "max_tokens": self.model.data.context_length,
                "embed_dim": method.architecture.embed_dim,
                "framework": ["PyTorch"],
                "similarity_fn_name": ScoringFunction.COSINE,
                "modalities": ["text", "video"],
                "use_instructions": False,
            }
        )

    def encode(
        self,
        inputs: DataLoader,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        **options: Any,
    ) -> np.ndarray:
        """Return features of a dataset, n d, float32; its rows have a text or a video.

        Raises:
            ValueError: the rows have something else, or both.
        """
        kinds = MODALITIES & set(cast(Any, inputs.dataset).features)
        if len(kinds) != 1 or not kinds <= {"text", "video"}:
            found = ", ".join(sorted(kinds)) or "none of them"
            raise ValueError(f"{task_metadata.name}: expected rows with a text or a video, found {found}")
        if "video" in kinds:
            data = self.model.data
            inputs.collate_fn = FramesCollator(fps=data.sample_rate, max_frames=data.frames)
        return np.concatenate(list(self._features(inputs, "video" if "video" in kinds else "text")))

    def _features(self, inputs: DataLoader, kind: Literal["text", "video"]) -> Iterator[np.ndarray]:
        """Yield features of batches, b d."""
        for batch in inputs:
            if kind == "text":
                embeddings = self.model.embed_texts(list(batch["text"]), progress=False)
            else:
                frames = [video.permute(0, 2, 3, 1).numpy() for video in batch["video"]]  # f y x c
                embeddings = self.model.embed_videos(frames, progress=False)
            yield embeddings.pooled.float().numpy()
