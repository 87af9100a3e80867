"""Write `docs/config.md` and the JSON Schema for editors: `python -m hg_scale.config.docs`."""

from __future__ import annotations

import json
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from hg_scale.config.load import section_models
from hg_scale.config.resampling_kind import POOLING_SHORTHAND, UPSAMPLING_SHORTHAND
from hg_scale.config.schema import SCHEMA_VERSION, Config

DOCS = Path(__file__).parents[2] / "docs"
_NAMES = {
    int: "integer",
    float: "number",
    str: "string",
    bool: "boolean",
    NoneType: "null",
}

HEADER = f"""# Configuration

Every key of `configs/*.json`, schema version {SCHEMA_VERSION}. This page is generated from \
`hg_scale/config/` by `make docs`.

- `"extends": "other.json"` merges a file over another one, key by key; the path is relative to it.
- `"notes"` is free text; `"$schema"` may name `docs/config.schema.json` for editors.
- `--set section.key=value` overrides any key; the value is JSON, or else text. `None`, `none`, \
`~` and `NULL` also mean null, `True` and `FALSE` also booleans, in any capitals. Text in quotes \
is never one of these: `--set "logging.wandb_name='none'"`.
- *By level*: one value, or a list with one value per level, full length first.
- Unknown keys are errors, and all errors are listed at once.
"""


def markdown() -> str:
    """Return `docs/config.md`: a table for each section."""
    parts = [HEADER]
    for name, model in section_models().items():
        summary = (model.__doc__ or "").split("\n")[0]
        parts.append(
            f"## {name}\n\n{summary}\n\n| key | type | default | meaning |\n| - | - | - | - |"
        )
        for key, field in model.model_fields.items():
            parts[-1] += "\n" + _row(f"{name}.{field.alias or key}", field)
            listed = "[]" if get_args(field.annotation) else ""  # an object, or a list of them
            for inner, entry in _entries(field.annotation).items():
                parts[-1] += "\n" + _row(f"{name}.{key}{listed}.{inner}", entry)
        parts[-1] += "\n"
    rest = [_row(k, f) for k, f in Config.model_fields.items() if k not in section_models()]
    head = "## Outside the sections\n\n| key | type | default | meaning |\n| - | - | - | - |\n"
    parts.append(head + "\n".join(rest) + "\n")
    return "\n".join(parts)


def _entries(annotation: Any) -> dict[str, FieldInfo]:
    """Return the keys of an object, or of the objects in a list; {} for other types."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation.model_fields
    return {key: entry for inner in get_args(annotation) for key, entry in _entries(inner).items()}


def _row(path: str, field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(default, BaseModel):
        default = default.model_dump()
    shown = "" if default is PydanticUndefined else f"`{json.dumps(default)}`"
    kind = " or ".join(dict.fromkeys(_kinds(field.annotation, field.metadata)))
    cells = (f"`{path}`", kind, shown, field.description or "")
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _kinds(annotation: Any, metadata: list[Any] | tuple[Any, ...] = ()) -> list[str]:
    """Return readable names of a type and its limits, one per choice of a union."""
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *extra = get_args(annotation)
        limits = [m for e in extra for m in (e.metadata if isinstance(e, FieldInfo) else [e])]
        return _kinds(inner, limits)
    if origin in (Union, UnionType):
        return [kind for choice in get_args(annotation) for kind in _kinds(choice)]
    if origin is Literal:
        return [f"`{json.dumps(value)}`" for value in get_args(annotation)]
    if origin is list:
        kinds = list(dict.fromkeys(_kinds(get_args(annotation)[0])))
        return ["list of " + (kinds[0] if len(kinds) == 1 else f"({' or '.join(kinds)})")]
    if origin is dict or (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
        return ["object"]
    return [_NAMES.get(annotation, str(annotation)) + _limits(metadata)]


def _limits(metadata: list[Any] | tuple[Any, ...]) -> str:
    names = ("ge", "gt", "le", "lt", "multiple_of")
    found = {
        name: f"{value:,}" if isinstance(value, int) else f"{value:g}"
        for limit in metadata
        for name in names
        if (value := getattr(limit, name, None)) is not None
    }
    if "ge" in found and "le" in found:
        found = {"from": f"{found.pop('ge')} to {found.pop('le')}"} | found
    signs = dict(zip(names, (">=", ">", "<=", "<", "a multiple of"), strict=True))
    terms = (f"{signs.get(name, name)} {value}" for name, value in found.items())
    return f" {', '.join(terms)}" if found else ""


def json_schema() -> str:
    """Return the JSON Schema for editors, with the keys that only files have."""
    schema = Config.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "hg_scale configuration"
    text = {"type": "string"}
    schema["properties"]["extends"] = text | {
        "description": "The file that this one is merged over."
    }
    schema["properties"]["$schema"] = text | {"description": "The JSON Schema, for editors."}
    shorthands = {"pooling": POOLING_SHORTHAND, "upsampling": UPSAMPLING_SHORTHAND}
    for key, shorthand in shorthands.items():
        schema["$defs"]["ModelConfig"]["properties"][key]["enum"] += shorthand
    return json.dumps(schema, indent=1) + "\n"


def write_docs() -> None:
    """Write both files."""
    (DOCS / "config.md").write_text(markdown(), encoding="utf-8")
    (DOCS / "config.schema.json").write_text(json_schema(), encoding="utf-8")


if __name__ == "__main__":
    write_docs()
