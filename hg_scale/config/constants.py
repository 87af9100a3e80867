"""Constants that the model, the data and the checks of a configuration share. Imports no torch."""

from __future__ import annotations

DEFAULT_SEED = 1  # of the initial weights, the order of the data, and dropout
IGNORED_LABEL = -1  # the label of a position that adds nothing to the loss

SWIGLU_CHUNKS = 64
"""Gate and up projections of SwiGLU alternate in this many chunks of output features.

A tensor-parallel slice then holds complete pairs of them.
"""

BANDED_BLOCK_BYTES = 256
"""Queries per block of attention on a CPU, times the bytes of an element: 128 queries in bf16."""
BANDED_MAX_KEYS = 4096
"""Keys per query up to which attention on a CPU keeps its probabilities for the backward pass."""
