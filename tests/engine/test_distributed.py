import subprocess
import sys

import pytest
import torch

from discovla.engine.distributed import World, gather, join_world, leave_world
from tests.engine.launch import environment, run_jobs


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    """Return the collectives' results on one process and on two."""
    folder = tmp_path_factory.mktemp("distributed")
    jobs = [{"case": "gather_values"}, {"case": "gather_gradient"}]
    keys = ("values", "gradient")
    return {
        (key, size): result
        for size in (1, 2)
        for key, result in zip(keys, run_jobs(jobs, folder, size=size, timeout=60), strict=True)
    }


def test_gather_concatenates_in_rank_order(results):
    assert results["values", 2]["ints"] == [0, 1]
    assert results["values", 2]["bools"] == [True, False]


def test_gather_accepts_noncontiguous_tensors(results):
    assert results["values", 2]["strided"] == [[0.0, 2.0], [1.0, 3.0], [1.0, 3.0], [2.0, 4.0]]


def test_objects_and_sums_cross_ranks(results):
    assert results["values", 2]["objects"] == [{"rank": 0}, {"rank": 1}]
    assert results["values", 2]["sum"] == [3]


def test_one_process_gathers_itself(results):
    assert results["values", 1] == {
        "ints": [0],
        "bools": [True],
        "objects": [{"rank": 0}],
        "sum": [1],
        "strided": [[0.0, 2.0], [1.0, 3.0]],
    }


def test_the_ranks_parts_of_a_loss_sum_to_that_of_one_process(results):
    assert results["gradient", 2]["loss"] == pytest.approx(results["gradient", 1]["loss"], rel=1e-14)


def test_gradients_of_the_parts_sum_through_the_gather(results):
    expected = results["gradient", 1]["gradient"]
    assert results["gradient", 2]["gradient"] == pytest.approx(expected, rel=1e-12)


def test_gather_is_the_identity_on_one_process():
    x = torch.ones(2, requires_grad=True)
    assert gather(x, World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))) is x


def test_a_process_without_a_launcher_is_a_world_of_one(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    world = join_world("cpu")
    leave_world()
    assert (world.rank, world.size, world.first) == (0, 1, True)
    assert not torch.distributed.is_initialized()


def test_incomplete_launcher_variables_are_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(ValueError, match="RANK, WORLD_SIZE and LOCAL_RANK, found no LOCAL_RANK"):
        join_world("cpu")


@pytest.mark.parametrize(
    ("device", "message"), [("tpu", "expected auto, cpu or cuda"), ("cuda", "found 0 GPUs here")]
)
def test_a_missing_device_is_refused(monkeypatch, device, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        join_world(device)


ENDING = """
import os
from pathlib import Path
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from discovla.engine.distributed import init_single_process_group, join_world, leave_world
world = join_world("cpu")
init_single_process_group(world)
def threads():
    return [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
DistributedDataParallel(nn.Linear(2, 2))
assert "pt_gloo_runloop" in threads()
leave_world()
assert "pt_gloo_runloop" not in threads(), threads()
"""


def test_no_thread_of_the_process_group_aborts_the_process_at_exit():
    done = subprocess.run(
        [sys.executable, "-c", ENDING], env=environment(0, 1, 0), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
