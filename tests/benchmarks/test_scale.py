"""The prediction of scale follows the plan's model, and its bytes are those of real runs."""

import pytest

from benchmarks.scale import Model, Rates, counted, main, memory_bytes, sent_bytes, step_ms


@pytest.mark.parametrize(
    ("world_size", "loss", "step"), [(8, 0.17, 52.8), (64, 1.4, 54.6), (256, 5.5, 59.1), (1024, 22.0, 76.0)]
)
def test_the_default_rates_give_the_step_of_the_published_model(world_size, loss, step):
    found = step_ms(Model(), Rates(), world_size)
    assert found["loss"] == pytest.approx(loss, rel=0.03)
    assert found["step"] == pytest.approx(step, rel=0.02)
    parts = sum(found[name] for name in ("towers", "loss", "communication", "straggler"))
    assert found["step"] == pytest.approx(parts)


def test_one_gpu_sends_nothing_and_is_all_of_its_own_efficiency():
    assert sum(sent_bytes(Model(), 1).values()) == 0
    assert step_ms(Model(), Rates(), 1)["efficiency"] == pytest.approx(1.0)


def test_a_slow_network_shows_beyond_what_the_towers_hide():
    fast, slow = (step_ms(Model(), Rates(bandwidth=x), 1024)["communication"] for x in (330.0, 16.5))
    assert slow > 100 > fast


def test_activations_are_the_plans_fifteen_gigabytes():
    assert memory_bytes(Model(), 1)["activations"] == pytest.approx(15.0e9, rel=0.02)


def test_the_table_names_what_it_assumes(tmp_path, capsys):
    assert main(["--out", str(tmp_path / "rows.jsonl")]) == 0
    said = capsys.readouterr().out
    assert said.startswith("Predicted, not measured. Assumed: towers_ms 52,")
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 11


@pytest.mark.slow
@pytest.mark.parametrize("wire", [4, 2], ids=["fp32", "bf16"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_bytes_of_the_formula_are_those_of_a_real_step(world_size, wire):
    model, sent = counted(world_size, wire)
    assert model.wire == wire
    wanted = sent_bytes(model, world_size)
    assert sum(sent.values()) == pytest.approx(sum(wanted.values()), rel=0.05)
    embeddings = sum(count for name, count in sent.items() if name != "all_reduce")
    assert embeddings == pytest.approx(wanted["gather"] + wanted["scatter"], rel=0.05)
