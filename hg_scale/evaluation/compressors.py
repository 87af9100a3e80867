"""General-purpose compressors, which a model is compared with."""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Callable

COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip -9": lambda text: gzip.compress(text, 9),
    "bzip2 -9": lambda text: bz2.compress(text, 9),
    "xz -9e": lambda text: lzma.compress(text, preset=9 | lzma.PRESET_EXTREME),
}


def compressed(compressor: str, text: bytes) -> float:
    """Bits per byte that one of `COMPRESSORS` needs for `text`, which is not empty."""
    return 8 * len(COMPRESSORS[compressor](text)) / len(text)
