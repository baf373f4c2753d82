"""Embed the videos and captions of a manifest into files, part by part."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from discovla.batch import BadClip
from discovla.data.dataset import check_captions
from discovla.data.manifest import Clip, read_manifest
from discovla.files import write_file
from discovla.foreign import to_json
from discovla.lock import WriterLock
from discovla.model import Model, NoneReadable
from discovla.retrieval.embeddings import Embeddings

PART = 256  # about as many inputs are embedded again after an interruption
IDENTITY = "embed.json"
REFUSED = "refused.jsonl"  # written last


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Embeddings in a folder.

    videos, texts: number of rows of `videos.safetensors` and `texts.safetensors`; line i of the `.jsonl`
        beside it describes row i.
    refused: clips without a row, as in `refused.jsonl`.
    """

    videos: int
    texts: int
    refused: tuple[BadClip, ...]


def embed_manifest(
    model: Model, manifest: str | Path, out: str | Path, *, split: str | None = None, part: int = PART
) -> Corpus:
    """Embed the videos and captions of a manifest; an interrupted call continues when it is repeated.

    A folder that is complete is left as it is.

    Args:
        out: folder; made if it does not exist.
        split: only clips of this split; None embeds all.
        part: inputs of a part, rounded up to whole batches.

    Raises:
        ValueError: an unreadable manifest, too long a caption, a folder of another model or other clips or
            to which another process writes, or no video that can be read.
        OSError: a file cannot be written.
    """
    out, clips = Path(out), read_manifest(manifest, split=split)
    check_captions(
        clips,
        model.data.context_length,
        long=model.data.long_captions,
        tokenizer=model.data.tokenizer,
    )
    part = -(-part // model.batch_size) * model.batch_size
    if (out / REFUSED).is_file() and not (out / "parts").exists():
        _claim(out, model, clips, part)
        return _finished(out)
    with WriterLock(out, "discovla embed") as lock:
        _claim(out, model, clips, part)
        return _embed_manifest(model, clips, out, part, lock)


def _embed_manifest(model: Model, clips: Sequence[Clip], out: Path, part: int, lock: WriterLock) -> Corpus:
    """Embed clips into a folder that is locked and claimed."""
    videos = [(clip.video, clip.start, clip.end) for clip in clips]
    captions = [(clip, caption) for clip in clips for caption in clip.captions]

    def embed_clips(rows: slice) -> Embeddings:
        lock.check()
        return model.embed_videos(videos[rows], on_error="skip")

    def embed_captions(rows: slice) -> Embeddings:
        lock.check()
        return model.embed_texts([caption for _, caption in captions[rows]])

    found = _embed_parts(out / "parts", "videos", len(videos), part, embed_clips)
    refused = tuple(replace(bad, id=clips[int(bad.id)].id) for bad in found.refused)
    found = replace(found, refused=refused)
    texts = _embed_parts(out / "parts", "texts", len(captions), part, embed_captions)
    row = {clips[place].id: row for row, place in enumerate(found.index.tolist())}
    _write(out / "videos", found, [_video_line(clips[place]) for place in found.index.tolist()])
    lines = [{"id": clip.id, "row": row.get(clip.id), "caption": caption} for clip, caption in captions]
    _write(out / "texts", texts, lines)
    _write_lines(out / REFUSED, [asdict(bad) for bad in refused])
    shutil.rmtree(out / "parts")
    return Corpus(videos=len(found), texts=len(texts), refused=refused)


def _finished(out: Path) -> Corpus:
    """Return what a complete folder holds."""
    videos, texts = (Embeddings.load(out / f"{name}.safetensors") for name in ("videos", "texts"))
    return Corpus(videos=len(videos), texts=len(texts), refused=videos.refused)


def _claim(out: Path, model: Model, clips: Sequence[Clip], part: int) -> None:
    """Note in the folder which embeddings it holds, or check that it holds these."""
    identity: dict[str, Any] = {
        **model.identity(),
        "batch_size": model.batch_size,
        "part": part,
        "clips": hashlib.sha256(repr([_video_line(clip) for clip in clips]).encode()).hexdigest(),
    }
    path = out / IDENTITY
    identity = json.loads(json.dumps(identity))
    if path.is_file():
        stored = json.loads(path.read_text())
        other = [key for key in identity if stored.get(key) != identity[key]]
        if other:
            raise ValueError(
                f"{path}: expected the same {', '.join(other)} to continue, found others; name another "
                "folder or remove this one"
            )
    else:
        write_file(path, json.dumps(identity, indent=2) + "\n")


def _embed_parts(
    folder: Path, name: str, count: int, size: int, embed: Callable[[slice], Embeddings]
) -> Embeddings:
    """Embed inputs part by part into files, those that are missing, and return all with their positions.

    A part is complete once its `.json` exists, with the refused inputs; it has no tensors if all are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts, refused = [], []
    for first in range(0, count, size):
        tensors, record = (folder / f"{name}-{first:09d}.{kind}" for kind in ("safetensors", "json"))
        if not record.is_file():
            try:
                part = embed(slice(first, first + size))
                replace(part, index=part.index + first).save(tensors)
                bad = part.refused
            except NoneReadable as error:
                bad = error.refused
            rows = [asdict(replace(clip, id=str(int(clip.id) + first))) for clip in bad]
            write_file(record, to_json(rows))
        refused += [BadClip(**row) for row in json.loads(record.read_text())]
        if tensors.is_file():
            parts.append(Embeddings.load(tensors))
    if not parts:
        raise ValueError(
            f"{folder.parent}: expected at least one clip that can be read, found none of {count}; "
            f"the first: {refused[0].video}: {refused[0].reason}"
        )
    return replace(Embeddings.concatenate(parts), refused=tuple(refused))


def _write(stem: Path, embeddings: Embeddings, lines: Sequence[dict[str, Any]]) -> None:
    """Write `stem.safetensors` and `stem.jsonl`, each completely or not at all."""
    final = stem.with_suffix(".safetensors")
    writing = final.with_name(f".writing-{final.name}")
    embeddings.save(writing)
    writing.replace(final)
    _write_lines(stem.with_suffix(".jsonl"), lines)


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    write_file(path, "".join(to_json(row) + "\n" for row in rows))


def _video_line(clip: Clip) -> dict[str, Any]:
    """Return the JSON line of a clip."""
    return {
        "id": clip.id,
        "video": str(clip.video),
        "start": clip.start,
        "end": clip.end,
        "split": clip.split,
        "captions": list(clip.captions),
    }
