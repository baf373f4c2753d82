"""Training from features of a frozen vision tower equals training from frames."""

import json
import logging
import shutil

import pytest
import torch

from discovla.config import read_config
from discovla.data.manifest import read_manifest, write_manifest
from discovla.engine.distributed import World
from discovla.features import frozen_loader, why_not_frozen
from discovla.methods import build
from discovla.trainer import make_loader
from tests import runs

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
BASIS = ("method=basis", "data.augment=none", "data.reversed_pairs=true", "steps=12", "data.val_split=")
# one block of two is frozen: the first, before one that fuses, or by choice
FUSED = ("method.fused_vision_blocks=1", "method.frame_position=true")
LORA = ("method.tune=lora", "method.frozen_vision_blocks=1")
STAN = ("method=t2vparser", "method.stan_layers=1", "data.reversed_pairs=false")
OFF, AUTO = "engine.frozen_features=off", "engine.frozen_features=auto"


def encoded(loader):
    """Read an epoch, so that all clips are encoded; return the loader."""
    for _ in loader.epoch(0):
        pass
    return loader


def prepared(tmp_path, drawn, *words):
    """Return config, method and loader of a run on the drawn clips."""
    config = read_config(runs.write_config(tmp_path, drawn), [*BASIS, *words])
    method = build(config.model, config.method)
    return (
        config,
        method,
        make_loader(config, method, read_manifest(config.data.manifest, split="train"), ALONE),
    )


@pytest.mark.parametrize(
    ("size", "way", "tower"),
    [
        (1, "engine.strategy=torch", ()),
        (1, "engine.strategy=torch", FUSED),
        pytest.param(2, "engine.zero_stage=2", (), marks=pytest.mark.slow),
        pytest.param(2, "engine.zero_stage=3", (), marks=pytest.mark.slow),
        pytest.param(2, "engine.zero_stage=3", LORA, marks=pytest.mark.slow),
    ],
)
def test_losses_have_the_bits_of_training_from_frames(size, way, tower, tmp_path, drawn):
    strategy = () if way.startswith("engine.strategy") else ("engine.strategy=deepspeed",)
    words = [runs.write_config(tmp_path, drawn), *BASIS, *strategy, way, *tower]
    for option in (OFF, AUTO):
        runs.train([*words, option, f"directory={tmp_path}/{option[-4:]}"], size=size)
    frames, features = (runs.records(tmp_path / name) for name in ("=off", "auto"))
    assert len(frames) == 12
    for name in ("loss", "reversed", "swapped", "grad_norm"):
        assert [row[name] for row in frames] == [row[name] for row in features], name
    assert (tmp_path / "auto/features").is_dir() and not (tmp_path / "=off/features").exists()


def test_batches_have_the_features_of_their_frames_also_backwards(tmp_path, drawn):
    config, method, loader = prepared(tmp_path, drawn)
    cached = frozen_loader(config, method, loader, ALONE)
    for frames, features in zip(loader.epoch(1), cached.epoch(1), strict=True):
        with torch.no_grad():
            assert torch.equal(method.encode_frames(frames.frames, frames.frame_mask), features.frames)
        assert torch.equal(frames.text_ids, features.text_ids)
        assert torch.equal(frames.frame_mask, features.frame_mask)


def test_an_interrupted_run_continues_with_what_is_missing(tmp_path, drawn):
    config, method, loader = prepared(tmp_path, drawn)
    encoded(frozen_loader(config, method, loader, ALONE))
    parts = sorted((tmp_path / "run/features").rglob("*.npy"))
    parts[1].with_suffix(".json").unlink()
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in parts}
    encoded(frozen_loader(config, method, loader, ALONE))
    changed = [path for path in parts if path.stat().st_mtime_ns != before[path][0]]
    assert changed == [parts[1]]
    assert parts[1].read_bytes() == before[parts[1]][1]


def test_other_weights_make_other_features(tmp_path, drawn):
    config, method, loader = prepared(tmp_path, drawn)
    encoded(frozen_loader(config, method, loader, ALONE))
    with torch.no_grad():
        method.vision.projection.add_(0.1)
    encoded(frozen_loader(config, method, loader, ALONE))
    assert len(list((tmp_path / "run/features").iterdir())) == 2


def test_the_number_of_frozen_blocks_makes_other_features(tmp_path, drawn):
    for tower, width in [((), (32,)), (FUSED, (5, 64)), (LORA, (5, 64))]:
        config, method, loader = prepared(tmp_path, drawn, *tower)
        batch = next(frozen_loader(config, method, loader, ALONE).epoch(0))
        assert batch.frames.shape[2:] == width
    # the same block is frozen in the last two, whose key differs by the options of the method
    assert len(list((tmp_path / "run/features").iterdir())) == 3


def test_frozen_blocks_have_neither_trained_parameters_nor_lora(tmp_path, drawn):
    for tune in ("full", "lora"):
        _, method, _ = prepared(tmp_path, drawn, f"method.tune={tune}", "method.frozen_vision_blocks=1")
        trained = set(method.trained_state())
        assert not [name for name in trained if name.startswith(("vision.blocks.0.", "vision.class_"))]
        assert [name for name in trained if name.startswith("vision.blocks.1.")]
        assert [name for name in trained if name.startswith("text.blocks.0.")]
    with pytest.raises(ValueError, match="expected at most the 1 blocks before fusion, found 2"):
        prepared(tmp_path, drawn, *FUSED, "method.frozen_vision_blocks=2")


