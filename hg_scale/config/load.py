"""From files and `--set` overrides to a checked `Config`: every fault found in one pass."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from hg_scale.config.checks import cross_checks
from hg_scale.config.errors import ConfigError, Problem
from hg_scale.config.schema import Config

_FILE_KEYS = ("extends", "$schema")  # keys of a file that are not keys of a configuration


def load_config(
    path: str | Path, overrides: Sequence[str] = (), *, world_size: int | None = None
) -> Config:
    """Read a configuration file, what it extends, and `key.path=value` overrides.

    `world_size` is the number of processes where it is known. Raises ConfigError listing all
    faults at once.
    """
    tree = read_tree(Path(path))
    problems = [p for p in (apply_override(tree, text) for text in overrides) if p]
    return parse_config(tree, source=str(path), world_size=world_size, problems=problems)


def read_tree(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The JSON object in `path`, merged over the file that it extends (relative to itself)."""

    def fail(message: str) -> ConfigError:
        return ConfigError([Problem("file", message)], str(path))

    if path.resolve() in seen:
        raise fail("it extends itself: " + " -> ".join(p.name for p in (*seen, path)))
    try:
        tree = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_repeats)
    except FileNotFoundError:
        there = [p.name for p in path.parent.glob("*.json") if p.resolve() not in seen]
        nearest = difflib.get_close_matches(path.name, there, 1, 0.4)
        hint = f"; did you mean {path.parent / nearest[0]}?" if nearest else ""
        whose = f", which {seen[-1]} extends" if seen else ""
        raise fail(f"no such file{whose}{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise fail(f"cannot be read: {error}") from None
    except json.JSONDecodeError as error:
        raise fail(f"not JSON at line {error.lineno}, column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise fail("not a configuration: objects or lists in it nest too deep") from None
    except _Repeated as error:
        raise fail(f"the key {error} stands twice in one object; keep one of the two") from None
    if not isinstance(tree, dict):
        raise fail('expected an object, as in {"model": {...}}')
    base = tree.pop("extends", None)
    tree.pop("$schema", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise ConfigError([Problem("extends", "expected a file name", base)], str(path))
    return merge(read_tree(path.parent / base, (*seen, path.resolve())), tree)


class _Repeated(Exception):
    """A key that stands twice; JSON would silently take the last one."""


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in pairs:
        if key in tree:
            raise _Repeated(f"'{key}'")
        tree[key] = value
    return tree


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid over `base`, object by object; lists and plain values are replaced."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        result[key] = merge(old, value) if both else value  # type: ignore[arg-type]
    return result


def apply_override(tree: dict[str, Any], text: str) -> Problem | None:
    """Set `section.key=value` in `tree`; the value is JSON, or else a string."""
    key, equals, raw = text.partition("=")
    if not equals or not key:
        return Problem("--set", f"expected key.path=value, got '{text}'")
    try:
        value = json.loads(raw)
    except json.JSONDecodeError:
        value = raw
    node = tree
    *parents, last = key.split(".")
    if key in _FILE_KEYS:
        return Problem(key, "cannot be set with --set: write it into the file")
    if not all((*parents, last)):
        return Problem("--set", f"expected key.path=value, got '{text}'")
    for part in parents:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            return Problem(key, f"cannot be set with --set: '{part}' is not a section")
        node = child
    node[last] = value
    return None


def parse_config(
    tree: dict[str, Any],
    *,
    source: str = "",
    world_size: int | None = None,
    problems: Sequence[Problem] = (),
) -> Config:
    """Validate a tree of plain values. Raises ConfigError with every fault at once.

    Faulty keys are set back to their defaults to let the cross checks look at the rest; a cross
    check that involves a faulty key is left out, since it may only echo the fault.
    """
    found = list(problems)
    rest, bad = tree, set()
    for _ in range(20):  # a default may bring up the next fault; each round removes at least one
        try:
            config = Config.model_validate(rest)
            break
        except ValidationError as error:
            rest, round_bad, round_found = _set_aside(rest, error)
            bad |= round_bad
            found += round_found
    else:
        raise ConfigError(found, source)
    for problem in cross_checks(config, world_size):
        if not any(_related(key, b) for key in (problem.key, *problem.others) for b in bad):
            found.append(problem)
    if found:
        raise ConfigError(found, source)
    return config


def _related(a: str, b: str) -> bool:
    return a == b or a.startswith(b + ".") or b.startswith(a + ".")


def _set_aside(
    tree: dict[str, Any], error: ValidationError
) -> tuple[dict[str, Any], set[str], list[Problem]]:
    """The tree without its faulty keys, their dotted paths, and the faults in words."""
    rest = json.loads(json.dumps(tree))
    by_key: dict[str, list[dict[str, Any]]] = {}
    for item in error.errors():
        path = _key_path(item["loc"])
        by_key.setdefault(path, []).append(item)  # type: ignore[arg-type]
    problems = []
    for path, items in by_key.items():
        problems.append(_in_words(path, items, tree))
        node, parts = rest, path.split(".")
        for part in parts[:-1]:
            node = node.get(part, {}) if isinstance(node, dict) else {}
        if isinstance(node, dict):
            node.pop(parts[-1], None)
    return rest, set(by_key), problems


def _key_path(loc: tuple[int | str, ...]) -> str:
    """The dotted key of a pydantic location, without list positions and union branches."""
    model: Any = Config
    parts: list[str] = []
    for part in loc:
        if not isinstance(part, str):
            break
        parts.append(part)
        field = model.model_fields.get(part)
        model = field.annotation if field else None
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            break
    return ".".join(parts)


def _lookup(tree: Any, path: str) -> Any:
    for part in path.split("."):
        tree = tree[part]
    return tree


def _in_words(path: str, items: list[dict[str, Any]], tree: dict[str, Any]) -> Problem:
    *parents, last = path.split(".")
    value = _lookup(tree, path)
    entries = [item for item in items if len(item["loc"]) > len(parents) + 2]
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value) and entries:
        return Problem(path, "; ".join(_entry_in_words(i, len(parents) + 1) for i in entries))
    kinds = {item["type"] for item in items}
    if "extra_forbidden" in kinds:
        model: Any = Config
        for part in parents:
            model = model.model_fields[part].annotation
        known = keys_of(model) + (list(_FILE_KEYS) if model is Config else [])
        nearest = difflib.get_close_matches(last, known, 1, 0.5)
        elsewhere = [
            f"{name}.{last}"
            for name, field in Config.model_fields.items()
            if isinstance(field.annotation, type)
            and issubclass(field.annotation, BaseModel)
            and last in keys_of(field.annotation)
        ]
        hint = nearest[0] if nearest else None
        if elsewhere:
            hint = elsewhere[0]
        elif hint and parents:
            hint = ".".join((*parents, hint))
        message = (
            f"unknown key; did you mean {hint}?"
            if hint
            else (f"unknown key; known here: {', '.join(known)}")
        )
        return Problem(path, message)
    allowed = ", or ".join(dict.fromkeys(map(_expected, items)))
    if all(item["type"] == "value_error" for item in items):
        return Problem(path, allowed, value)
    return Problem(path, f"expected {allowed}", value)


def _expected(item: dict[str, Any]) -> str:
    """What pydantic expected, in words of JSON's."""
    kind, context = item["type"], item.get("ctx", {})
    if kind in ("dict_type", "model_type"):
        return 'an object, as in {"key": value}'
    if kind == "too_short":
        return f"at least {context['min_length']} entries, got {context['actual_length']}"
    if kind == "too_long":
        return f"at most {context['max_length']} entries, got {context['actual_length']}"
    return item["msg"].removeprefix("Value error, ").removeprefix("Input should be ")


def _entry_in_words(item: dict[str, Any], depth: int) -> str:
    """A fault of one key of an object in a list, whose location starts after `depth` keys."""
    number, key = item["loc"][depth], item["loc"][-1]
    messages = {"extra_forbidden": "unknown key", "missing": "missing"}
    message = messages.get(item["type"], item["msg"].replace("Input should be", "expected"))
    return f"entry {number + 1}, {key}: {message}"


def keys_of(model: type[BaseModel]) -> list[str]:
    """The keys of a section as a file spells them."""
    return [field.alias or name for name, field in model.model_fields.items()]


def section_models() -> dict[str, type[BaseModel]]:
    """The sections of a configuration by name, in order."""
    return {
        name: field.annotation
        for name, field in Config.model_fields.items()
        if isinstance(field.annotation, type)
        and not get_args(field.annotation)
        and issubclass(field.annotation, BaseModel)
    }
