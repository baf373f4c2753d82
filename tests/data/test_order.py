"""Tests of captions that tell an order, and of the exchanges that make them false."""

import pytest

from discovla.data.order import OrderWords, read_order_words
from discovla.drawn_world.synthetic import first_caption
from discovla.drawn_world.wording import Clause, Statement, holds

ENGLISH = OrderWords()


@pytest.mark.parametrize(
    "caption",
    [
        "a ring moves from the left to the top",
        "A man opens a door",
        "she sits then stands",
        "a cat climbs up",
    ],
)
def test_captions_with_order_words_tell_order(caption):
    assert ENGLISH.tells_order(caption)


@pytest.mark.parametrize("caption", ["a man talks to a woman", "two upset dogs", "a cup on the table", ""])
def test_other_captions_do_not(caption):
    assert not ENGLISH.tells_order(caption)
    assert ENGLISH.exchanged(caption, 0) is None


def every_exchange(caption: str) -> set[str | None]:
    return {ENGLISH.exchanged(caption, choice) for choice in range(12)}


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a ring moves from the left to the top", {"a ring moves from the top to the left"}),
        ("he walks from the car to the house and waves", {"he walks from the house to the car and waves"}),
        ("a man sits then a dog barks", {"a dog barks then a man sits"}),
        ("a man sits and then a dog barks.", {"a dog barks and then a man sits."}),
        ("a ring appears", {"a ring disappears"}),
        (
            "He opens the door before he waves",
            {"he closes the door before he waves", "he opens the door after he waves"},
        ),
        ("a ball rolls to the left", {"a ball rolls to the right"}),
        ("she stands then sits then runs", {None}),
        ("a ring moves to the top", {"a ring moves from the top"}),
        ("a man walks from the car", {"a man walks to the car"}),
        (
            "a ring moves from the left to the top while a dot goes from the top to the right",
            {
                "a ring moves from the top to the left while a dot goes from the top to the right",
                "a ring moves from the left to the top while a dot goes from the right to the top",
                "a ring moves from the left to the top while a dot goes from the top to the left",
            },
        ),
    ],
)
def test_exchanges(caption, expected):
    assert every_exchange(caption) == expected


def test_exchanges_of_places_alone():
    places = OrderWords(places_only=True)
    caption = "a ring appears then a dot moves to the top"
    assert places.exchanged(caption, 5) == "a ring appears then a dot moves from the top"
    assert places.exchanged("a ring appears then a dot grows", 0) is None
    assert places.tells_order("a ring appears then a dot grows")


def test_every_exchange_makes_a_caption_of_the_drawn_world_false():
    words = {"appears": "appears", "disappears": "disappears", "grows": "grows", "shrinks": "shrinks"}
    checked = 0
    for index in range(150):
        scene, statement, caption = first_caption(0, "test", index)
        for changed in every_exchange(caption) - {None}:
            assert changed != caption
            first, second = statement.clauses
            if statement.order == "then" and changed == every_exchange_of_clauses(caption):
                assert not holds(Statement(clauses=(second, first), order="then"), scene)
                checked += 1
            elif first.kind in words and first.kind not in changed.split() and second.kind not in words:
                partner = {
                    "appears": "disappears",
                    "disappears": "appears",
                    "grows": "shrinks",
                    "shrinks": "grows",
                }
                false: Clause = Clause(**{**vars(first), "kind": partner[first.kind]})
                assert not holds(Statement(clauses=(false, second), order=statement.order), scene)
                checked += 1
    assert checked > 30


def every_exchange_of_clauses(caption: str) -> str:
    connector = " and then " if " and then " in caption else " then "
    first, second = caption.split(connector)
    return connector.join((second, first))


def test_words_of_another_language_replace_the_english_ones(tmp_path):
    path = tmp_path / "de.toml"
    path.write_text('words = ["danach"]\nexchanges = [["öffnet", "schließt"]]\n')
    german = read_order_words(path)
    assert german.tells_order("Danach lacht er") and not german.tells_order("he opens it")
    assert german.exchanged("Er öffnet die Tür", 3) == "er schließt die tür"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("words = 3", "words: expected a list of phrases, found 3"),
        ('exchanges = [["up"]]', "exchanges: expected pairs of phrases"),
        ('word = ["up"]', "expected the keys words and exchanges, found 'word'"),
        ("", "expected words or exchanges, found neither"),
        ("words = [", "expected a TOML file"),
    ],
)
def test_a_faulty_file_is_named(tmp_path, text, message):
    (tmp_path / "x.toml").write_text(text)
    with pytest.raises(ValueError, match=r"order_words: .*x\.toml: ") as error:
        read_order_words(tmp_path / "x.toml")
    assert message in str(error.value)
