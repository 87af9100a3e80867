"""Tokenizers: bytes of text to token ids and back."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from hg_scale.bounded_read import BINARY_BYTES, FormatError, read_bounded
from hg_scale.data.errors import DataError
from hg_scale.data.text_cuts import TextCuts

TextLike = bytes | memoryview | str  # a str is encoded as UTF-8

BYTES = 256  # ids 0..255 are the bytes themselves; 0 is not special
MODEL_FILE = "tokenizer.model"  # the sentencepiece model in the folder of the index

# Bytes per call of sentencepiece, which takes about 25 times as much memory. A unigram model adds
# its scores in single precision along all of a call, so that nearly equal segmentations depend on
# what is before them: its calls are long, and shorter texts have its own tokens exactly.
_LONGEST, _LONGEST_UNIGRAM = 1 << 16, 1 << 23
_SPACE = "▁"  # a space in sentencepiece's pieces, so the character itself is spelt in bytes


class TokenizerIdentity(BaseModel):
    """A tokenizer's entry in the index of the tokens that it made."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str  # bytes or sentencepiece
    vocab_size: int = Field(ge=1, lt=1 << 31)
    eod: int | None = Field(ge=0, lt=1 << 31)  # end-of-document id; None without documents
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")  # of the sentencepiece model


class Tokenizer(Protocol):
    """The interface of a tokenizer."""

    @property
    def identity(self) -> TokenizerIdentity: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def eod(self) -> int | None: ...

    @property
    def round_trips(self) -> bool:
        """Whether `decode(encode(text)) == text` for every text."""

    def encode(self, text: TextLike, *, continues: bool = False) -> NDArray[Any]:
        """Return token ids (n,) of the dtype `token_dtype`; a str is encoded as UTF-8.

        With `continues` the text is a part that begins at a position of `last_cut`.
        """

    def last_cut(self, data: bytes, low: int, high: int) -> int | None:
        """Return the last position in (low, high] where a text may be cut, or None.

        The tokens of the parts, all but the first encoded with `continues`, are those of the text.
        """

    def decode(self, tokens: NDArray[Any]) -> bytes:
        """Return the text of `tokens` as bytes, without end-of-document ids."""

    def count_bytes(self, tokens: NDArray[Any]) -> int:
        """Return the length of `decode(tokens)` without decoding."""


class ByteTokenizer:
    """Every byte is a token; with `documents`, id 256 ends a document."""

    round_trips = True

    def __init__(self, *, documents: bool) -> None:
        self.eod = BYTES if documents else None
        self.vocab_size = BYTES + documents

    @property
    def identity(self) -> TokenizerIdentity:
        return TokenizerIdentity(name="bytes", vocab_size=self.vocab_size, eod=self.eod)

    def encode(self, text: TextLike, *, continues: bool = False) -> NDArray[Any]:
        """Return token ids (n,), uint8 or uint16; a str is encoded as UTF-8."""
        data = text.encode() if isinstance(text, str) else text
        return np.frombuffer(data, np.uint8).astype(token_dtype(self.vocab_size), copy=False)

    def last_cut(self, data: bytes, low: int, high: int) -> int | None:
        """Return `high`: bytes are tokens."""
        return high if high > low else None

    def decode(self, tokens: NDArray[Any]) -> bytes:
        """Return the bytes of `tokens`, ids 0..256, without end-of-document ids."""
        tokens = np.asarray(tokens)
        return tokens[tokens < BYTES].astype(np.uint8).tobytes()

    def count_bytes(self, tokens: NDArray[Any]) -> int:
        return int(np.count_nonzero(np.asarray(tokens) < BYTES))


