"""The generated pages are fresh."""

from __future__ import annotations

from hg_scale.config.docs import DOCS, json_schema, markdown


def test_the_page_is_fresh() -> None:
    assert (DOCS / "config.md").read_text(encoding="utf-8") == markdown(), "run `make docs`"


def test_the_json_schema_is_fresh() -> None:
    assert (DOCS / "config.schema.json").read_text(encoding="utf-8") == json_schema(), (
        "run `make docs`"
    )
