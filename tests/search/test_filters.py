"""Conditions on columns are parsed by us, and nothing else is run."""

import numpy as np
import pytest

from discovla.search.filters import DEEPEST, Column, rows_where

COLUMNS = {
    "year": Column.of([2019, 2021, None, 2024]),
    "score": Column.of([0.5, 1.5, 2.5, -1]),
    "title": Column.of(["A dog", "two cats", "dog's 100%", None]),
    "odd name": Column.of([1, 2, 3, 4]),
}


def rows(condition: str) -> list[int]:
    return np.flatnonzero(rows_where(condition, COLUMNS)).tolist()


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("year > 2020", [1, 3]),
        ("year = 2021", [1]),
        ("year == 2021 or year <> 2024", [0, 1]),
        ("not year > 2020", [0]),
        ("year is null", [2]),
        ("not year is not null", [2]),
        ("score <= -1", [3]),
        ("score < 1e0", [0, 3]),
        ("title like '%dog%'", [0, 2]),
        ("title like '_ dog'", [0]),
        ("title not like '%DOG%'", [1]),
        ("title in ('A dog', 'two cats')", [0, 1]),
        ("year not in (2019, 2021)", [3]),
        ("title = 'dog''s 100%'", [2]),
        ("year > 2020 and score > 0 or title = 'A dog'", [0, 1]),
        ("year > 2020 and (score > 0 or title = 'A dog')", [1]),
        ("year > 2020 AND NOT score > 0", [3]),
        ("`odd name` >= 3", [2, 3]),
    ],
)
def test_conditions(condition, expected):
    assert rows(condition) == expected


@pytest.mark.parametrize(
    ("condition", "part"),
    [
        ("", "found none"),
        ("month = 1", "one of the columns year, score, title, odd name, found month"),
        ("year > '2020'", "a number to compare the column year with"),
        ("title > 3", "a text in quotes to compare"),
        ("year like '2%'", "expected a column of text before 'like', found year"),
        ("year > 2020; drop table moments", "found '; drop table moments'"),
        ("year > 2020 drop", "'and', 'or' or the end, found 'drop'"),
        ("(year > 2020", "')'"),
        ("1 = 1", "the name of a column"),
        ("year = (select 1)", "a number"),
        ("title = 'a' or 1 = 1", "the name of a column"),
        ("year -- comment", "a column, value or comparison, found '-- comment'"),
        ("__import__('os').system('true')", "found \".system('true')\""),
        ("title = 'unclosed", 'found "\'unclosed"'),
        ("x" * 3000, "at most 2000 characters"),
        ("(" * (DEEPEST + 1) + "year = 1" + ")" * (DEEPEST + 1), "nested parentheses"),
    ],
)
def test_anything_else_is_refused_in_one_line(condition, part):
    with pytest.raises(ValueError, match=r"^where: ") as error:
        rows(condition)
    assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_a_pattern_of_many_wildcards_takes_no_exponential_time():
    columns = {"title": Column.of(["a" * 1500])}
    assert not rows_where(f"title like '{'%a' * 200}b'", columns).any()


def test_numbers_and_texts_make_a_column_of_text():
    assert Column.of([1, "two"]).type == "text"
    assert Column.of([1, 2]).type == "int"
    assert Column.of([1, 2.5, None]).type == "float"
    assert Column.of([None]).type == "text"
