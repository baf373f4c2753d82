"""Export a run as files for discovla and for other programs."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from discovla.batch import Embedding
from discovla.card import adapter_config, model_card
from discovla.config import RunConfig
from discovla.data.dataset import read_clips
from discovla.data.tokens import make_tokenizer
from discovla.data.video.errors import DecodeError
from discovla.drawn_world.wording import token_ids
from discovla.engine.distributed import choose_device
from discovla.evaluate import EvalOptions, evaluate
from discovla.methods import build
from discovla.methods.base import Method
from discovla.methods.clip import CLIP, CLIPConfig
from discovla.model import ADAPTER, LoadedRun
from discovla.nn.features import widen
from discovla.tensor_files import write_tensors
from discovla.towers.configs import config_from_architecture
from discovla.towers.weights import clip_names, load_weights, reachable, write_drawn_clip

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


def push_to_hub(run: LoadedRun, out: Path, repository: str, results: Path | None = None) -> str:
    """Write the export of a run with a model card, and upload it to Hugging Face's hub.

    `discovla.load("hf:USER/NAME")` opens it.  A new repository is private.

    Args:
        out: folder of the export.
        repository: USER/NAME.
        results: results.json of the run, for the card.

    Returns:
        URL of the commit.

    Raises:
        ValueError: the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    files = [export(run, out), out / "config.json", out / "README.md"]
    files[1].write_text(json.dumps(adapter_config(run.config, run.method, run.step), indent=2) + "\n")
    files[2].write_text(model_card(run.config, run.method, run.step, repository, results))
    api = HfApi()
    if not reachable(api.endpoint):
        raise ValueError(f"hub: {repository}: expected an answer of {api.endpoint}, found no connection")
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository, folder_path=out, allow_patterns=[file.name for file in files]
        )
    except (HfHubHTTPError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"hub: {repository}: expected to write it at {api.endpoint}, found {reason}"
        ) from None
    return commit.commit_url


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
            "mean": architecture.preprocessing.mean,
            "std": architecture.preprocessing.std,
            "interpolation": architecture.preprocessing.interpolation,
            "resize_mode": architecture.preprocessing.resize,
        },
        "discovla": {"step": run.step, "lost": str(loss) if loss is not None and loss.parts else ""},
    }
    (out / OPEN_CLIP_CONFIG).write_text(json.dumps(values, indent=2) + "\n")
    write_tensors(out / OPEN_CLIP_WEIGHTS, run.method.plain_weights())
    return [out / OPEN_CLIP_CONFIG, out / OPEN_CLIP_WEIGHTS]


def export_programs(run: LoadedRun, out: Path) -> list[Path]:
    """Write both encoders as programs that `torch.export.load` opens without discovla.

    `video_encoder.pt2` takes frames (b f y x 3, uint8, as sampled and resized for the run) and their mask
    (b f, bool); `text_encoder.pt2` takes token ids (b l, int64). Both return a dict with `pooled`, b d, and
    with `tokens` and `mask` where the method compares them; b is free. `discovla.json` in each has f, y and
    l.

    Returns:
        The files written.

    Raises:
        ValueError: torch.export cannot follow the method, or the program computes something else.
    """
    out.mkdir(parents=True, exist_ok=True)
    method, data = run.method.eval(), run.config.data
    size, length = method.architecture.image_size, data.context_length
    generator = torch.Generator().manual_seed(0)
    shape = (2, data.frames, size, size, 3)
    frames = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    frame_mask = torch.arange(data.frames) < torch.tensor([[data.frames], [max(1, data.frames - 1)]])
    ids, _ = make_tokenizer(length, data.tokenizer).encode(
        ["a red circle", "two blue boxes turn to the left"]
    )
    inputs = {"video": (frames, frame_mask), "text": (ids,)}
    description = json.dumps({"frames": data.frames, "image_size": size, "context_length": length})
    vision, text = method.vision.impl, method.text.impl
    written = []
    try:
        method.vision.impl = method.text.impl = "torch"
        for side, encoder in {"video": _VideoEncoder(method), "text": _TextEncoder(method)}.items():
            path = out / f"{side}_encoder.pt2"
            program = _program(encoder, inputs[side], f"{run.config.method.name}, {side}")
            torch.export.save(program, path, extra_files={"discovla.json": description})
            written.append(path)
    finally:
        method.vision.impl, method.text.impl = vision, text
    return written


class _VideoEncoder(nn.Module):
    """Embed videos without the checks of `Method.encode_video`, which read masks."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method

    def forward(self, frames: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return _outputs(self.method.embed_frames(self.method.encode_frames(frames, mask), mask))


class _TextEncoder(nn.Module):
    """Embed texts as padded rows: packed ones have a number that depends on the texts."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        mask = torch.arange(ids.shape[1], device=ids.device) <= ids.argmax(-1, keepdim=True)
        pooled, words = self.method.text(ids, None, words=True)
        words = widen(words) if self.method.needs_words else None
        return _outputs(self.method.embed_text(widen(pooled), words, mask))


def _outputs(embedding: Embedding) -> dict[str, Tensor]:
    return {n: x for n, x in embedding.tensors().items() if n in ("pooled", "tokens", "mask")}


def _program(encoder: nn.Module, inputs: tuple[Tensor, ...], name: str) -> torch.export.ExportedProgram:
    """Trace an encoder with a free batch size, and check the program at another one."""
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        try:
            program = torch.export.export(encoder, inputs, dynamic_shapes=[{0: batch} for _ in inputs])
        except (RuntimeError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise ValueError(f"export: torch.export cannot follow {name}: {first}") from None
        more = tuple(torch.cat([x, x[:1]]) for x in inputs)
        wanted, values = encoder(*more), program.module()(*more)
    for key, expected in wanted.items():
        if not torch.allclose(values[key].float(), expected.float(), rtol=1e-4, atol=1e-5):
            raise ValueError(f"export: the program of {name} computes other values of {key}")
    return program


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
        if name.startswith("vision.merging."):
            continue
        if part == "vision":
            parts["fusion of frames in the vision tower (method.fused_vision_blocks)"] = None
        elif part != "text":
            parts[f"the parameters {part}.*"] = None
    if method.config.merge != "none":
        parts["merging of tokens in the vision tower (method.merge)"] = None
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
            raw = evaluate(method.to(options.device), clips, replace(options, name=name))["raw"]
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
