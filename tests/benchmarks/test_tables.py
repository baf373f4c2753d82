import pytest

from benchmarks import tables


@pytest.mark.parametrize("page", tables.PAGES)
def test_the_tables_of_a_page_are_those_of_the_results(page):
    text = (tables.ROOT / page).read_text()
    assert tables.BLOCK.search(text), "it has tables"
    assert tables.filled(text) == text, "run python benchmarks/tables.py"


def test_a_block_is_filled_and_the_rest_left_alone(monkeypatch):
    monkeypatch.setitem(tables.TABLES, "ladder", lambda: "| 1 |")
    page = "a\n<!-- table ladder -->\nold\n<!-- end -->\nb <!-- end -->\n"
    assert tables.filled(page) == "a\n<!-- table ladder -->\n| 1 |\n<!-- end -->\nb <!-- end -->\n"


def test_a_table_that_is_not_known_is_refused():
    with pytest.raises(ValueError, match="table ladders: expected one of ladder, "):
        tables.filled("<!-- table ladders -->\n<!-- end -->")


def test_checking_says_which_page_is_old(monkeypatch, tmp_path, capsys):
    for page in tables.PAGES:
        (tmp_path / page).parent.mkdir(exist_ok=True)
        (tmp_path / page).write_text("<!-- table ladder -->\nold\n<!-- end -->\n")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    assert tables.main(["--check"]) == 1
    assert "README.md, benchmarks/README.md: older than the results" in capsys.readouterr().err
    assert tables.main([]) == 0
    assert tables.main(["--check"]) == 0
