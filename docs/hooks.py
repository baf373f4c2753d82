"""MkDocs hook: fill pages with the config reference, the list of models and other documents."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from discovla.commands import config, models

ROOT = Path(__file__).parents[1]
CONFIG = "<!-- config reference -->"
MODELS = "<!-- models -->"
INCLUDE = re.compile(r"<!-- include ([\w./]+) -->")
LINK = re.compile(r"\[([^\]]+)\]\((?!https?:|#)([^)]+)\)")


def on_page_markdown(text: str, **_: Any) -> str:
    """Replace the markers of a page by the text they stand for."""
    text = INCLUDE.sub(lambda match: _document(match[1]), text)
    text = text.replace(CONFIG, config.markdown()) if CONFIG in text else text
    return text.replace(MODELS, models.markdown()) if MODELS in text else text


def _document(path: str) -> str:
    """A document of the repository; links to pages of the site are adapted, other links become text."""

    def link(match: re.Match[str]) -> str:
        label, target = match.groups()
        return f"[{label}]({target.removeprefix('docs/')})" if target.startswith("docs/") else f"`{target}`"

    return LINK.sub(link, (ROOT / path).read_text())
