"""`discovla config`: every key of a config with its value, default, type and meaning."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from discovla.config import RunConfig, apply_override, parse_config, read_values, submodel
from discovla.methods import METHODS

REQUIRED = "(required)"
TYPES = {bool: "true | false", int: "integer", float: "number", str: "string", Path: "path"}
BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


@dataclass(frozen=True, kw_only=True)
class Key:
    """One key of a config; values and defaults as JSON, the default of a required key is `REQUIRED`."""

    key: str
    value: Any
    default: Any
    type: str
    doc: str
    source: Literal["default", "file", "override"]


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the command and its options."""
    text = (
        "Print every key of a config with its value, default, type and meaning, and where the value is from. "
        "Without CONFIG it prints the defaults; method.name=NAME chooses the method."
    )
    parser = commands.add_parser("config", help=text, description=text)
    parser.add_argument("words", nargs="*", metavar="[CONFIG] a.b=c", help="TOML of a run, then overrides")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print a JSON list, one object per key")
    form.add_argument("--markdown", action="store_true", help="print a reference of all keys of all methods")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    if arguments.markdown:
        print(markdown())
        return
    words: list[str] = arguments.words
    path = words.pop(0) if words and "=" not in words[0] else None
    keys = config_keys(path, words)
    if arguments.json:
        print(json.dumps([asdict(key) for key in keys], indent=2))
        return
    print(text_of(keys, width=shutil.get_terminal_size().columns, bold=sys.stdout.isatty()))
    if path is None:
        print(f"\nmethod.name is one of {', '.join(METHODS)}.")


def config_keys(path: Path | str | None = None, overrides: Sequence[str] = ()) -> list[Key]:
    """Return every key of a config in order; without a path, of the defaults with overrides.

    Raises:
        ConfigError: as `read_config`.
    """
    in_file = {} if path is None else read_values(path)
    values = json.loads(json.dumps(in_file, default=str))
    for word in overrides:
        apply_override(values, word)
    overridden = [word.partition("=")[0] for word in overrides]
    if path is None:  # what has no default
        values = {"directory": REQUIRED, **values}
        values["method"] = {"name": "discovla"} | values.get("method", {})
        values["data"] = {"manifest": REQUIRED} | values.get("data", {})
    config = parse_config(values, "config" if path is None else str(path))

    def source(key: str) -> Literal["default", "file", "override"]:
        if key == "method.name" and "method" in overridden:
            return "override"
        if not _has(values, key):
            return "default"
        if any(key == word or key.startswith(f"{word}.") for word in overridden):
            return "override"
        return "file" if path is not None else "default"

    return [
        Key(
            key=key,
            value=value,
            default=_default(field),
            type=type_name(field),
            doc=" ".join((field.description or "").split()),
            source=source(key),
        )
        for key, field, value in _fields(
            RunConfig, config.model_dump(mode="json"), method=type(config.method)
        )
    ]


def text_of(keys: Sequence[Key], *, width: int, bold: bool) -> str:
    """Lay the keys out for a terminal: key and value, type, meaning, wrapped to `width`."""
    lines, section = [], ""
    indent = " " * 4
    for key in keys:
        table = key.key.rpartition(".")[0]
        if table != section:
            lines.append("")
            section = table
        name = f"\x1b[1m{key.key}\x1b[0m" if bold else key.key
        lines.append(f"{name} = {toml(key.value)}{_origin(key)}")
        for paragraph in (key.type, key.doc):
            lines += textwrap.wrap(
                paragraph,
                min(width, 110),
                initial_indent=indent,
                subsequent_indent=indent,
                break_on_hyphens=False,
                break_long_words=False,
            )
    return "\n".join(lines)


def _origin(key: Key) -> str:
    """Say where a value is from, and the default it replaces."""
    if key.source == "default":
        return ""
    if key.default in (REQUIRED, key.value):
        return f"  ({key.source})"
    return f"  ({key.source}; default {toml(key.default)})"


def markdown() -> str:
    """Return the reference of all keys: a table for each config class, and one for each method."""
    lines = []
    rows: dict[str, list[tuple[str, FieldInfo]]] = {}
    for key, field, _ in _fields(RunConfig, {}, method=None):
        rows.setdefault(key.rpartition(".")[0], []).append((key, field))
    for table, fields in rows.items():
        lines += _markdown_table(f"`[{table}]`" if table else "Run", fields)
    for name, method in METHODS.items():
        fields = [(f"method.{key}", field) for key, field in method.Config.model_fields.items()]
        lines += _markdown_table(f"`[method]` of {name}", fields)
    return "\n".join(lines)


def _markdown_table(title: str, fields: Sequence[tuple[str, FieldInfo]]) -> list[str]:
    lines = [f"## {title}", "", "| key | default | type | meaning |", "|---|---|---|---|"]
    for key, field in fields:
        doc = " ".join((field.description or "").split())
        cells = [f"`{key}`", f"`{toml(_default(field))}`", f"`{type_name(field)}`", doc]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return [*lines, ""]


def _fields(
    model: type[BaseModel],
    values: Mapping[str, Any] | None,
    *,
    method: type[BaseModel] | None,
    prefix: str = "",
) -> Iterator[tuple[str, FieldInfo, Any]]:
    """Yield (dotted key, field, value) of a config class and the tables in it, in the order of the file.

    Args:
        values: dumped values; defaults stand in for missing ones.
        method: config class of the method; None leaves methods out.
    """
    tables = []
    for name, field in model.model_fields.items():
        child = submodel(field.annotation)
        value = (values or {}).get(name, _default(field))
        if child is None or NoneType in get_args(field.annotation):
            yield prefix + name, field, value
        if child is not None:
            tables.append((name, child, value if isinstance(value, Mapping) else None))
    for name, child, value in tables:
        if prefix + name != "method":
            yield from _fields(child, value, method=method, prefix=f"{prefix}{name}.")
        elif method is not None:
            yield from _fields(method, value, method=method, prefix="method.")


def type_name(field: FieldInfo) -> str:
    """Return the type of a field as a reader of TOML knows it, with its bounds: `integer >= 1`."""
    bounds = [
        f"{sign} {limit:g}"
        for bound in field.metadata
        for attribute, sign in BOUNDS.items()
        if (limit := getattr(bound, attribute, None)) is not None
    ]
    return " ".join([_annotation_name(field.annotation), " and ".join(bounds)]).rstrip()


def _annotation_name(annotation: Any) -> str:
    if annotation in TYPES:
        return TYPES[annotation]
    if annotation is Ellipsis:  # of a tuple of any length
        return "..."
    arguments = get_args(annotation)
    if get_origin(annotation) is Literal:
        return " | ".join(map(toml, arguments))
    if get_origin(annotation) in (tuple, list):
        return f"[{', '.join(map(_annotation_name, arguments))}]"
    if arguments:  # a union; a key of value None is left out of a file
        return " | ".join(_annotation_name(option) for option in arguments if option is not NoneType)
    assert submodel(annotation) is not None, annotation
    return "table"


def toml(value: Any) -> str:
    """Return a JSON value as TOML; None, which TOML has not, as `unset`."""
    if value is None:
        return "unset"
    if value == REQUIRED:
        return REQUIRED
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {toml(item)}" for key, item in value.items()) + "}"
    return json.dumps(value)


def _default(field: FieldInfo) -> Any:
    if field.is_required():
        return REQUIRED
    return to_jsonable_python(field.get_default(call_default_factory=True))


def _has(values: Mapping[str, Any], key: str) -> bool:
    """True if nested tables have a dotted key."""
    value: Any = values
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return False
        value = value[part]
    return True
