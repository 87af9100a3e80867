"""The prepared corpora that a configuration names."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

from hg_scale.config.data_section import SourceConfig
from hg_scale.config.errors import ConfigError, Problem
from hg_scale.config.schema import Config
from hg_scale.data.errors import DataError
from hg_scale.data.index import Index, is_local, read_index
from hg_scale.data.sequence_schedule import DataSource
from hg_scale.data.shards import RetryPolicy
from hg_scale.data.tokenizer import ByteTokenizer

_NO_DATA = "no data: set it to a folder written by data_prep/*.py"


def open_sources(config: Config, *, remote: bool = True) -> list[DataSource]:
    """Open the corpora of `data.path` or `data.sources`, and check them against the model.

    `remote`: also those behind a URL or a pipe. Raises ConfigError with all problems, DataError
    where a remote index cannot be read.
    """
    corpora = config.data.corpora
    if not corpora:
        raise ConfigError([Problem("data.path", _NO_DATA, None)])
    sources: list[DataSource] = []
    problems: list[Problem] = []
    for number, corpus in enumerate(corpora, 1):
        if not (remote or is_local(corpus.path)):
            continue
        key = "data.path" if config.data.sources is None else f"data.sources entry {number}"
        try:
            index = _open(corpus, key, config)
        except ConfigError as error:
            problems += error.problems
            continue
        source = DataSource(corpus.label, index, corpus.weight, corpus.when_exhausted == "repeat")
        problems += _corpus_problems(config, corpus, key, index)
        problems += _mixing_problems(source, key, sources)
        sources.append(source)
    if problems:
        raise ConfigError(problems)
    return sources


def retry_policy(config: Config) -> RetryPolicy:
    """Return the configured retries and time-out of reads."""
    return RetryPolicy(config.data.retries, config.data.timeout)


def bytes_per_token(sources: list[DataSource]) -> float:
    """Return the mean bytes of text per training token, over the mixture of the sources."""
    weights = sum(source.weight for source in sources)
    splits = [(source.weight, source.index.split("train")) for source in sources]
    return sum(weight * split.text_bytes / split.tokens for weight, split in splits) / weights


def _open(corpus: SourceConfig, key: str, config: Config) -> Index:
    """Read the index of a corpus, with retries where it is remote."""
    path, retries, pause = corpus.path, config.data.retries, 0.5
    if not path:
        raise ConfigError([Problem(key, _NO_DATA, path)])
    if is_local(path) and os.path.isfile(path):
        command = f"data_prep/prepare_bytes.py --input {path} --output FOLDER"
        raise ConfigError([Problem(key, f"a file; make a folder of it with {command}", path)])
    if is_local(path) and not os.path.isdir(path):
        only_bytes = config.model.vocab_size <= ByteTokenizer(documents=True).vocab_size
        script = "prepare_bytes.py" if only_bytes else "prepare_text.py --tokenizer MODEL"
        advice = f"make it with data_prep/{script} --input CORPUS --output {path}"
        raise ConfigError([Problem(key, f"no such folder; {advice}", path)])
    while True:
        try:
            return read_index(path, config.data.timeout)
        except DataError as error:
            if is_local(path):
                raise ConfigError([Problem(key, str(error), path)]) from None
            if not retries:
                raise
        time.sleep(pause)
        retries, pause = retries - 1, 2 * pause


def _corpus_problems(
    config: Config, corpus: SourceConfig, key: str, index: Index
) -> Iterator[Problem]:
    """Yield where a corpus does not fit the model or the configuration."""
    if index.vocab_size > config.model.vocab_size:
        yield Problem(
            "model.vocab_size",
            f"the data in {corpus.path} has ids up to {index.vocab_size - 1}; use "
            f"{index.vocab_size}",
            config.model.vocab_size,
        )
    expected, found = config.data.tokenizer or "", index.tokenizer
    checksum = found.sha256 or ""
    matches = expected == found.name or len(expected) > 7 and checksum.startswith(expected)
    if expected and not matches:
        made_with = " ".join(filter(None, (found.name, checksum[:12])))
        yield Problem(
            "data.tokenizer",
            f"the data in {corpus.path} was made with {made_with} (vocabulary {index.vocab_size}); "
            f"prepare it with {expected}, or correct the key",
            expected,
        )
    if "train" not in index.splits:
        yield Problem(key, f"{corpus.path} has no training split", corpus.path)


def _mixing_problems(source: DataSource, key: str, others: list[DataSource]) -> Iterator[Problem]:
    """Yield why a source cannot be mixed with those before it."""
    index = source.index
    for other in others:
        if other.index.identity == index.identity:
            yield Problem(key, f"{other.name!r} and {source.name!r} are the same data; keep one")
    if others and index.tokenizer != others[0].index.tokenizer:
        yield Problem(
            key,
            f"its tokenizer is not that of {others[0].index.shown}; prepare both with the same",
            index.shown,
        )
