"""Tokenizers: text as bytes to token ids and back."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from hg_scale.data.errors import DataError

BYTES = 256  # ids 0..255 are the bytes themselves; 0 is an ordinary one


class TokenizerIdentity(BaseModel):
    """What an index says of the tokenizer that made its tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    vocab_size: int = Field(ge=1)
    eod: int | None = Field(ge=0)  # id that ends a document; None where the text has no documents


class Tokenizer(Protocol):
    """What the rest of the code needs of a tokenizer."""

    @property
    def identity(self) -> TokenizerIdentity: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def eod(self) -> int | None: ...

    def encode(self, text: bytes | str) -> NDArray[Any]:
        """Token ids (n,) of `text`, of the dtype of `token_dtype`."""

    def decode(self, tokens: NDArray[Any]) -> bytes:
        """The text of `tokens`; end-of-document ids are left out."""

    def count_bytes(self, tokens: NDArray[Any]) -> int:
        """The length of `decode(tokens)`, without making it."""


class ByteTokenizer:
    """A byte is a token; with `documents` the id 256 ends a document."""

    def __init__(self, *, documents: bool) -> None:
        self.eod = BYTES if documents else None
        self.vocab_size = BYTES + documents

    @property
    def identity(self) -> TokenizerIdentity:
        return TokenizerIdentity(name="bytes", vocab_size=self.vocab_size, eod=self.eod)

    def encode(self, text: bytes | str) -> NDArray[Any]:
        """Token ids (n,), uint8 or uint16; a str is taken as UTF-8."""
        data = text.encode() if isinstance(text, str) else text
        return np.frombuffer(data, np.uint8).astype(token_dtype(self.vocab_size), copy=False)

    def decode(self, tokens: NDArray[Any]) -> bytes:
        """The bytes of `tokens`, ids 0..256; end-of-document ids are left out."""
        tokens = np.asarray(tokens)
        return tokens[tokens < BYTES].astype(np.uint8).tobytes()

    def count_bytes(self, tokens: NDArray[Any]) -> int:
        return int(np.count_nonzero(np.asarray(tokens) < BYTES))


def load_tokenizer(identity: TokenizerIdentity) -> Tokenizer:
    """The tokenizer an index names. Raises DataError where this version does not know it."""
    if identity.name == "bytes":
        tokenizer = ByteTokenizer(documents=identity.eod is not None)
        if tokenizer.identity == identity:
            return tokenizer
    raise DataError(
        f"tokenizer {identity.name!r} (vocabulary {identity.vocab_size}, end of document "
        f"{identity.eod}) is not one this version knows: it knows 'bytes' (256, None) and "
        "(257, 256); prepare the data again or update hg_scale"
    )


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest little-endian unsigned type that holds every id of the vocabulary."""
    for name in ("|u1", "<u2"):
        if vocab_size - 1 <= np.iinfo(name).max:
            return np.dtype(name)
    return np.dtype("<u4")
