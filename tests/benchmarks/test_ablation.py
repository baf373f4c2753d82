import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks import ablation
from benchmarks.ablation import LADDER, ROWS, Place, identity, plan, run_all, tables
from benchmarks.drawn_figures import choices
from benchmarks.measure import read_rows
from discovla.batch import Embedding
from discovla.drawn_world.probes import Probe
from discovla.drawn_world.synthetic import WorldSizes, draw_world
from discovla.methods.clip import CLIP, CLIPConfig
from discovla.testing import tiny_architecture
from discovla.towers.weights import DRAWN_CLIP, initialise

needs_asset = pytest.mark.skipif(not DRAWN_CLIP.is_file(), reason=f"{DRAWN_CLIP} is not made yet")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    sizes = WorldSizes(train=20, val=4, test=6, siblings=4)
    manifest = draw_world(folder / "world", sizes=sizes, workers=1)
    return Place(manifest=manifest, results=folder / "r.jsonl", cache=folder / "cache", judges=4)


def row(name):
    return next(r for r in ROWS if r.name == name)


@pytest.mark.slow
@needs_asset
def test_runs_are_measured_once_and_shown_in_the_tables(place):
    rows = [row("zero-shot, mean pooling"), replace(row("official, scale 100"), steps=2)]
    wanted = [(r, 0) for r in rows]
    first = list(run_all(place, wanted))
    assert [r["name"] for r in first] == [r.name for r, _ in wanted]
    assert list(run_all(place, wanted)) == []
    assert read_rows(place.results) == json.loads(json.dumps(first))
    for result in first:
        assert result["figures"]["flip"] < 1e-5
        assert result["figures"]["probes"]["reversal"]["clip"] == 50
        assert result["figures"]["test"]["t2v"]["R@10"] == 100
    assert first[1]["logit_scale"] == pytest.approx(100)
    assert first[1]["last steps"]["distill"] > 0
    shown = tables(first, rows)
    assert shown.count("| official, scale 100 | 1 |") == 3
    assert "official" not in tables(first)  # a trial is no result


@needs_asset
def test_the_command_runs_its_share_and_prints_tables(place, tmp_path, capsys):
    there = tmp_path / "new/results.jsonl"
    words = ["--manifest", place.manifest, "--cache", place.cache, "--results", there]
    assert ablation.main([*map(str, words), "--only", "zero-shot", "--share", "0/2", "--steps", "2"]) == 0
    assert [r["name"] for r in read_rows(there)] == ["zero-shot, mean pooling"]
    assert "zero-shot, mean pooling, seed 0: t2v R@1" in capsys.readouterr().out
    assert ablation.main(["--results", str(there), "--table"]) == 0
    assert "| zero-shot, mean pooling | 1 |" in capsys.readouterr().out


@needs_asset
def test_results_of_other_weights_are_refused(place, tmp_path):
    there = tmp_path / "r.jsonl"
    there.write_text(json.dumps({"weights": -1, "identity": ""}) + "\n")
    other = Place(manifest=place.manifest, results=there, cache=place.cache)
    with pytest.raises(ValueError, match="other weights"):
        list(run_all(other, [(LADDER[0], 0)]))


def test_every_row_is_a_config_the_engine_takes(place, tmp_path):
    weights = {}
    for r in ROWS:
        config = place.config(r, 0, tmp_path)
        assert config.data.val_split == ""
        method = config.method
        norm = {"official": 100 / r.batch_size, "fixed": 100 / 128}.get(getattr(method, "kl_norm", ""), 0)
        weights[r.name] = norm * getattr(method, "beta", 0)
    assert weights["+ distillation, official (w 2.08)"] == pytest.approx(2.083, abs=1e-3)
    assert weights["+ distillation, w 0.78"] == pytest.approx(0.78)
    assert weights["+ distillation, w 0.2"] == pytest.approx(0.2)


def test_no_two_runs_of_the_plan_are_the_same():
    runs = [identity(r, seed) for r, seed in plan()]
    assert len(runs) == len(set(runs)) == sum(len(r.seeds) for r in ROWS)


def test_a_spread_is_shown_where_there_are_several_seeds():
    values = [{"figures": {"test": {"t2v": {"R@1": x}}}} for x in (20.0, 21.0, 25.0)]
    assert ablation._cell(values, "figures/test/t2v/R@1") == "22.0 (20.0-25.0)"
    assert ablation._cell(values[:1], "figures/test/t2v/R@1") == "20.0"
    assert ablation._cell(values, "figures/flip") == "-"


class Reader(CLIP):
    """Prefers, on the second clip alone, texts with an odd number of tokens."""

    def similarity(self, text: Embedding, video: Embedding) -> Tensor:
        return text.pooled @ video.pooled.T

    def encode_text(self, ids: Tensor, mask: Tensor) -> Embedding:
        return Embedding(pooled=(mask.sum(-1, keepdim=True) % 2).float())


def test_choices_count_on_the_clip_and_on_its_control():
    architecture = tiny_architecture()
    method = Reader(architecture, CLIPConfig())
    initialise(method, architecture, 0)
    clips = Embedding(pooled=torch.tensor([[0.0], [1.0]]))
    odd, even = "red", "red red"  # three and four tokens with start and end
    probes = [
        Probe(kind="verb", clip=1, control=0, true=odd, false=even),
        Probe(kind="verb", clip=0, control=1, true=odd, false=even),
        Probe(kind="verb", clip=1, control=0, true=even, false=odd),
        Probe(kind="reversal", clip=0, control=0, true=odd, false=even, played_backwards=True),
    ]
    found = choices(method, probes, clips, clips.map(lambda x: 1 - x))
    assert found["verb"] == {"count": 3, "clip": pytest.approx(100 / 3), "control": pytest.approx(100 / 3)}
    assert found["reversal"] == {"count": 1, "clip": 100, "control": 100}
