"""Properties that the schema derives from its values."""

from __future__ import annotations

from typing import get_args

import pytest

from hg_scale.config.data_section import SourceConfig
from hg_scale.config.resampling_kind import Pooling, ResamplingKind, Upsampling
from hg_scale.config.schema import ModelConfig


@pytest.mark.parametrize(
    ("path", "label"),
    [
        ("corpora/enwik8/", "enwik8"),
        ("https://host:80/corpora/enwik8", "enwik8"),
        ("pipe:cat /data/enwik8/{}", "enwik8"),
        ("pipe:aws s3 cp s3://bucket/enwik8/{} -", "enwik8"),
    ],
)
def test_label_of_a_source(path: str, label: str) -> None:
    assert SourceConfig(path=path).label == label
    assert SourceConfig(path=path, name="mine").label == "mine"


@pytest.mark.parametrize(
    ("keys", "pooling", "upsampling"),
    [
        ({}, (True, "average"), (True, "repeat")),
        ({"pooling": "attention", "upsampling": "attention"}, (True, "average"), (True, "repeat")),
        ({"pooling": "linear", "upsampling": "repeat"}, (False, "linear"), (False, "repeat")),
        ({"upsampling": "attention+none"}, (True, "average"), (True, "none")),
    ],
)
def test_resampling_kinds_are_parsed(
    keys: dict[str, str], pooling: tuple[bool, str], upsampling: tuple[bool, str]
) -> None:
    model = ModelConfig(**keys)
    assert model.pooling_kind == ResamplingKind(*pooling)
    assert model.upsampling_kind == ResamplingKind(*upsampling)


def test_every_resampling_kind_parses_to_its_parts() -> None:
    for text in (*get_args(Pooling), *get_args(Upsampling)):
        kind = ResamplingKind.parse(text)
        assert text == ("attention+" if kind.attends else "") + kind.base
