"""Choices that only the order of frames decides."""

import json

import pytest
import torch

from discovla.cli import main
from discovla.config import read_config
from discovla.data.manifest import read_manifest
from discovla.evaluate import EvalOptions
from discovla.methods import build
from discovla.order import _ordered, measure_order, order_table
from tests import runs


@pytest.fixture
def parts(tmp_path, drawn):
    config = read_config(runs.write_config(tmp_path, drawn), ["method=basis", "data.augment=none"])
    torch.manual_seed(0)
    options = EvalOptions(data=config.data, batch_size=5)
    return build(config.model, config.method), read_manifest(drawn, split="train"), options


def test_a_method_blind_to_order_ties_at_half(parts):
    method, clips, options = parts
    results = measure_order(method, clips, options)
    for name in ("reversed", "shuffled"):
        assert results[name]["percent"] == 50.0
        assert results[name]["count"] == results["reversed"]["count"] > 20
    assert 0 < results["swapped"]["percent"] < 100


def test_a_method_that_reads_order_is_counted_pair_by_pair(parts):
    method, clips, options = parts
    torch.nn.init.normal_(method.temporal.weight, std=0.5)
    results = measure_order(method, clips, options)
    assert results["reversed"]["percent"] not in (0.0, 50.0, 100.0)
    by_phrase = results["reversed"]["by_phrase"]
    assert by_phrase["then"]["count"] == sum("then" in text for c in clips for text in c.captions)
    flipped = [clip for clip in clips if clip.reversed_captions]
    assert len(flipped) == len(clips)
    assert "captions that tell order" in order_table(results) and "with 'then'" in order_table(results)


def test_other_orders_keep_padding_and_every_frame():
    frames, mask = torch.arange(10).view(2, 5), torch.arange(5) < torch.tensor([[4], [2]])
    assert _ordered(frames, mask, "reversed").tolist() == [[3, 2, 1, 0, 4], [6, 5, 7, 8, 9]]
    shuffled = _ordered(frames, mask, "shuffled")
    assert torch.equal(shuffled[~mask], frames[~mask]) and not torch.equal(shuffled[0], frames[0])
    assert torch.equal(shuffled.sort(1).values, frames) and shuffled[1, 0] == 6
    assert torch.equal(frames, torch.arange(10).view(2, 5))


def test_captions_without_order_are_refused(parts):
    method, clips, options = parts
    plain = [type(clip)(**{**vars(clip), "captions": ("a ring",), "frame_captions": None}) for clip in clips]
    with pytest.raises(ValueError, match="order: expected captions that tell order, found none in 24 clips"):
        measure_order(method, plain, options)


def test_the_command_prints_the_choices_of_a_run(tmp_path, drawn, capsys):
    words = ["method=basis", "data.augment=none", "steps=1", "data.val_split="]
    runs.train([runs.write_config(tmp_path, drawn), *words])
    assert main(["evaluate", str(tmp_path / "run"), "--order", "--device", "cpu", "--json"]) == 0
    choices = json.loads(capsys.readouterr().out)
    assert list(choices) == ["reversed", "shuffled", "swapped"]
    assert main(["evaluate", str(tmp_path / "run"), "--order", "--device", "cpu"]) == 0
    assert "captions that tell order" in capsys.readouterr().out
    assert main(["evaluate", str(tmp_path / "run"), "--order", "--report"]) == 2
    assert "evaluate: --order: expected a RUN without --matrix and --report" in capsys.readouterr().err