def test_tokens_that_do_not_fit_the_disk_are_not_stored(tmp_path, drawn, monkeypatch):
    config, method, loader = prepared(tmp_path, drawn, *FUSED)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("discovla.features.shutil.disk_usage", lambda _: usage)
    reason = why_not_frozen(config, method, loader)
    assert reason.startswith(f"tokens of {len(loader.dataset.clips)} clips take 0.0 GB")


def test_merged_tokens_make_other_features(tmp_path, drawn):
    for words in ((), ("method.merge=tome",), ("method.merge=tome", "method.merging.per_block=1")):
        config, method, loader = prepared(tmp_path, drawn, *words)
        next(frozen_loader(config, method, loader, ALONE).epoch(0))
    assert len(list((tmp_path / "run/features").iterdir())) == 3


def test_a_clip_that_cannot_be_read_stays_bad(tmp_path, drawn):
    clips = read_manifest(drawn)
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    first = clips[0]
    manifest = tmp_path / "m.jsonl"
    write_manifest(manifest, [type(first)(**{**vars(first), "video": broken}), *clips[1:]])
    config, method, loader = prepared(tmp_path, manifest)
    cached = frozen_loader(config, method, loader, ALONE)
    expected = {(bad.id, bad.reason) for batch in loader.epoch(0) for bad in batch.bad}
    assert {name for name, _ in expected} == {first.id}
    assert {(bad.id, bad.reason) for batch in cached.epoch(0) for bad in batch.bad} == expected


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ((OFF,), "engine.frozen_features = 'off'"),
        (("method.tune=full",), "method.tune = 'full' trains the vision tower from its start"),
        (("method.tune=lora",), "method.tune = 'lora' trains the vision tower from its start"),
        (("method.merge=tome", "method.merging.per_block=1", "method.tune=full"), "'tome' merges tokens"),
        ((*FUSED, "method.mask_padded_frames=false"), "the method reads the black frames"),
        ((*STAN, "method.tune=text"), "'t2vparser' trains in the vision"),
        (("data.augment=light",), "data.augment = 'light' changes the frames"),
        (("data.sampling=t2vparser",), "data.sampling = 't2vparser' reads other frames"),
        (("steps=1",), "1 steps read fewer than two times"),
    ],
)
def test_frames_are_encoded_in_every_step_where_features_would_differ_or_not_pay(
    words, reason, tmp_path, drawn, caplog
):
    config, method, loader = prepared(tmp_path, drawn, *words)
    assert reason in why_not_frozen(config, method, loader)
    with caplog.at_level(logging.INFO):
        assert frozen_loader(config, method, loader, ALONE) is loader
    assert reason in caplog.text
    assert not (tmp_path / "run/features").exists()


def test_views_of_augmented_clips_are_encoded_once_and_read_in_turn(tmp_path, drawn):
    words = ("data.augment=light", "engine.frozen_views=2", "data.reversed_pairs=false", "steps=40")
    config, method, loader = prepared(tmp_path, drawn, *words)
    cached = encoded(frozen_loader(config, method, loader, ALONE))
    plain = frozen_loader(*prepared(tmp_path, drawn, "data.reversed_pairs=false", "steps=40"), ALONE)
    encoded(plain)
    assert len(list((tmp_path / "run/features").iterdir())) == 3, "two views, and the clips without change"

    def features(source):
        seen = {}
        for epoch in range(6):
            for batch in source.epoch(epoch):
                for index, frames in zip(batch.video_index.tolist(), batch.frames, strict=True):
                    seen.setdefault(index, set()).add(frames.numpy().tobytes())
        return seen

    views, single = features(cached), features(plain)
    assert {len(x) for x in single.values()} == {1}
    assert {len(x) for x in views.values()} == {2}
    assert not any(views[i] & single[i] for i in views)


def test_an_interrupted_pass_of_views_draws_the_same_augmentation(tmp_path, drawn):
    config, method, loader = prepared(tmp_path, drawn, "data.augment=light", "engine.frozen_views=1")
    encoded(frozen_loader(config, method, loader, ALONE))
    part = sorted((tmp_path / "run/features").rglob("*.npy"))[1]
    before = part.read_bytes()
    part.with_suffix(".json").unlink()
    encoded(frozen_loader(config, method, loader, ALONE))
    assert part.read_bytes() == before


def test_a_step_encodes_only_the_clips_that_it_and_those_before_it_read(tmp_path, drawn):
    config, method, loader = prepared(tmp_path, drawn)
    cached = frozen_loader(config, method, loader, ALONE)
    assert not list((tmp_path / "run/features").rglob("*.npy"))
    next(iter(cached.epoch(0)))
    assert len(list((tmp_path / "run/features").rglob("*.npy"))) == 1


def test_parts_hold_one_batch_each(tmp_path, drawn):
    config, method, loader = prepared(tmp_path, drawn)
    encoded(frozen_loader(config, method, loader, ALONE))
    facts = [json.loads(path.read_text()) for path in sorted((tmp_path / "run/features").rglob("*.json"))]
    assert [len(part["frames"]) for part in facts][:-1] == [16] * (len(facts) - 1)
    assert sum(len(part["frames"]) for part in facts) == len(read_manifest(drawn, split="train"))
