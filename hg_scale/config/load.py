"""From what was read to a checked `Config`: every fault found in one pass."""

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
from hg_scale.config.errors import ConfigError, Problem, short_value
from hg_scale.config.read import FILE_KEYS, apply_override, read_tree
from hg_scale.config.schema import Config, SourceConfig

_Path = tuple[str, ...]  # keys from the top; a key may hold a dot itself


def load_config(
    path: str | Path, overrides: Sequence[str] = (), *, world_size: int | None = None
) -> Config:
    """Read a configuration file, what it extends, and `key.path=value` overrides.

    `world_size` is the number of processes where it is known. Raises ConfigError listing all
    faults at once.
    """
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
    """Validate a tree of plain values. Raises ConfigError with every fault at once.

    Faulty keys are set back to their defaults to let the cross checks look at the rest; a cross
    check that involves a faulty key is left out, since it may only echo the fault.
    """
    found, bad = list(problems), {problem.key for problem in problems}
    rest = tree
    for _ in range(20):  # a default may bring up the next fault; each round removes at least one
        try:
            config = Config.model_validate(rest)
            break
        except ValidationError as error:
            rest, round_found = _set_aside(rest, error)
            bad |= {problem.key for problem in round_found}
            found += round_found
    else:
        raise ConfigError(found, source)
    for problem in cross_checks(config, world_size):
        if not any(_related(key, b) for key in (problem.key, *problem.others) for b in bad):
            found.append(_with_others(problem, config))
    if found:
        raise ConfigError(found, source)
    return config


def _related(a: str, b: str) -> bool:
    return a == b or a.startswith(b + ".") or b.startswith(a + ".")


def _with_others(problem: Problem, config: Config) -> Problem:
    """The problem, with those of its other keys that the message leaves without path or value."""
    values = config.model_dump()
    told = {key: short_value(_lookup(values, key.split("."))) for key in problem.others}
    left = [
        f"{key} = {value}"
        for key, value in told.items()
        if key != problem.key and not _tells(problem.message, key, value.strip('"'))
    ]
    message = f"{problem.message} (with {', '.join(left)})" if left else problem.message
    return dataclasses.replace(problem, message=message)


def _tells(message: str, key: str, value: str) -> bool:
    return bool(re.search(rf"{re.escape(key)}\b.*(?<!\w){re.escape(value)}(?!\w)", message))


def _set_aside(
    tree: dict[str, Any], error: ValidationError
) -> tuple[dict[str, Any], list[Problem]]:
    """The tree without its faulty keys, and the faults in words."""
    rest = copy.deepcopy(tree)
    by_path: dict[_Path, list[dict[str, Any]]] = {}
    for item in error.errors():
        by_path.setdefault(_key_path(item["loc"]), []).append(item)  # type: ignore[arg-type]
    problems = []
    for path, items in by_path.items():
        problems.append(_in_words(path, items, tree))
        node = _lookup(rest, path[:-1])
        if isinstance(node, dict):
            node.pop(path[-1], None)
    return rest, problems


def _key_path(loc: tuple[int | str, ...]) -> _Path:
    """The keys of a pydantic location, without list positions and union branches."""
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
    """What stands at `path`; None where nothing does."""
    for part in path:
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def _in_words(path: _Path, items: list[dict[str, Any]], tree: dict[str, Any]) -> Problem:
    key, value = ".".join(path) or '""', _lookup(tree, path)
    # Inside an object of a list, its number comes next; in a union, the name of a branch.
    entries = [
        item
        for item in items
        if len(item["loc"]) > len(path) + 1 and isinstance(item["loc"][len(path)], int)
    ]
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value) and entries:
        return Problem(key, "; ".join(_entry_in_words(i, len(path)) for i in entries))
    kinds = {item["type"] for item in items}
    if "extra_forbidden" in kinds:
        return Problem(key, f"unknown key; {_hint(path, value)}", value)
    allowed = ", or ".join(dict.fromkeys(map(_expected, items)))
    if all(item["type"] == "value_error" for item in items):
        return Problem(key, allowed, value)
    return Problem(key, f"expected {allowed}", value)


def _hint(path: _Path, value: Any) -> str:
    """What may have been meant by a key that is not known."""
    *section, key = path
    homes = _homes(Config)
    homes[()] += FILE_KEYS
    here = homes[tuple(section)]
    parts = [part for part in key.split(".") if part]
    if len(parts) > 1 and parts[0] in here:
        nested = functools.reduce(lambda inner, part: {part: inner}, reversed(parts), value)
        return f"write an object, {short_value(nested)}; only --set takes dots"
    word = parts[-1].lower() if parts else ""
    elsewhere = [
        ".".join((*home, known)) if home else f"{known} at the top of the file"
        for home, keys in homes.items()
        for known in keys
        if word in (known, _initials(known))
    ]
    nearest = [known for known in here if word in (known, _initials(known))]
    if not (nearest or elsewhere):
        nearest = difflib.get_close_matches(word, here, 1, 0.5)
    meant = [".".join((*section, known)) for known in nearest] or elsewhere
    return f"did you mean {' or '.join(meant)}?" if meant else f"known here: {', '.join(here)}"


def _homes(model: type[BaseModel], path: _Path = ()) -> dict[_Path, list[str]]:
    """The keys of a section, and of those inside it, by the path of each."""
    homes = {path: keys_of(model)}
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            homes |= _homes(inner, (*path, name))
    return homes


def _initials(key: str) -> str | None:
    """As people shorten a key of several words: lr, wd."""
    words = key.split("_")
    return "".join(word[:1] for word in words) if len(words) > 1 else None


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
    where = f"entry {number + 1}, {key}"
    if item["type"] == "missing":
        return f"{where}: missing"
    where += f" = {short_value(item['input'])}"
    if item["type"] == "extra_forbidden":
        known = keys_of(SourceConfig)
        nearest = difflib.get_close_matches(key.lower(), known, 1, 0.5)
        hint = f"did you mean {nearest[0]}?" if nearest else f"known here: {', '.join(known)}"
        return f"{where}: unknown key; {hint}"
    return f"{where}: {item['msg'].replace('Input should be', 'expected')}"


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
