"""MkDocs hook: write the config reference into its page when the site is built."""

from __future__ import annotations

from typing import Any

from discovla.commands.config import markdown

MARKER = "<!-- config reference -->"


def on_page_markdown(text: str, **_: Any) -> str:
    """Replace the marker by the reference of every config key."""
    return text.replace(MARKER, markdown()) if MARKER in text else text