class SentencePieceTokenizer:
    """A sentencepiece model, unigram or BPE.

    With `documents` its end-of-sentence id ends a document, or, where it has none, the id past
    its vocabulary. A model that round-trips (see `round_trips`) is lossless: invalid UTF-8 is
    spelt in byte pieces, one per byte, and so is the character U+2581, which means a space in
    pieces. For any other model invalid UTF-8 becomes U+FFFD.
    """

    def __init__(self, model: bytes, *, documents: bool) -> None:
        """`model`: the content of a `.model` file. Raises DataError where it is not one."""
        import sentencepiece

        try:
            # sentencepiece prints to stderr for an empty model, but not for an invalid one.
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model or b"\0")
            pieces = self._processor.vocab_size()
        except RuntimeError:
            raise DataError(
                "not a sentencepiece model: expected a .model file, as data_prep/train_tokenizer.py"
                " or spm_train writes it"
            ) from None
        self.model = model
        end = self._processor.eos_id()
        self.eod = (end if end >= 0 else pieces) if documents else None
        self.vocab_size = max(pieces, (self.eod or 0) + 1)
        self._dtype = token_dtype(self.vocab_size)
        # Ids of the 256 byte pieces; -1 where the model has none.
        self._byte_ids = np.full(256, -1, np.int64)
        for number in range(pieces):
            if self._processor.is_byte(number):
                self._byte_ids[int(self._processor.id_to_piece(number)[3:-1], 16)] = number

    @classmethod
    def read(cls, path: Path, *, documents: bool) -> SentencePieceTokenizer:
        """Read a model file. Raises DataError, naming the file, where it cannot be used."""
        try:
            return cls(read_bounded(path, BINARY_BYTES), documents=documents)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from None
        except FormatError as error:
            raise DataError(f"{path}: cannot be read ({error})") from None
        except DataError as error:
            raise DataError(f"{path}: {error}") from None

    @property
    def identity(self) -> TokenizerIdentity:
        digest = hashlib.sha256(self.model).hexdigest()
        return TokenizerIdentity(
            name="sentencepiece", vocab_size=self.vocab_size, eod=self.eod, sha256=digest
        )

    @cached_property
    def _proto(self) -> Any:
        from sentencepiece import sentencepiece_model_pb2

        return sentencepiece_model_pb2.ModelProto.FromString(self.model)

    @cached_property
    def obstacles(self) -> list[str]:
        """Reasons why `decode(encode(text))` may differ from `text`; none for our own models."""
        normalizer = self._proto.normalizer_spec
        reasons = {
            f"its normaliser {normalizer.name or '(unnamed)'} changes characters": bool(
                normalizer.precompiled_charsmap
            ),
            "it removes extra spaces": normalizer.remove_extra_whitespaces,
            "it adds a leading space": normalizer.add_dummy_prefix,
            "it does not mark spaces": not normalizer.escape_whitespaces,
            "it lacks byte pieces for unknown characters": bool((self._byte_ids < 0).any()),
        }
        return [reason for reason, applies in reasons.items() if applies]

    @property
    def round_trips(self) -> bool:
        """Whether `decode(encode(text)) == text` for every text, valid UTF-8 or not."""
        return not self.obstacles

    def encode(self, text: TextLike, *, continues: bool = False) -> NDArray[Any]:
        """Return token ids (n,), uint16 or uint32; a str is encoded as UTF-8.

        They are sentencepiece's own for the text: a long one is encoded in parts, cut where no
        piece can span the cut, or not at all (see `TextCuts`). Only beyond 8 MiB may a unigram
        model's rounding decide differently between nearly equal segmentations.
        """
        data = text.encode() if isinstance(text, str) else bytes(text)
        first, *rest = self._split_long(data)
        ids = [self._continue(first) if continues else self._encode(first)]
        ids += [self._continue(part) for part in rest]
        return ids[0] if len(ids) == 1 else np.concatenate(ids)

    def encode_each(self, texts: list[bytes]) -> list[list[int]]:
        """Return the ids of each of some short texts, in one call of sentencepiece."""
        try:
            decoded = [text.decode() for text in texts]
        except UnicodeDecodeError:
            decoded = []
        if not decoded or any(_SPACE in text for text in decoded):
            return [self.encode(text).tolist() for text in texts]
        return self._processor.encode(decoded, num_threads=1)

    def last_cut(self, data: bytes, low: int, high: int) -> int | None:
        return self._cuts.last(data, low, high)

    @cached_property
    def _cuts(self) -> TextCuts:
        return TextCuts(self._proto, lossless=self.round_trips)

    @cached_property
    def _longest(self) -> int:
        kind = self._proto.trainer_spec
        return _LONGEST_UNIGRAM if kind.model_type == kind.UNIGRAM else _LONGEST

    @cached_property
    def _prefixing(self) -> Any:
        """The same model, which puts a space in front of a text."""
        import sentencepiece

        spec = self._proto.normalizer_spec
        if spec.add_dummy_prefix:
            return self._processor
        changed = type(self._proto).FromString(self.model)
        changed.normalizer_spec.add_dummy_prefix = True
        return sentencepiece.SentencePieceProcessor(model_proto=changed.SerializeToString())

    def _split_long(self, data: bytes) -> Iterator[bytes]:
        """Split long text where it may be cut; a function of the text alone."""
        start = 0
        while len(data) - start > _LONGEST and len(data) - start > self._longest:
            low, high = start + self._longest // 2, start + self._longest
            cut = self._cuts.last(data, low, high) or self._cuts.first(data, high)
            if cut is None:
                break
            yield data[start:cut]
            start = cut
        yield data[start:]

    def _continue(self, data: bytes) -> NDArray[Any]:
        """Encode a part that follows a cut: without what the model puts in front of a text.

        Where that is lossy, the part begins with a space, which the model may remove or double; it
        puts one in front of the rest.
        """
        if self.round_trips:
            return self._encode(data)
        text = data[1:].decode(errors="replace")
        return self._prefixing.encode(text, return_type="numpy").astype(self._dtype)

    def decode(self, tokens: NDArray[Any]) -> bytes:
        """Return the text of `tokens` as bytes; control and end-of-document ids are left out."""
        table = self._id_texts
        return b"".join([table[token] for token in np.asarray(tokens).tolist()])

    def count_bytes(self, tokens: NDArray[Any]) -> int:
        return int(self._id_lengths[np.asarray(tokens)].sum())

    def _encode(self, data: bytes) -> NDArray[Any]:
        try:
            text = data.decode()
        except UnicodeDecodeError:
            text = data.decode(errors="surrogateescape" if self.round_trips else "replace")
        else:
            if _SPACE not in text:
                return self._pieces(text)
        if not self.round_trips:
            return self._pieces(text)
        parts = re.split(f"([{_SPACE}\udc80-\udcff]+)", text)  # every second part is a match
        return np.concatenate([self._spell(p) if i % 2 else self._pieces(p)
                               for i, p in enumerate(parts)])  # fmt: skip

    def _pieces(self, text: str) -> NDArray[Any]:
        if not text:
            return np.empty(0, self._dtype)
        return self._processor.encode(text, return_type="numpy").astype(self._dtype)

    def _spell(self, text: str) -> NDArray[Any]:
        data = np.frombuffer(text.encode(errors="surrogateescape"), np.uint8)
        return self._byte_ids[data].astype(self._dtype)

    @cached_property
    def _id_texts(self) -> list[bytes]:
        """The text of every id, as bytes."""
        processor, texts = self._processor, []
        for number in range(self.vocab_size):
            if number == self.eod or processor.is_control(number):
                texts.append(b"")
            elif processor.is_byte(number):
                texts.append(bytes([int(processor.id_to_piece(number)[3:-1], 16)]))
            elif processor.is_unknown(number):
                texts.append(processor.decode([number]).encode())
            else:
                texts.append(processor.id_to_piece(number).replace(_SPACE, " ").encode())
        return texts

    @cached_property
    def _id_lengths(self) -> NDArray[np.int64]:
        return np.array([len(text) for text in self._id_texts], np.int64)


