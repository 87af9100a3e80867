"""Read files and `--set` overrides into one tree of plain values, not yet validated.

JSON is read more strictly than Python does: no duplicate keys, and no values that would fail later.
"""

from __future__ import annotations

import difflib
import functools
import os
from pathlib import Path
from typing import Any

from hg_scale.bounded_read import (
    TEXT_BYTES,
    FormatError,
    JsonPath,
    NotJson,
    format_location,
    parse_json,
    read_text,
    require_plain,
)
from hg_scale.config.errors import ConfigError, Problem

FILE_KEYS = ("extends", "$schema")  # keys of a file that are not keys of a configuration

# In any capitals, what Python and YAML write for values of JSON.
_WORDS = {"null": None, "none": None, "~": None, "true": True, "false": False}


def read_tree(path: Path) -> dict[str, Any]:
    """Read the JSON object in `path`, merged over the file it extends (relative to itself)."""
    trees: list[dict[str, Any]] = []
    seen: list[Path] = []
    while True:
        tree = _read_file(path, seen)
        base = tree.pop("extends", None)
        tree.pop("$schema", None)
        trees.append(tree)
        if base is None:
            return functools.reduce(merge, reversed(trees))
        if not isinstance(base, str):
            raise ConfigError([Problem("extends", "expected a file name", base)], str(path))
        seen.append(_real_path(path))
        path = path.parent / base


def _real_path(path: Path) -> Path:
    return Path(os.path.realpath(path))  # Path.resolve() raises on a loop of symbolic links


def _read_file(path: Path, seen: list[Path]) -> dict[str, Any]:
    def fail(message: str) -> ConfigError:
        return ConfigError([Problem("file", message)], str(path))

    if _real_path(path) in seen:
        raise fail("it extends itself: " + " -> ".join(p.name for p in (*seen, path)))
    try:
        tree = parse_json(read_text(path, TEXT_BYTES), finite=False)
    except FileNotFoundError:
        candidates = [p.name for p in path.parent.glob("*.json") if _real_path(p) not in seen]
        nearest = difflib.get_close_matches(path.name, candidates, 1, 0.6)
        hint = f"; did you mean {path.parent / nearest[0]}?" if nearest else ""
        base_of = f", which {seen[-1]} extends" if seen else ""
        raise fail(f"no such file{base_of}{hint}") from None
    except OSError as error:
        raise fail(f"cannot be read: {error}") from None
    except FormatError as error:
        raise _config_error(error, str(path)) from None
    if not isinstance(tree, dict):
        raise fail('expected an object, as in {"model": {...}}')
    return tree


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Merge `over` over `base`, object by object; lists and plain values are replaced."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        result[key] = merge(old, value) if both else value  # type: ignore[arg-type]
    return result


def apply_override(tree: dict[str, Any], text: str) -> None:
    """Set `section.key=value` in `tree`; the value is as in `parse_value`."""

    def fail(key: str, message: str) -> ConfigError:
        return ConfigError([Problem(key, message)])

    try:
        require_plain(text, ("--set",))
    except FormatError as error:
        raise _config_error(error) from None
    key, _, raw = text.partition("=")
    *parents, last = parts = key.split(".")
    if "=" not in text or not all(parts):
        raise fail("--set", f"expected key.path=value, got '{text}'")
    if key in FILE_KEYS:
        raise fail(key, "cannot be set with --set: write it into the file")
    value = parse_value(raw, tuple(parts))
    node = tree
    for part in parents:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise fail(key, f"cannot be set with --set: '{part}' is not a section")
        node = child
    node[last] = value


def parse_value(text: str, location: JsonPath = ()) -> Any:
    """Parse the value of an override at `location`: JSON, a word of `_WORDS`, or else a string.

    A text in quotes, double or single, is a string without them. Raises ConfigError if it holds an
    unsupported value.
    """
    try:
        return _parse_value(text, location)
    except FormatError as error:
        raise _config_error(error) from None


def _parse_value(text: str, location: JsonPath) -> Any:
    try:
        return parse_json(text, location, finite=False)  # the schema reports NaN and infinity
    except NotJson:
        pass
    if (word := text.strip().lower()) in _WORDS:
        return _WORDS[word]
    quoted = len(text) >= 2 and text[0] == text[-1] == "'"
    return require_plain(text[1:-1] if quoted else text, location)


def _config_error(error: FormatError, source: str = "") -> ConfigError:
    key = format_location(error.location) or "file"
    return ConfigError([Problem(key, error.message)], source)
