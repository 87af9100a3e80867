"""The table of the keys of `metrics.jsonl`, and the page made from it."""

from __future__ import annotations

from hg_scale.training.metric_keys import DOCS_PAGE, KNOWN_KEYS, SECTIONS, metrics_page


def test_the_page_is_up_to_date() -> None:
    assert DOCS_PAGE.read_text(encoding="utf-8") == metrics_page(), "run: make docs"


def test_every_key_has_a_meaning_and_is_listed_once_in_its_section() -> None:
    for title, _, keys in SECTIONS:
        names = [key.name for key in keys]
        assert len(names) == len(set(names)), title
        assert all(key.meaning.endswith(".") for key in keys)
    assert {"step", "loss", "validation_loss", "skipped", "job", "start"} <= KNOWN_KEYS
