"""The prepared corpora that a configuration names."""

from __future__ import annotations

import time
from pathlib import Path

from hg_scale.config.errors import ConfigError, Problem
from hg_scale.config.schema import Config, SourceConfig
from hg_scale.data.errors import DataError
from hg_scale.data.index import Index, is_local, read_index
from hg_scale.data.schedule import Source
from hg_scale.data.shards import Patience
from hg_scale.data.tokenizer import ByteTokenizer


def open_sources(config: Config) -> list[Source]:
    """The indexes that `data.path` or `data.sources` name, checked against the model.

    Raises ConfigError where one does not suit, DataError where it cannot be read.
    """
    if not config.data.corpora:
        raise ConfigError(
            [Problem("data.path", "no data: set it to a folder made by data_prep/*.py", None)]
        )
    key = "data.path" if config.data.sources is None else "data.sources"
    sources = []
    for corpus in config.data.corpora:
        index = _open(corpus, key, config)
        _check(config, corpus, key, index)
        again = corpus.when_exhausted == "repeat"
        sources.append(Source(corpus.label, index, corpus.weight, again))
    known: dict[str, Source] = {}
    for source in sources:
        other = known.setdefault(source.index.identity, source)
        if other is not source:
            problem = Problem(
                key, f"{other.name!r} and {source.name!r} are the same data; keep one"
            )
            raise ConfigError([problem])
    return sources


def patience(config: Config) -> Patience:
    """How long to wait for data, as configured."""
    return Patience(config.data.retries, config.data.timeout)


def bytes_per_token(sources: list[Source]) -> float:
    """Bytes of text that a training token stands for, over the mixture of the sources."""
    weights = sum(source.weight for source in sources)
    splits = [(source.weight, source.index.split("train")) for source in sources]
    return sum(weight * split.text_bytes / split.tokens for weight, split in splits) / weights


def _open(corpus: SourceConfig, key: str, config: Config) -> Index:
    path, retries, pause = corpus.path, config.data.retries, 0.5
    if is_local(path) and not Path(path).is_dir():
        bytes_alone = config.model.vocab_size <= ByteTokenizer(documents=True).vocab_size
        script = "prepare_bytes.py" if bytes_alone else "prepare_text.py --tokenizer MODEL"
        advice = f"make it with data_prep/{script} --input CORPUS --output {path}"
        raise ConfigError([Problem(key, f"no such folder; {advice}", path)])
    while True:
        try:
            return read_index(path, config.data.timeout)
        except DataError:
            if is_local(path) or not retries:
                raise
        time.sleep(pause)
        retries, pause = retries - 1, 2 * pause


def _check(config: Config, corpus: SourceConfig, key: str, index: Index) -> None:
    if index.vocab_size > config.model.vocab_size:
        problem = Problem(
            "model.vocab_size",
            f"the data in {corpus.path} has ids up to {index.vocab_size - 1}; use "
            f"{index.vocab_size}",
            config.model.vocab_size,
        )
        raise ConfigError([problem])
    wanted, found = config.data.tokenizer, index.tokenizer.model_dump()
    checksum = str(found.get("sha256") or "")
    if wanted and wanted != found["name"] and not (len(wanted) > 7 and checksum.startswith(wanted)):
        made = " ".join(filter(None, (found["name"], checksum[:12])))
        problem = Problem(
            "data.tokenizer",
            f"the data in {corpus.path} was made with {made} (vocabulary {index.vocab_size}); "
            f"prepare it with {wanted}, or correct the key",
            wanted,
        )
        raise ConfigError([problem])
    if "train" not in index.splits:
        raise ConfigError([Problem(key, f"{corpus.path} has no training split", corpus.path)])
