"""Conditions on columns: `year > 2020 and (title like '%dog%' or not tag in ('a', 'b'))`.

    condition   = all { "or" all }
    all         = one { "and" one }
    one         = "not" one | "(" condition ")" | comparison
    comparison  = NAME ( "=" | "==" | "!=" | "<>" | "<" | "<=" | ">" | ">=" ) value
                | NAME [ "not" ] "in" "(" value { "," value } ")"
                | NAME [ "not" ] "like" TEXT        with % for any text and _ for any letter
                | NAME "is" [ "not" ] "null"

A column without a value for a video makes a comparison neither true nor false, as in SQL.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from discovla.search.records import Value

LONGEST = 2000  # characters
DEEPEST = 50  # parentheses and "not" in each other
_TOKEN = re.compile(
    r"\s*(?:(?P<number>-?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)"
    r"|(?P<text>'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\")"
    r"|(?P<name>[^\W\d]\w*|`[^`]+`)"
    r"|(?P<mark><=|>=|<>|!=|==|[=<>(),]))"
)
_WORDS = {"and", "or", "not", "in", "like", "is", "null", "true", "false"}
_COMPARED = {
    "=": np.equal,
    "==": np.equal,
    "!=": np.not_equal,
    "<>": np.not_equal,
    "<": np.less,
    "<=": np.less_equal,
    ">": np.greater,
    ">=": np.greater_equal,
}

Truth = tuple[np.ndarray, np.ndarray]  # n bool each: is true, is false; neither where a value is missing


@dataclass(frozen=True, kw_only=True)
class Column:
    """Values of a column, one a row.

    type: "text", "int" or "float".
    values: n, texts as objects and numbers as float64.  known: n bool, false where a value is missing.
    """

    type: str
    values: np.ndarray
    known: np.ndarray

    @classmethod
    def of(cls, values: list[Value]) -> Column:
        """Make a column of numbers if all its values are numbers, of text otherwise."""
        known = np.array([value is not None for value in values], bool)
        numbers = [isinstance(value, int | float) for value in values if value is not None]
        if numbers and all(numbers):
            whole = all(isinstance(value, int) for value in values if value is not None)
            filled = [np.nan if value is None else float(value) for value in values]
            return cls(type="int" if whole else "float", values=np.array(filled, np.float64), known=known)
        texts = np.array(["" if value is None else str(value) for value in values], object)
        return cls(type="text", values=texts, known=known)


def rows_where(condition: str, columns: Mapping[str, Column]) -> np.ndarray:
    """Return the rows for which a condition is true, n bool.

    Raises:
        ValueError: it is no condition on these columns.
    """
    return _Parser(condition, columns).parse()[0]


class _Parser:
    """Evaluates a condition while it is parsed, from left to right."""

    def __init__(self, text: str, columns: Mapping[str, Column]) -> None:
        if len(text) > LONGEST:
            raise ValueError(f"where: expected at most {LONGEST} characters, found {len(text)}")
        self.columns, self.tokens, self.place, self.depth = columns, _tokens(text), 0, 0

    def parse(self) -> Truth:
        truth = self._any()
        if self.place < len(self.tokens):
            raise self._wrong("'and', 'or' or the end")
        return truth

    def _any(self) -> Truth:
        truth = self._all()
        while self._take("or"):
            other = self._all()
            truth = truth[0] | other[0], truth[1] & other[1]
        return truth

    def _all(self) -> Truth:
        truth = self._one()
        while self._take("and"):
            other = self._one()
            truth = truth[0] & other[0], truth[1] | other[1]
        return truth

    def _one(self) -> Truth:
        self.depth += 1
        if self.depth > DEEPEST:
            raise ValueError(f"where: expected at most {DEEPEST} nested parentheses and nots")
        if self._take("not"):
            is_true, is_false = self._one()
            truth = is_false, is_true
        elif self._take("("):
            truth = self._any()
            self._expect(")")
        else:
            truth = self._comparison()
        self.depth -= 1
        return truth

    def _comparison(self) -> Truth:
        name = self._name()
        column = self.columns[name]
        if self._take("is"):
            wanted = not self._take("not")
            self._expect("null")
            is_null = ~column.known if wanted else column.known
            return is_null, ~is_null
        negated = self._take("not")
        if self._take("in"):
            self._expect("(")
            values = [self._value(name)]
            while self._take(","):
                values.append(self._value(name))
            self._expect(")")
            matches = np.logical_or.reduce([np.equal(column.values, value) for value in values])
        elif self._take("like"):
            matches = self._like(name)
        elif not negated and self._peek()[1] in _COMPARED:
            compare = _COMPARED[self._next()[1]]
            matches = compare(column.values, self._value(name))
        else:
            raise self._wrong("'in' or 'like'" if negated else "a comparison")
        matches = np.asarray(matches, bool)
        if negated:
            matches = ~matches
        return matches & column.known, ~matches & column.known

    def _like(self, name: str) -> np.ndarray:
        """Match a text column with a pattern, ignoring case."""
        if self.columns[name].type != "text":
            raise ValueError(f"where: expected a column of text before 'like', found {name}, of numbers")
        kind, text = self._peek()
        if kind != "text":
            raise self._wrong("a text in quotes after 'like'")
        self._next()
        pattern = _unquoted(text).casefold()
        texts, inverse = np.unique(self.columns[name].values.astype(str), return_inverse=True)
        return np.array([_is_like(one.casefold(), pattern) for one in texts.tolist()], bool)[inverse]

    def _name(self) -> str:
        kind, text = self._peek()
        name = text.strip("`")
        if kind != "name" or (name.lower() in _WORDS and not text.startswith("`")):
            raise self._wrong("the name of a column")
        if name not in self.columns:
            raise ValueError(f"where: expected one of the columns {', '.join(self.columns)}, found {name}")
        self._next()
        return name

    def _value(self, name: str) -> str | float:
        kind, text = self._peek()
        wanted = "text" if self.columns[name].type == "text" else "number"
        if wanted == "number" and text.lower() in ("true", "false"):
            self._next()
            return float(text.lower() == "true")
        if kind != wanted:
            quoted = " in quotes" if wanted == "text" else ""
            raise self._wrong(f"a {wanted}{quoted} to compare the column {name} with")
        self._next()
        return _unquoted(text) if kind == "text" else float(text)

    def _peek(self) -> tuple[str, str]:
        return self.tokens[self.place] if self.place < len(self.tokens) else ("end", "")

    def _next(self) -> tuple[str, str]:
        token = self._peek()
        self.place += 1
        return token

    def _take(self, word: str) -> bool:
        """Skip a word or mark if it is the next one."""
        kind, text = self._peek()
        if kind not in ("name", "mark") or text.lower() != word:
            return False
        self.place += 1
        return True

    def _expect(self, word: str) -> None:
        if not self._take(word):
            raise self._wrong(repr(word))

    def _wrong(self, expected: str) -> ValueError:
        kind, text = self._peek()
        return ValueError(
            f"where: expected {expected}, found {'the end' if kind == 'end' else repr(text[:60])}"
        )


def _tokens(text: str) -> list[tuple[str, str]]:
    """Split a condition into numbers, texts, names and marks."""
    tokens, place = [], 0
    text = text.rstrip()
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            raise ValueError(
                f"where: expected a column, value or comparison, found {text[place:].lstrip()[:40]!r}"
            )
        kind: Any = match.lastgroup
        tokens.append((kind, match[kind]))
        place = match.end()
    if not tokens:
        raise ValueError("where: expected a condition, found none")
    return tokens


def _unquoted(text: str) -> str:
    quote = text[0]
    return text[1:-1].replace(2 * quote, quote)


def _is_like(text: str, pattern: str) -> bool:
    """Match a text with % and _, in time of the order of their lengths' product."""
    place = star = mark = 0
    resumed = False
    while place < len(text):
        if mark < len(pattern) and pattern[mark] == "%":
            star, resumed, resume_at, mark = mark, True, place, mark + 1
        elif mark < len(pattern) and pattern[mark] in ("_", text[place]):
            place, mark = place + 1, mark + 1
        elif resumed:
            resume_at += 1
            place, mark = resume_at, star + 1
        else:
            return False
    return all(one == "%" for one in pattern[mark:])
