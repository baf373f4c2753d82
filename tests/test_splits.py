"""What the decoder of a run is, settled once for all of its processes."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from discovla import splits
from discovla.data.config import DataConfig


class Config(SimpleNamespace):
    """A run's config as far as it matters here."""

    def model_copy(self, update: dict) -> Config:
        return Config(**(vars(self) | update))


METHOD = SimpleNamespace(architecture=SimpleNamespace(image_size=16))


def run_config(directory, decoder: str = "auto", *, resume: bool = False) -> Config:
    return Config(data=DataConfig(manifest=directory, decoder=decoder), directory=directory, resume=resume)


@pytest.fixture
def measured(monkeypatch) -> list[int]:
    """Image sizes for which a decoder was chosen, which is always DALI."""
    sizes: list[int] = []

    def choose(clips, config, image_size):
        sizes.append(image_size)
        return "dali+pyav"

    monkeypatch.setattr(splits, "choose_decoder", choose)
    return sizes


def settled(config: Config, *, first: bool = True, told: str | None = None) -> str:
    """The decoder that a process settles on, where the first of two told `told`."""
    world = SimpleNamespace(first=first, size=1)
    gather = splits.gather_objects
    try:
        if told is not None:
            splits.gather_objects = lambda mine, world: [told, mine]
        return splits.settle_decoder(config, METHOD, {"train": []}, world).data.decoder
    finally:
        splits.gather_objects = gather


def test_auto_is_measured_and_every_other_decoder_left(tmp_path, measured):
    assert settled(run_config(tmp_path)) == "dali+pyav"
    assert measured == [16]
    for decoder in ("pyav", "torchcodec", "dali"):
        assert settled(run_config(tmp_path, decoder)) == decoder
    assert measured == [16]


def test_all_processes_take_what_the_first_chose(tmp_path, measured):
    assert settled(run_config(tmp_path), first=False, told="auto") == "auto"
    assert measured == []


@pytest.mark.parametrize("began", ["auto", "dali+pyav"])
def test_a_run_that_goes_on_keeps_what_it_began_with(tmp_path, measured, began):
    (tmp_path / "config.json").write_text(json.dumps({"data": {"decoder": began}}))
    assert settled(run_config(tmp_path, resume=True)) == began
    assert measured == []
    assert settled(run_config(tmp_path)) == "dali+pyav"  # a new run in its place


@pytest.mark.parametrize("text", [None, "{", "{}", '{"data": {"decoder": "pyav"}}'])
def test_a_run_that_did_not_begin_with_auto_is_measured(tmp_path, measured, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    assert settled(run_config(tmp_path, resume=True)) == "dali+pyav"
    assert measured == [16]
