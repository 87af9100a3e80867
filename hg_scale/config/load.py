"""Load and validate a configuration; all errors are reported at once."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from hg_scale.config.checks import cross_checks
from hg_scale.config.data_section import SourceConfig
from hg_scale.config.errors import ConfigError, Problem, format_value
from hg_scale.config.read import FILE_KEYS, apply_override, read_tree
from hg_scale.config.schema import Config

_Path = tuple[str, ...]  # keys from the top; a key may hold a dot itself


def load_config(
    path: str | Path, overrides: Sequence[str] = (), *, world_size: int | None = None
) -> Config:
    """Load a configuration file and the files it extends, and apply `key.path=value` overrides.

    `world_size`: the number of processes, to check the layout against it; None: unknown. Raises
    ConfigError with all errors.
    """
    if isinstance(overrides, str):
        message = 'expected a list of "key.path=value"; put the one override in a list'
        raise ConfigError([Problem("overrides", message, overrides)])
    tree = read_tree(Path(path))
    problems: list[Problem] = []
    for text in overrides:
        try:
            apply_override(tree, text)
        except ConfigError as error:
            problems += error.problems
    return parse_config(tree, source=str(path), world_size=world_size, problems=problems)


def parse_config(
    tree: dict[str, Any],
    *,
    source: str = "",
    world_size: int | None = None,
    problems: Sequence[Problem] = (),
) -> Config:
    """Validate a tree of plain values. Raises ConfigError with all errors.

    Invalid keys are replaced by their defaults, so that the cross checks can look at the rest. A
    cross check that depends on an invalid key is not reported: it may be a mere consequence.
    """
    found, invalid = list(problems), {problem.key for problem in problems}
    rest = tree
    for _ in range(20):  # a default may cause the next error; each round removes at least one key
        try:
            config = Config.model_validate(rest)
            break
        except ValidationError as error:
            rest, round_found = _remove_invalid_keys(rest, error)
            invalid |= {problem.key for problem in round_found}
            found += round_found
    else:
        raise ConfigError(found, source)
    for problem in cross_checks(config, world_size):
        keys = (problem.key, *problem.depends_on)
        if not any(_overlap(key, other) for key in keys for other in invalid):
            found.append(_add_values(problem, config))
    if found:
        raise ConfigError(found, source)
    return config


def _overlap(a: str, b: str) -> bool:
    """Whether two dotted keys are equal, or one contains the other."""
    return a == b or a.startswith(b + ".") or b.startswith(a + ".")


def _add_values(problem: Problem, config: Config) -> Problem:
    """Append the keys that a problem depends on, unless the message has their path and value."""
    tree = config.model_dump()
    values = {key: format_value(_lookup(tree, key.split("."))) for key in problem.depends_on}
    missing = [
        f"{key} = {value}"
        for key, value in values.items()
        if key != problem.key and not _mentions(problem.message, key, value.strip('"'))
    ]
    message = f"{problem.message} (with {', '.join(missing)})" if missing else problem.message
    return dataclasses.replace(problem, message=message)


def _mentions(message: str, key: str, value: str) -> bool:
    return bool(re.search(rf"{re.escape(key)}\b.*(?<!\w){re.escape(value)}(?!\w)", message))


def _remove_invalid_keys(
    tree: dict[str, Any], error: ValidationError
) -> tuple[dict[str, Any], list[Problem]]:
    """Return the tree without its invalid keys, and the problems."""
    rest = copy.deepcopy(tree)
    by_path: dict[_Path, list[dict[str, Any]]] = {}
    for item in error.errors():
        by_path.setdefault(_key_path(item["loc"]), []).append(item)  # type: ignore[arg-type]
    problems = []
    for path, items in by_path.items():
        problems.append(_describe(path, items, tree))
        node = _lookup(rest, path[:-1])
        if isinstance(node, dict):
            node.pop(path[-1], None)
    return rest, problems


def _key_path(loc: tuple[int | str, ...]) -> _Path:
    """Return the keys of a pydantic location, without list indices and union branches."""
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
    return tuple(parts)


def _lookup(tree: Any, path: Sequence[str]) -> Any:
    """Return the value at `path`; None if there is none."""
    for part in path:
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def _describe(path: _Path, items: list[dict[str, Any]], tree: dict[str, Any]) -> Problem:
    """Turn pydantic's errors at one key into a problem."""
    key, value = ".".join(path) or '""', _lookup(tree, path)
    # The location continues with an index in a list of objects, with a name in a union.
    entries = [
        item
        for item in items
        if len(item["loc"]) > len(path) + 1 and isinstance(item["loc"][len(path)], int)
    ]
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value) and entries:
        return Problem(key, "; ".join(_describe_entry(i, len(path)) for i in entries))
    kinds = {item["type"] for item in items}
    if "extra_forbidden" in kinds:
        return Problem(key, f"unknown key; {_hint(path, value)}", value)
    allowed = ", or ".join(dict.fromkeys(map(_expected, items)))
    if all(item["type"] == "value_error" for item in items):
        return Problem(key, allowed, value)
    return Problem(key, f"expected {allowed}{_remark(items)}", value)


