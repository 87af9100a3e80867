"""Read files and `--set` overrides into one tree of plain values, not yet validated.

JSON is read more strictly than Python does: no duplicate keys, and no values that would fail later.
"""

from __future__ import annotations

import difflib
import functools
import json
import os
import re
from pathlib import Path
from typing import Any

from hg_scale.config.errors import ConfigError, Problem, format_value

FILE_KEYS = ("extends", "$schema")  # keys of a file that are not keys of a configuration

_MAX_DEPTH = 64  # of nested objects and lists; far below the limit of Python's stack
_MAX_DIGITS = 20  # those of the largest unsigned 64-bit integer
# NUL, which no file name may contain, and lone UTF-16 surrogates, which cannot be encoded.
_INVALID_TEXT = re.compile("[\0\ud800-\udfff]")

_Location = tuple[str | int, ...]  # keys and list indices that lead to a value


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
        tree = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        candidates = [p.name for p in path.parent.glob("*.json") if _real_path(p) not in seen]
        nearest = difflib.get_close_matches(path.name, candidates, 1, 0.6)
        hint = f"; did you mean {path.parent / nearest[0]}?" if nearest else ""
        base_of = f", which {seen[-1]} extends" if seen else ""
        raise fail(f"no such file{base_of}{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise fail(f"cannot be read: {error}") from None
    except json.JSONDecodeError as error:
        raise fail(f"not JSON at line {error.lineno}, column {error.colno}: {error.msg}") from None
    except ConfigError as error:
        raise ConfigError(error.problems, str(path)) from None
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
    """Set `section.key=value` in `tree`; the value is JSON, or else a string."""

    def fail(key: str, message: str) -> ConfigError:
        return ConfigError([Problem(key, message)])

    _checked(text, ("--set",))
    key, _, raw = text.partition("=")
    *parents, last = parts = key.split(".")
    if "=" not in text or not all(parts):
        raise fail("--set", f"expected key.path=value, got '{text}'")
    if key in FILE_KEYS:
        raise fail(key, "cannot be set with --set: write it into the file")
    try:
        value = parse_json(raw, tuple(parts))
    except json.JSONDecodeError:
        value = _checked(raw, tuple(parts))
    node = tree
    for part in parents:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise fail(key, f"cannot be set with --set: '{part}' is not a section")
        node = child
    node[last] = value


def parse_json(text: str, location: _Location = ()) -> Any:
    """Parse the JSON in `text`, the value at `location`.

    Raises JSONDecodeError if it is not JSON, and ConfigError if it holds an unsupported value.
    """
    try:
        value = json.loads(text, object_pairs_hook=_Pairs, parse_int=_integer)
    except RecursionError:
        raise _too_deep(location) from None
    return _checked(value, location)


class _Pairs(list[tuple[str, Any]]):
    """The pairs of a JSON object: a dict would silently keep the last of duplicate keys."""


class _LongInteger(str):
    """The digits of an integer that is too long."""


def _integer(text: str) -> int | _LongInteger:
    return int(text) if len(text.lstrip("-")) <= _MAX_DIGITS else _LongInteger(text)


def _checked(value: Any, location: _Location) -> Any:
    """Return the value at `location` with dicts for objects; reject what would fail later."""
    if len(location) > _MAX_DEPTH:
        raise _too_deep(location)
    if isinstance(value, _LongInteger):
        raise _error_at(
            location, f"an integer of {len(value)} digits; at most {_MAX_DIGITS} are allowed"
        )
    if isinstance(value, str) and _INVALID_TEXT.search(value):
        raise _error_at(location, f"NUL or a lone surrogate in {format_value(value)}")
    if isinstance(value, _Pairs):
        tree: dict[str, Any] = {}
        for key, inner in value:
            _checked(key, location)
            if key in tree:
                raise _error_at(
                    (*location, key), "appears twice in one object; remove one of the two"
                )
            tree[key] = _checked(inner, (*location, key))
        return tree
    if isinstance(value, list):
        return [_checked(entry, (*location, i)) for i, entry in enumerate(value)]
    return value


def _too_deep(location: _Location) -> ConfigError:
    return _error_at(
        location[:4], f"objects or lists nest too deep; at most {_MAX_DEPTH} are allowed"
    )


def _error_at(location: _Location, message: str) -> ConfigError:
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return ConfigError([Problem("".join(parts).removeprefix(".") or "file", message)])
