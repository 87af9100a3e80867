"""BLAKE2b of many short texts at once, in numpy, equal to hashlib's bit for bit.

hashlib takes about half a microsecond per call, which for documents of a few bytes would be most
of the time of a preparation. Each text here is one block of BLAKE2b (RFC 7693) after the block of
the key, which is the same for all.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

DIGEST_BYTES = 8

_UInt64Array = NDArray[np.uint64]

_BLOCK = 128  # bytes of a block
_AT_ONCE = 4096  # texts whose state stays in the processor's cache
_WORTHWHILE = 512  # texts of equal size; fewer are faster with hashlib
_MASK = (1 << 64) - 1
_IV = (
    0x6A09E667F3BCC908, 0xBB67AE8584CAA73B, 0x3C6EF372FE94F82B, 0xA54FF53A5F1D36F1,
    0x510E527FADE682D1, 0x9B05688C2B3E6C1F, 0x1F83D9ABFB41BD6B, 0x5BE0CD19137E2179,
)  # fmt: skip
_SIGMA = (
    (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
    (14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3),
    (11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4),
    (7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8),
    (9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13),
    (2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9),
    (12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11),
    (13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10),
    (6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5),
    (10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0),
)
_ROUNDS = (*_SIGMA, *_SIGMA[:2])
_Shifts = tuple[np.uint64, np.uint64]


def _rotation(count: int) -> _Shifts:
    return np.uint64(count), np.uint64(64 - count)


_ROTATIONS = (_rotation(32), _rotation(24)), (_rotation(16), _rotation(63))


def keyed_digests(
    key: bytes, text: NDArray[np.uint8], starts: NDArray[np.int64], lengths: NDArray[np.int64]
) -> _UInt64Array:
    """Return `blake2b(part, key=key, digest_size=8)` of parts of a text, as big-endian integers.

    `key`: 1 to 64 bytes. `starts` and `lengths` (n,) of the parts, none of them empty.
    """
    digests = np.empty(len(starts), np.uint64)
    words = np.minimum(-(-lengths // 8), _BLOCK // 8 + 1)  # 17: more than a block
    state, padded = None, text
    for count in np.unique(words).tolist():
        which = np.flatnonzero(words == count)
        if count * 8 > _BLOCK or len(which) < _WORTHWHILE:
            digests[which] = _one_by_one(key, text, starts[which], lengths[which])
            continue
        if state is None:
            state = _absorb_key(key)
            padded = np.concatenate([text, np.zeros(_BLOCK, np.uint8)])
        for first in range(0, len(which), _AT_ONCE):
            part = which[first : first + _AT_ONCE]
            message = _message(padded, starts[part], lengths[part], count)
            digests[part] = _compress(state, message, lengths[part])
    return digests


def _one_by_one(
    key: bytes, text: NDArray[np.uint8], starts: NDArray[np.int64], lengths: NDArray[np.int64]
) -> list[int]:
    view = memoryview(text)  # type: ignore[arg-type]
    keyed, digests = hashlib.blake2b(key=key, digest_size=DIGEST_BYTES), []
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        digest = keyed.copy()
        digest.update(view[start : start + length])
        digests.append(int.from_bytes(digest.digest(), "big"))
    return digests


def _message(
    padded: NDArray[np.uint8], starts: NDArray[np.int64], lengths: NDArray[np.int64], words: int
) -> _UInt64Array:
    """Return the parts as little-endian words (words, n), zero after the end of each."""
    columns = np.arange(8 * words)
    content = padded[starts[:, None] + columns]
    content[columns >= lengths[:, None]] = 0
    return np.ascontiguousarray(content.view("<u8").T.astype(np.uint64, copy=False))


@lru_cache(maxsize=64)
def _absorb_key(key: bytes) -> tuple[int, ...]:
    """Return the state after the block of the key."""
    state = list(_IV)
    state[0] ^= 0x01010000 ^ len(key) << 8 ^ DIGEST_BYTES
    block = key.ljust(_BLOCK, b"\0")
    m = [int.from_bytes(block[8 * i : 8 * i + 8], "little") for i in range(16)]
    v = [*state, *_IV]
    v[12] ^= _BLOCK

    def mix(a: int, b: int, c: int, d: int, x: int, y: int) -> None:
        for word, (turn, back) in ((x, (32, 24)), (y, (16, 63))):
            v[a] = (v[a] + v[b] + word) & _MASK
            v[d] = _rotate(v[d] ^ v[a], turn)
            v[c] = (v[c] + v[d]) & _MASK
            v[b] = _rotate(v[b] ^ v[c], back)

    for order in _ROUNDS:
        for i in range(4):
            mix(i, 4 + i, 8 + i, 12 + i, m[order[2 * i]], m[order[2 * i + 1]])
        for i in range(4):
            mix(i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4,
                m[order[8 + 2 * i]], m[order[9 + 2 * i]])  # fmt: skip
    return tuple(state[i] ^ v[i] ^ v[i + 8] for i in range(8))


def _rotate(value: int, count: int) -> int:
    return (value >> count | value << 64 - count) & _MASK


def _compress(
    state: tuple[int, ...], message: _UInt64Array, lengths: NDArray[np.int64]
) -> _UInt64Array:
    """Return the digests of last blocks (words, n), of which `lengths` bytes are text.

    The rows of the state are stored with those at one end repeated at the other, so that the
    rotated rows of the diagonal step are a slice, too.
    """
    words, n = message.shape
    a, c = np.empty((4, n), np.uint64), np.empty((6, n), np.uint64)
    b, d, spare = np.empty((5, n), np.uint64), np.empty((5, n), np.uint64), np.empty_like(a)
    for rows, values in ((a, state[:4]), (b[:4], state[4:]), (c[:4], _IV[:4]), (d[1:], _IV[4:])):
        rows[:] = np.array(values, np.uint64)[:, None]
    d[1] ^= (lengths + _BLOCK).astype(np.uint64)  # bytes so far, with the block of the key
    d[3] ^= np.uint64(_MASK)  # the last block
    for order in _ROUNDS:
        _mix(a, b[:4], c[:4], d[1:], message, order[0:8:2], order[1:8:2], spare)
        b[4], c[4:], d[0] = b[0], c[:2], d[4]
        _mix(a, b[1:], c[2:], d[:4], message, order[8::2], order[9::2], spare)
        b[0], c[:2], d[4] = b[4], c[4:], d[0]
    return (np.uint64(state[0]) ^ a[0] ^ c[0]).byteswap()


def _mix(
    a: _UInt64Array,
    b: _UInt64Array,
    c: _UInt64Array,
    d: _UInt64Array,
    message: _UInt64Array,
    first: tuple[int, ...],
    second: tuple[int, ...],
    spare: _UInt64Array,
) -> None:
    """Mix four columns at once, in place; `first` and `second` number their words."""
    for words, (turn, back) in ((first, _ROTATIONS[0]), (second, _ROTATIONS[1])):
        np.add(a, b, out=a)
        for row, word in enumerate(words):
            if word < len(message):  # the others are zero
                a[row] += message[word]
        _xor_and_rotate(d, a, turn, spare)
        np.add(c, d, out=c)
        _xor_and_rotate(b, c, back, spare)


def _xor_and_rotate(x: _UInt64Array, y: _UInt64Array, shifts: _Shifts, spare: _UInt64Array) -> None:
    np.bitwise_xor(x, y, out=x)
    np.right_shift(x, shifts[0], out=spare)
    np.left_shift(x, shifts[1], out=x)
    np.bitwise_or(x, spare, out=x)
