"""What the schema derives from its values."""

from __future__ import annotations

import pytest

from hg_scale.config.schema import SourceConfig


@pytest.mark.parametrize(
    ("path", "label"),
    [
        ("corpora/enwik8/", "enwik8"),
        ("https://host:80/corpora/enwik8", "enwik8"),
        ("pipe:cat /data/enwik8/{}", "enwik8"),
        ("pipe:aws s3 cp s3://bucket/enwik8/{} -", "enwik8"),
    ],
)
def test_the_name_of_a_source(path: str, label: str) -> None:
    assert SourceConfig(path=path).label == label
    assert SourceConfig(path=path, name="mine").label == "mine"