def _remark(items: list[dict[str, Any]]) -> str:
    """What to do about a value that may have been meant otherwise, as in --set key=none."""
    given, kinds = items[0]["input"], {item["type"] for item in items}
    if given is None:
        return "; this key cannot be null"
    if "string_type" in kinds and isinstance(given, bool | int | float):
        return f"; in quotes it is a text: '{format_value(format_value(given))}'"
    return ""


def _hint(path: _Path, value: Any) -> str:
    """Suggest what an unknown key may have meant."""
    *section, key = path
    known = _keys_by_section(Config)
    known[()] += FILE_KEYS
    siblings = known[tuple(section)]
    parts = [part for part in key.split(".") if part]
    if len(parts) > 1 and parts[0] in siblings:
        nested = functools.reduce(lambda inner, part: {part: inner}, reversed(parts), value)
        return f"write an object, {format_value(nested)}; dots work with --set only"
    word = parts[-1].lower() if parts else ""
    elsewhere = [
        ".".join((*path, name)) if path else f"{name} at the top of the file"
        for path, names in known.items()
        for name in names
        if word in (name, _initials(name))
    ]
    nearest = [name for name in siblings if word in (name, _initials(name))]
    if not (nearest or elsewhere):
        nearest = difflib.get_close_matches(word, siblings, 1, 0.5)
    meant = [".".join((*section, name)) for name in nearest] or elsewhere
    return f"did you mean {' or '.join(meant)}?" if meant else f"known keys: {', '.join(siblings)}"


def _keys_by_section(model: type[BaseModel], path: _Path = ()) -> dict[_Path, list[str]]:
    """Return the keys of a section and of the sections inside it, by the path of the section."""
    keys = {path: keys_of(model)}
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            keys |= _keys_by_section(inner, (*path, name))
    return keys


def _initials(key: str) -> str | None:
    """Return the common abbreviation of a key of several words: lr, wd."""
    words = key.split("_")
    return "".join(word[:1] for word in words) if len(words) > 1 else None


def _expected(item: dict[str, Any]) -> str:
    """Return what pydantic expected, in the terms of JSON."""
    kind, context = item["type"], item.get("ctx", {})
    if kind in ("dict_type", "model_type"):
        return 'an object, as in {"key": value}'
    if kind == "too_short":
        return f"at least {context['min_length']} entries, got {context['actual_length']}"
    if kind == "too_long":
        return f"at most {context['max_length']} entries, got {context['actual_length']}"
    return item["msg"].removeprefix("Value error, ").removeprefix("Input should be ")


def _describe_entry(item: dict[str, Any], depth: int) -> str:
    """Describe an error in an object of a list, whose index follows after `depth` keys."""
    number, key = item["loc"][depth], item["loc"][-1]
    where = f"entry {number + 1}, {key}"
    if item["type"] == "missing":
        return f"{where}: missing"
    where += f" = {format_value(item['input'])}"
    if item["type"] == "extra_forbidden":
        known = keys_of(SourceConfig)
        nearest = difflib.get_close_matches(key.lower(), known, 1, 0.5)
        hint = f"did you mean {nearest[0]}?" if nearest else f"known keys: {', '.join(known)}"
        return f"{where}: unknown key; {hint}"
    return f"{where}: {item['msg'].replace('Input should be', 'expected')}"


def keys_of(model: type[BaseModel]) -> list[str]:
    """Return the keys of a section as they are written in a file."""
    return [field.alias or name for name, field in model.model_fields.items()]


def section_models() -> dict[str, type[BaseModel]]:
    """Return the sections of a configuration by name, in order."""
    return {
        name: field.annotation
        for name, field in Config.model_fields.items()
        if isinstance(field.annotation, type)
        and not get_args(field.annotation)
        and issubclass(field.annotation, BaseModel)
    }
