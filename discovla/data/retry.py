"""Asking a server again for what may come a moment later."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

Value = TypeVar("Value")

PASSING = (408, 409, 425, 429, 500, 502, 503, 504)  # answers of servers that may answer otherwise later


class Passing(Exception):
    """A failure that may pass, in words."""


@dataclass(frozen=True, kw_only=True)
class Tries:
    """count: of one thing, at least 1.  wait: seconds before the second, doubled before each further one.
    longest: the most seconds between two."""

    count: int
    wait: float
    longest: float = 60.0

    def of(self, ask: Callable[[], Value], say: Callable[[str], object] = str) -> Value:
        """What `ask` gives, once it does.

        Args:
            say: told what failed and which try it was, before the next one.

        Raises:
            Passing: that of the last try.
            Exception: what else `ask` raises, at once.
        """
        for number in range(1, self.count):
            try:
                return ask()
            except Passing as error:
                say(f"{error}, attempt {number} of {self.count}")
            time.sleep(min(self.wait * 2 ** (number - 1), self.longest))
        return ask()
