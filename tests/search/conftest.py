from pathlib import Path

import pytest

import discovla
from discovla.model import Model
from discovla.search.index import Index
from tests.search.videos import write_video


@pytest.fixture(scope="session")
def model() -> Model:
    """The CLIP that the package ships."""
    return discovla.load("clip:drawn")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three videos, to be read only; `three.mp4` has three scenes."""
    folder = tmp_path_factory.mktemp("videos")
    write_video(folder / "one.mp4", [("one", 3)])
    write_video(folder / "three.mp4", [("a", 4), ("bb", 5), ("ccc", 3)])
    write_video(folder / "below" / "long.mp4", [("long", 21)])
    return folder


@pytest.fixture(scope="session")
def read_only(folder, model, tmp_path_factory) -> Index:
    """An index of the folder, to be read only."""
    index = Index.create(tmp_path_factory.mktemp("index") / "my.index", model)
    index.add([folder])
    return index
