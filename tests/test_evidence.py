"""The table of README.md agrees with the evidence on record."""

from __future__ import annotations

from tests.evidence import EVIDENCE, FOLDER, README, header_of, replace_table


def test_readme_shows_the_evidence_on_record() -> None:
    page = README.read_text()
    assert replace_table(page) == page, "README.md: run python -m tests.evidence"


def test_every_file_of_evidence_names_command_date_and_commit() -> None:
    files = sorted(FOLDER.glob("*.txt"))
    assert {file.stem for file in files} <= set(EVIDENCE)
    for file in files:
        assert list(header_of(file)) == ["command", "date", "commit", "result"]