def load_tokenizer(identity: TokenizerIdentity, model: bytes | None = None) -> Tokenizer:
    """Return the tokenizer of an index; `model` is the content of MODEL_FILE, where it needs one.

    Raises DataError where its kind is unknown or the checksum of the model differs.
    """
    tokenizer: Tokenizer | None = None
    if identity.name == "bytes":
        tokenizer = ByteTokenizer(documents=identity.eod is not None)
    elif identity.name == "sentencepiece" and model is not None:
        digest = hashlib.sha256(model).hexdigest()
        if digest != identity.sha256:
            raise DataError(
                f"{MODEL_FILE} has sha256 {digest[:12]}..., the index names "
                f"{str(identity.sha256)[:12]}...: copy the model that made the shards beside them"
            )
        tokenizer = SentencePieceTokenizer(model, documents=identity.eod is not None)
    if tokenizer is not None and tokenizer.identity == identity:
        return tokenizer
    raise DataError(
        f"tokenizer {identity.name!r} (vocabulary {identity.vocab_size}, end of document "
        f"{identity.eod}) is unknown to this version, which has 'bytes' (256, None) and "
        "(257, 256), and 'sentencepiece'; prepare the data again or update hg_scale"
    )


def stored_dtype(vocab_size: int, eod: int | None) -> np.dtype[Any]:
    """Return the type of the ids in shards, which need not fit a last id that ends documents.

    So bytes and an end-of-document id of 256 take one byte each: the index says where ends are.
    """
    return token_dtype(vocab_size - (eod == vocab_size - 1))


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the smallest little-endian unsigned type that fits every id of the vocabulary."""
    for name in ("|u1", "<u2"):
        if vocab_size - 1 <= np.iinfo(name).max:
            return np.dtype(name)
    return np.dtype("<u4")
