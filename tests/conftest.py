import os

import torch

if not torch.cuda.is_available():
    # Triton reads it when a kernel is defined, so before any import of ours.
    os.environ["TRITON_INTERPRET"] = "1"

import random
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from discovla import torchvision_cpu
from discovla.drawn_world.synthetic import WorldSizes, draw_world

torchvision_cpu.install()  # tests import open_clip as their reference

TESTS = Path(__file__).parent
_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
_BUILD = f"py{sys.version_info.major}{sys.version_info.minor}_{'cu' if torch.version.cuda else 'cpu'}"
_BUILD += (torch.version.cuda or "").replace(".", "")
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(_CACHE / "torch_extensions" / _BUILD))  # see _own_index_dir
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
torch.set_num_threads(max(1, torch.get_num_threads() // WORKERS))
# `torch.device("meta")` notes at its first use which functions it redirects: they must be torch's own then
with torch.device("meta"):
    torch.empty(0)


@pytest.fixture(autouse=True, scope="session")
def _own_index_dir(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep frame indices out of the user's cache, also those of runs that tests start."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    """Every test starts from the same random state, whichever tests ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill `torch.empty` with NaN, so that a number nobody wrote cannot pass for a result."""
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def empty(*args, **kwargs) -> torch.Tensor:
        x = allocate(*args, **kwargs)
        if x.is_floating_point() and not x.is_meta:
            with torch.no_grad():
                x.fill_(float("nan"))
        return x

    return empty


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of golden files, one folder per method: DISCOVLA_GOLDEN, or tests/golden."""
    folder = Path(os.environ.get("DISCOVLA_GOLDEN", TESTS / "golden")).resolve()
    if not folder.is_dir():
        pytest.fail(f"{folder}: no such folder of golden files (DISCOVLA_GOLDEN)")
    return folder


@pytest.fixture(scope="session")
def realdata() -> Path:
    """The folder of real videos and annotations: DISCOVLA_REALDATA, or ../shared/realdata."""
    folder = Path(os.environ.get("DISCOVLA_REALDATA", TESTS.parents[1] / "shared/realdata")).resolve()
    if not (folder / "MANIFEST.json").is_file():
        pytest.skip(f"no MANIFEST.json in {folder} (DISCOVLA_REALDATA names the folder of real files)")
    return folder


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect soak tests unless -m names them, and skip tests that need more GPUs than there are."""
    if "soak" not in (config.option.markexpr or ""):
        soak = [item for item in items if item.get_closest_marker("soak")]
        config.hook.pytest_deselected(items=soak)
        items[:] = [item for item in items if item not in soak]
    present = torch.cuda.device_count()
    for item in items:
        for marker, needed in (("gpu", 1), ("multigpu", 2)):
            if marker in item.keywords and present < needed:
                item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA device(s), {present} present"))


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifest of a small drawn world: 24 clips to train on, 6 to select by, 8 to test on."""
    sizes = WorldSizes(train=24, val=6, test=8, siblings=0)
    return draw_world(tmp_path_factory.mktemp("drawn"), sizes=sizes, workers=1)
