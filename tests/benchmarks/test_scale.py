"""The predicted step follows the published model, and the predicted bytes equal counted ones."""

import pytest

from benchmarks.scale import Model, Rates, counted, main, memory_bytes, sent_bytes, step_ms


@pytest.mark.parametrize(
    ("world_size", "loss", "step"), [(8, 0.17, 52.8), (64, 1.4, 54.6), (256, 5.5, 59.1), (1024, 22.0, 76.0)]
)
def test_the_default_rates_give_the_step_of_the_published_model(world_size, loss, step):
    times = step_ms(Model(), Rates(), world_size)
    assert times["loss"] == pytest.approx(loss, rel=0.03)
    assert times["step"] == pytest.approx(step, rel=0.02)
    parts = sum(times[name] for name in ("towers", "loss", "communication", "straggler"))
    assert times["step"] == pytest.approx(parts)


def test_one_gpu_sends_nothing_and_has_efficiency_1():
    assert sum(sent_bytes(Model(), 1).values()) == 0
    assert step_ms(Model(), Rates(), 1)["efficiency"] == pytest.approx(1.0)


def test_a_slow_network_exceeds_the_overlap_with_the_towers():
    fast, slow = (step_ms(Model(), Rates(bandwidth=x), 1024)["communication"] for x in (330.0, 16.5))
    assert slow > 100 > fast


def test_activations_are_fifteen_gigabytes():
    assert memory_bytes(Model(), 1)["activations"] == pytest.approx(15.0e9, rel=0.02)


def test_the_table_names_its_assumptions(tmp_path, capsys):
    assert main(["--out", str(tmp_path / "rows.jsonl")]) == 0
    output = capsys.readouterr().out
    assert output.startswith("Predicted, not measured. Assumed: towers_ms 52,")
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 11


@pytest.mark.slow
@pytest.mark.parametrize("wire", [4, 2], ids=["fp32", "bf16"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_predicted_bytes_equal_those_of_a_real_step(world_size, wire):
    model, sent = counted(world_size, wire)
    assert model.wire == wire
    predicted = sent_bytes(model, world_size)
    assert sum(sent.values()) == pytest.approx(sum(predicted.values()), rel=0.05)
    embeddings = sum(count for name, count in sent.items() if name != "all_reduce")
    assert embeddings == pytest.approx(predicted["gather"] + predicted["scatter"], rel=0.05)
