"""Export a run as files for discovla and for other programs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from discovla.config import RunConfig
from discovla.data.dataset import read_clips
from discovla.data.video.errors import DecodeError
from discovla.drawn_world.wording import token_ids
from discovla.engine.distributed import choose_device
from discovla.evaluate import EvalOptions, evaluate
from discovla.methods import build
from discovla.methods.base import Method
from discovla.methods.clip import CLIP, CLIPConfig
from discovla.model import ADAPTER, LoadedRun
from discovla.ops.preprocess_frames import CLIP_MEAN, CLIP_STD
from discovla.tensor_files import write_tensors
from discovla.towers.architecture import config_from_architecture
from discovla.towers.weights import clip_names, load_weights, write_drawn_clip

# names that open_clip reads from a folder "local-dir:OUT"
OPEN_CLIP_CONFIG = "open_clip_config.json"
OPEN_CLIP_WEIGHTS = "open_clip_model.safetensors"


@dataclass(frozen=True, kw_only=True)
class Loss:
    """The parts of a run that a plain CLIP cannot hold, and what it finds without them.

    parts: in words; empty if the plain CLIP equals the run.
    recalls: R@1 in percent on `clips` clips of the split `split`, text to video and video to text, of the
        run, the plain CLIP and the CLIP that the run started from.
    unmeasured: why there are no recalls.
    """

    parts: tuple[str, ...]
    split: str = ""
    clips: int = 0
    recalls: dict[str, tuple[float, float]] | None = None
    unmeasured: str = ""

    def __str__(self) -> str:
        if self.recalls is None:
            measured = f"R@1 was not measured: {self.unmeasured}"
        else:
            rows = ", ".join(f"{name} {t2v:.1f} / {v2t:.1f}" for name, (t2v, v2t) in self.recalls.items())
            measured = f"R@1 text to video / video to text on {self.clips} clips of {self.split}: {rows}"
        return f"{'; '.join(self.parts)}; {measured}"


def export(run: LoadedRun, out: Path) -> Path:
    """Write the trained parameters of a run as `adapter.safetensors`, which `discovla.load(out)` opens.

    The names are discovla's; the config of the run is the metadata. The weights that the run started from are
    not included.
    """
    out.mkdir(parents=True, exist_ok=True)
    metadata = {
        "config": _absolute(run.config).to_json(),
        "step": str(run.step),
        "fingerprint": json.dumps(run.method.fingerprint()),
    }
    write_tensors(out / ADAPTER, run.method.trained_state(), metadata)
    return out / ADAPTER


def export_open_clip(run: LoadedRun, out: Path, loss: Loss | None = None) -> list[Path]:
    """Write the CLIP inside a run, with LoRA merged in, as open_clip's "local-dir:OUT" reads it.

    Args:
        loss: of the run; recorded in the config file.

    Returns:
        The files written.
    """
    out.mkdir(parents=True, exist_ok=True)
    architecture = run.method.architecture
    values: dict[str, Any] = {
        "model_cfg": config_from_architecture(architecture),
        "preprocess_cfg": {
            "size": architecture.image_size,
            "mode": "RGB",
            "mean": CLIP_MEAN,
            "std": CLIP_STD,
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
        "discovla": {"step": run.step, "lost": str(loss) if loss is not None and loss.parts else ""},
    }
    (out / OPEN_CLIP_CONFIG).write_text(json.dumps(values, indent=2) + "\n")
    write_tensors(out / OPEN_CLIP_WEIGHTS, run.method.plain_weights())
    return [out / OPEN_CLIP_CONFIG, out / OPEN_CLIP_WEIGHTS]


def export_drawn(run: LoadedRun, out: Path) -> Path:
    """Write a CLIP trained on the drawn world as the small file that the package ships."""
    method = run.method
    write_drawn_clip(out, method.architecture, method.plain_weights(), token_ids())
    return out


def parts_beyond_clip(method: Method) -> tuple[str, ...]:
    """Return the parts of a method that change embeddings or scores and that a plain CLIP cannot hold.

    LoRA can be merged. Fusion in the text tower reads captions of frames, in training only.
    """
    known, parts = set(clip_names(method.architecture)), {}
    for name, _ in method.named_parameters():
        if name in known or ".attention.lora." in name:
            continue
        part = name.split(".")[0]
        if part == "vision":
            parts["fusion of frames in the vision tower (method.fused_vision_blocks)"] = None
        elif part != "text":
            parts[f"the parameters {part}.*"] = None
    if method.config.similarity == "tokens":
        parts["the similarity of tokens (method.similarity)"] = None
    elif not method.scores_pooled:
        parts["the similarity, which is no cosine of features"] = None
    return tuple(parts)


def measure_loss(run: LoadedRun, device: str = "auto") -> Loss:
    """Measure a run and the plain CLIP inside it on the run's val split, if the run has other parts."""
    parts = parts_beyond_clip(run.method)
    split = run.config.data.val_split
    if not parts:
        return Loss(parts=())
    if not split:
        return Loss(parts=parts, unmeasured="data.val_split is empty")
    architecture, config = run.method.architecture, run.config
    plain = CLIP(architecture, CLIPConfig(tune="frozen"))
    load_weights(plain, architecture, run.method.plain_weights())
    start = build(config.model, CLIPConfig(tune="frozen"))
    options = EvalOptions(
        data=config.data, device=choose_device(device), batch_size=config.eval_batch_size, rerank=False
    )
    recalls = {}
    try:
        clips = read_clips(config.data, split)
        for name, method in {
            "the run": run.method,
            "the plain CLIP": plain,
            "before training": start,
        }.items():
            raw = evaluate(method.to(options.device), clips, options)["raw"]
            recalls[name] = raw["t2v"]["R@1"], raw["v2t"]["R@1"]
    except (ValueError, OSError, DecodeError) as error:
        return Loss(parts=parts, unmeasured=str(error))
    return Loss(parts=parts, split=split, clips=len(clips), recalls=recalls)


def _absolute(config: RunConfig) -> RunConfig:
    """Return the config with absolute paths of the files of its model."""

    def absolute(value: Any) -> Any:
        return str(Path(value).resolve()) if value is not None and Path(value).is_file() else value

    model = {key: absolute(getattr(config.model, key)) for key in ("architecture", "pretrained")}
    released = config.method.released
    method = {} if released is None else {"released": released.resolve()}
    return config.model_copy(
        update={
            "model": config.model.model_copy(update=model),
            "method": config.method.model_copy(update=method),
        }
    )
