from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient

from discovla.search.serve import create_app
from tests.search.serve.fake import FakeIndex

HOSTS = ("localhost", "127.0.0.1")


@pytest.fixture(scope="package")
def index(tmp_path_factory: pytest.TempPathFactory) -> FakeIndex:
    """The stand-in for an index."""
    return FakeIndex(tmp_path_factory.mktemp("videos"))


@pytest.fixture(scope="package")
def client(index: FakeIndex) -> Iterator[TestClient]:
    """A client of a server without a token."""
    with TestClient(create_app(index, hosts=HOSTS), base_url="http://localhost:8000") as client:
        yield client
