"""Docstrings state the thing: they open with a verb or a noun, never with a question word."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OPENING = re.compile(r"(What|How|Why|Whether|Of|Who|Those|Which|The same)\b")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
ROOMS = ("discovla", "kernels", "benchmarks", "tests", "docs")


@pytest.mark.parametrize("room", ROOMS)
def test_no_docstring_opens_with_a_question_word(room):
    wrong = [
        f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}: {text.splitlines()[0]}"
        for path in sorted((ROOT / room).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, DOCUMENTED) and (text := ast.get_docstring(node)) and OPENING.match(text)
    ]
    assert not wrong, "open the docstring with a verb or a noun:\n" + "\n".join(wrong)
