"""From files and `--set` overrides to one tree of plain values, not yet checked against the schema.

JSON is read more strictly than Python does: no key twice, and nothing that only fails later on.
"""

from __future__ import annotations

import difflib
import functools
import json
import os
import re
from pathlib import Path
from typing import Any

from hg_scale.config.errors import ConfigError, Problem, short_value

FILE_KEYS = ("extends", "$schema")  # keys of a file that are not keys of a configuration

_DEEPEST = 64  # objects and lists in each other; far from the limits of Python's stack
_DIGITS = 20  # of the largest unsigned number of 64 bits
# NUL, which no file name holds, and halves of UTF-16 pairs, which no encoding writes.
_NO_TEXT = re.compile("[\0\ud800-\udfff]")

_Place = tuple[str | int, ...]  # keys and positions that lead to a value


def read_tree(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, merged over the file that it extends (relative to itself)."""
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
        seen.append(_real(path))
        path = path.parent / base


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # Path.resolve() raises on a loop of links


def _read_file(path: Path, seen: list[Path]) -> dict[str, Any]:
    def fail(message: str) -> ConfigError:
        return ConfigError([Problem("file", message)], str(path))

    if _real(path) in seen:
        raise fail("it extends itself: " + " -> ".join(p.name for p in (*seen, path)))
    try:
        tree = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        there = [p.name for p in path.parent.glob("*.json") if _real(p) not in seen]
        nearest = difflib.get_close_matches(path.name, there, 1, 0.4)
        hint = f"; did you mean {path.parent / nearest[0]}?" if nearest else ""
        whose = f", which {seen[-1]} extends" if seen else ""
        raise fail(f"no such file{whose}{hint}") from None
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
    """`over` laid over `base`, object by object; lists and plain values are replaced."""
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

    _plain(text, ("--set",))
    key, _, raw = text.partition("=")
    *parents, last = parts = key.split(".")
    if "=" not in text or not all(parts):
        raise fail("--set", f"expected key.path=value, got '{text}'")
    if key in FILE_KEYS:
        raise fail(key, "cannot be set with --set: write it into the file")
    try:
        value = parse_json(raw, tuple(parts))
    except json.JSONDecodeError:
        value = _plain(raw, tuple(parts))
    node = tree
    for part in parents:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise fail(key, f"cannot be set with --set: '{part}' is not a section")
        node = child
    node[last] = value


def parse_json(text: str, place: _Place = ()) -> Any:
    """The value in `text`, which stands at `place`.

    Raises JSONDecodeError where it is not JSON, and ConfigError where it is no use.
    """
    try:
        value = json.loads(text, object_pairs_hook=_Pairs, parse_int=_integer)
    except RecursionError:
        raise _too_deep(place) from None
    return _plain(value, place)


class _Pairs(list[tuple[str, Any]]):
    """An object as it was read; JSON would silently take the last of keys that stand twice."""


class _Digits(str):
    """An integer that is too long to be one."""


def _integer(text: str) -> int | _Digits:
    return int(text) if len(text.lstrip("-")) <= _DIGITS else _Digits(text)


def _plain(value: Any, place: _Place) -> Any:
    """What was read at `place`, in dicts, without anything that would only fail later on."""
    if len(place) > _DEEPEST:
        raise _too_deep(place)
    if isinstance(value, _Digits):
        raise _refusal(place, f"an integer of {len(value)} digits; at most {_DIGITS} will do")
    if isinstance(value, str) and _NO_TEXT.search(value):
        raise _refusal(place, f"NUL or half a character (a lone surrogate) in {short_value(value)}")
    if isinstance(value, _Pairs):
        tree: dict[str, Any] = {}
        for key, inner in value:
            _plain(key, place)
            if key in tree:
                raise _refusal((*place, key), "stands twice in one object; keep one of the two")
            tree[key] = _plain(inner, (*place, key))
        return tree
    if isinstance(value, list):
        return [_plain(entry, (*place, i)) for i, entry in enumerate(value)]
    return value


def _too_deep(place: _Place) -> ConfigError:
    return _refusal(place[:4], f"objects or lists nest too deep; at most {_DEEPEST} will do")


def _refusal(place: _Place, message: str) -> ConfigError:
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    return ConfigError([Problem("".join(parts).removeprefix(".") or "file", message)])
