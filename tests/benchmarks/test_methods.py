import json
from pathlib import Path

import pytest

from benchmarks import methods
from benchmarks.measure import read_rows
from benchmarks.methods import PLAIN, RATES, ROWS, SEEDS, Place, costs, identity, rates, run_all, table
from discovla.drawn_world.synthetic import WorldSizes, draw_world
from discovla.towers.weights import DRAWN_CLIP

pytestmark = pytest.mark.skipif(not DRAWN_CLIP.is_file(), reason=f"{DRAWN_CLIP} is not made yet")
SMALL = ("batch_size=4", "steps=2", "evaluate_every=1", "data.workers=0")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    sizes = WorldSizes(train=12, val=4, test=6, siblings=4)
    manifest = draw_world(folder / "world", sizes=sizes, workers=1)
    return Place(manifest=manifest, results=folder / "r.jsonl", cache=folder / "cache", more=SMALL)


@pytest.mark.parametrize("row", [*ROWS, *RATES], ids=lambda row: row.name)
def test_every_row_is_a_config_the_engine_takes(row, place):
    config = place.config(row, 1, Path("runs/x"))
    assert (config.seed, config.batch_size, config.data.val_split) == (1, 4, "val")


def test_no_two_runs_are_the_same():
    names = [identity(row, seed) for row in ROWS for seed in SEEDS]
    assert len(set(names)) == len(names)


@pytest.mark.slow
def test_a_run_is_measured_once_from_its_checkpoint(place):
    row = next(row for row in ROWS if row.name == "CLIP2Video, LoRA")
    (result,) = run_all(place, [(row, 0)])
    assert read_rows(place.results) == [json.loads(json.dumps(result))]
    assert list(run_all(place, [(row, 0)])) == []
    assert result["test"]["t2v"]["R@10"] == 100
    assert result["cpu_seconds"] > 1
    assert result["peak_rss_mb"] > 100
    (rate,) = rates(place, RATES[:1])
    assert [found["step"] for found in rate["val"]] == [0, 1, 2]


def test_costs_are_relative_to_a_step_of_mean_pooling(place, monkeypatch):
    monkeypatch.setattr(methods, "ROWS", (ROWS[0], ROWS[1]))
    plain, lstm = costs(place, rounds=1)
    assert (plain["name"], plain["step_over_meanP"]) == (PLAIN, 1.0)
    assert lstm["saved_mb"] > plain["saved_mb"] > 1


@pytest.mark.slow
def test_a_failing_run_says_what_it_said(place):
    with pytest.raises(RuntimeError, match=r"unknown key; did you mean 'steps'"):
        methods._train([*place.words(ROWS[0], 0), "stepz=1"])


def test_the_table_shows_means_with_their_spread():
    def result(seed: int, score: float) -> dict:
        figures = {way: {"R@1": score, "R@5": score} for way in ("t2v", "v2t")}
        probes = {kind: {"clip": 50.0, "control": 50.0} for kind in ("verb", "bind", "reversal")}
        name = identity(ROWS[0], seed)
        shown = {"kind": "run", "name": ROWS[0].name, "identity": name, "trained_parameters": 12_345}
        shown["peak_rss_mb"] = 800 + seed
        return shown | {"before": figures, "test": figures, "probes": probes}

    cost = {"kind": "cost", "name": ROWS[0].name, "step_over_meanP": 1.0, "saved_mb": 250.4}
    (line,) = table([result(0, 20.0), result(1, 24.0), cost]).splitlines()[2:]
    assert line.startswith(f"| {PLAIN} | 2 | 12 k | 1.00x | 250 MB | 801 MB | 22.0 (20.0-24.0) |")
    assert line.endswith("| 50.0 | 50.0 | 50.0 | 50.0 |")
