import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hg_scale.data.preparation import short_digests as module
from hg_scale.data.preparation.short_digests import keyed_digests


@settings(deadline=None, max_examples=50)
@given(
    key=st.binary(min_size=1, max_size=64),
    seed=st.integers(0, 2**32 - 1),
    longest=st.sampled_from([1, 7, 8, 9, 64, 128, 129, 400]),
)
@pytest.mark.parametrize("worthwhile", [1, 10**9])
def test_digests_equal_those_of_hashlib(worthwhile, key, seed, longest):
    random = np.random.default_rng(seed)
    text = random.integers(0, 256, 1000, np.uint8)
    lengths = random.integers(1, longest + 1, 60)
    starts = random.integers(0, 1001 - lengths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_WORTHWHILE", worthwhile)
        patch.setattr(module, "_AT_ONCE", 17)
        found = keyed_digests(key, text, starts, lengths)
    for digest, start, length in zip(found.tolist(), starts, lengths, strict=True):
        part = text[start : start + length].tobytes()
        expected = hashlib.blake2b(part, key=key, digest_size=8).digest()
        assert digest.to_bytes(8, "big") == expected
