"""Where text may be cut so that sentencepiece gives its parts the tokens it gives all of it."""

from __future__ import annotations

import re
from typing import Any

_SPACE = "▁"  # a space in sentencepiece's pieces
_BETWEEN_WORDS = re.compile(rb"[0-9A-Za-z](?= [0-9A-Za-z])")
_KNOWN_RULES = {"identity", "nmt_nfkc", "nfkc", "nmt_nfkc_cf", "nfkc_cf"}  # none contains a space
_SCANNED = 4096  # bytes in which a cut between any two characters is searched


class TextCuts:
    """Positions in a text at which no piece of a sentencepiece model can continue.

    All models compose tokens of pieces of their vocabulary. Where no piece contains the character
    before a position followed by the one after it, no token spans it, and what is on one side does
    not affect the other. A cut is in front of a single space between two letters or digits of
    ASCII, which every usual normaliser leaves alone. A lossless model, which normalises nothing,
    may be cut between any two characters.
    """

    def __init__(self, model: Any, *, lossless: bool) -> None:
        """`model`: a sentencepiece ModelProto; `lossless`: it has byte pieces and no normaliser."""
        kinds = model.SentencePiece
        texts = [
            piece.piece.replace(" ", _SPACE)
            for piece in model.pieces
            if piece.type not in (kinds.CONTROL, kinds.UNKNOWN, kinds.BYTE)
        ]
        normalizer = model.normalizer_spec
        has_bytes = any(piece.type == kinds.BYTE for piece in model.pieces)
        self._between_words = (
            not any(re.search(f"[0-9A-Za-z]{_SPACE}", text) for text in texts)
            and (has_bytes or _SPACE in texts)  # adjacent unknown characters are one token
            and (not normalizer.precompiled_charsmap or normalizer.name in _KNOWN_RULES)
            and not model.trainer_spec.treat_whitespace_as_suffix
        )
        pairs = (text[i : i + 2] for text in texts for i in range(len(text) - 1))
        self._inner = frozenset(pairs) if lossless else None

    def last(self, data: bytes, low: int, high: int) -> int | None:
        """Return the last cut in (low, high], or None; data may continue after `high`."""
        stop = high
        while self._between_words and stop > low:
            start = max(low, stop - _SCANNED)
            if found := [m.end() for m in _BETWEEN_WORDS.finditer(data, start, stop + 2)]:
                return found[-1]
            stop = start
        if self._inner is not None:
            for cut in range(min(high, len(data) - 1), max(low, high - _SCANNED, 0), -1):
                if self._is_between_pieces(data, cut):
                    return cut
        return None

    def first(self, data: bytes, low: int) -> int | None:
        """Return the first cut between words after `low`, or None."""
        if self._between_words and (found := _BETWEEN_WORDS.search(data, low)):
            return found.end()
        return None

    def _is_between_pieces(self, data: bytes, cut: int) -> bool:
        """Return whether no piece of a lossless model spans a position."""
        if data[cut] & 0xC0 == 0x80:  # perhaps inside a character
            return False
        before = data[max(0, cut - 4) : cut].decode(errors="surrogateescape")[-1]
        after = data[cut : cut + 4].decode(errors="surrogateescape")[0]
        assert self._inner is not None
        return (before + after).replace(" ", _SPACE) not in self._inner
