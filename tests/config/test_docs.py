"""The generated documentation is up to date."""

from __future__ import annotations

from hg_scale.config.docs import DOCS, json_schema, markdown


def test_config_page_is_up_to_date() -> None:
    assert (DOCS / "config.md").read_text(encoding="utf-8") == markdown(), "run `make docs`"


def test_json_schema_is_up_to_date() -> None:
    assert (DOCS / "config.schema.json").read_text(encoding="utf-8") == json_schema(), (
        "run `make docs`"
    )
