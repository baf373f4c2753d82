"""Words of captions that tell the order of events, and exchanges that make such a caption false."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

# Phrases by which a caption tells the direction or the order of what happens.
WORDS = (
    *("then", "before", "after", "afterwards", "first", "finally", "until", "begins", "starts", "stops"),
    *("from", "into", "onto", "out of", "toward", "towards", "moves to", "goes to", "turns", "becomes"),
)
# Phrases that exchange their meaning when a clip is played backwards, or contradict each other.
EXCHANGES = (
    *(("before", "after"), ("appears", "disappears"), ("grows", "shrinks"), ("opens", "closes")),
    *(("opening", "closing"), ("enters", "leaves"), ("entering", "leaving"), ("rises", "falls")),
    *(("up", "down"), ("upward", "downward"), ("upwards", "downwards"), ("into", "out of")),
    *(("to the left", "to the right"), ("leftward", "rightward"), ("forward", "backward")),
    *(("forwards", "backwards"), ("starts", "stops"), ("puts on", "takes off"), ("fills", "empties")),
)
# Phrases before the one end of a motion that a caption names.
ENDS = (("moves to", "moves from"), ("goes to", "goes from"), ("walks to", "walks from"))
# The end of the second place of "from ... to ...".
_STOP = r"(?=\s+(?:and|then|while|as|before|after|when|until|with|by)\b|\s*[,.;:!?]|\s*$)"
_FROM_TO = re.compile(rf"\bfrom\s+((?:\w+\s+){{1,4}}?)to\s+(\w+(?:\s+\w+){{0,3}}?){_STOP}")
_THEN = re.compile(r"^(.*?\S)\s+((?:and\s+)?then)\s+(\S.*?)([.!]?)$")


@dataclass(frozen=True)
class OrderWords:
    """Words of a language that tell order.

    words: phrases that tell order.
    exchanges: pairs of phrases, each of which makes a caption false in the place of the other; they tell
        order too.
    ends: such pairs of phrases before a place to which, or from which, something moves.
    places_only: `exchanged` exchanges places and ends alone.
    """

    words: tuple[str, ...] = WORDS
    exchanges: tuple[tuple[str, str], ...] = EXCHANGES
    ends: tuple[tuple[str, str], ...] = ENDS
    places_only: bool = False

    def tells_order(self, caption: str) -> bool:
        """Return True if a caption has a phrase that tells order."""
        return self._order.search(caption.lower()) is not None

    def phrases(self, caption: str) -> list[str]:
        """Return the different phrases of a caption that tell order."""
        return sorted(set(self._order.findall(caption.lower())))

    def exchanged(self, caption: str, choice: int) -> str | None:
        """Return a caption with one exchange that makes it false; None if no exchange fits.

        Args:
            choice: selects among the exchanges that fit, modulo their number.
        """
        text = caption.lower()
        changed = self._of_places(text) if self.places_only else self.exchanges_of(text)
        return changed[choice % len(changed)] if changed else None

    def exchanges_of(self, caption: str) -> list[str]:
        """Return a caption with each exchange that fits and makes it false.

        The exchanges are: of the places in each "from P to Q" and of "to" and "from" where one place is
        named, of what "then" joins, and one for each phrase that has a partner.
        """
        text = caption.lower()
        changed = self._of_places(text)
        if (match := _THEN.match(text)) and match[1] != match[3] and not re.search(r"\bthen\b", match[3]):
            changed.append(f"{match[3]} {match[2]} {match[1]}{match[4]}")
        for match in self._exchanges.finditer(text):
            changed.append(text[: match.start()] + self._partners[match[0]] + text[match.end() :])
        return changed

    def _of_places(self, text: str) -> list[str]:
        """Return a lower-case caption with each exchange of places and of ends."""
        changed, both = [], list(_FROM_TO.finditer(text))
        for match in both:
            if match[1].strip() != match[2]:
                places = f"from {match[2]} to {match[1].strip()}"
                changed.append(text[: match.start()] + places + text[match.end() :])
        other, ends = self._ends
        for match in ends.finditer(text):
            if not any(x.start() < match.end() <= x.end() for x in both):
                changed.append(text[: match.start()] + other[match[0]] + text[match.end() :])
        return changed

    @cached_property
    def _ends(self) -> tuple[dict[str, str], re.Pattern[str]]:
        other = {a: b for pair in self.ends for a, b in (pair, pair[::-1])}
        return other, _any_of(tuple(other))

    @cached_property
    def _partners(self) -> dict[str, str]:
        return {a: b for pair in self.exchanges for a, b in (pair, pair[::-1])}

    @cached_property
    def _order(self) -> re.Pattern[str]:
        return _any_of((*self.words, *self._partners))

    @cached_property
    def _exchanges(self) -> re.Pattern[str]:
        return _any_of(tuple(self._partners))


def read_order_words(path: Path | None) -> OrderWords:
    """Read order words from a TOML file: `words`, a list, and `exchanges`, a list of pairs; None for English.

    Raises:
        ValueError: the file cannot be read, or has other contents.
    """
    if path is None:
        return OrderWords()
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"order_words: {path}: expected a TOML file, found: {error}") from None
    words, exchanges = table.pop("words", []), table.pop("exchanges", [])
    if table:
        raise ValueError(
            f"order_words: {path}: expected the keys words and exchanges, found {next(iter(table))!r}"
        )
    if not _are_phrases(words):
        raise ValueError(f"order_words: {path}: words: expected a list of phrases, found {words!r}")
    if not isinstance(exchanges, list) or not all(_are_phrases(x) and len(x) == 2 for x in exchanges):
        raise ValueError(f"order_words: {path}: exchanges: expected pairs of phrases, found {exchanges!r}")
    if not words and not exchanges:
        raise ValueError(f"order_words: {path}: expected words or exchanges, found neither")
    lower = tuple((a.lower(), b.lower()) for a, b in exchanges)
    return OrderWords(words=tuple(word.lower() for word in words), exchanges=lower, ends=())


def _are_phrases(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(x, str) and x.strip() for x in value)


def _any_of(phrases: Sequence[str]) -> re.Pattern[str]:
    """Return a pattern that matches any of the phrases as whole words, the longest first."""
    if not phrases:
        return re.compile("(?!)")
    ordered = sorted(set(phrases), key=len, reverse=True)
    return re.compile(r"\b(?:" + "|".join(map(re.escape, ordered)) + r")\b")
