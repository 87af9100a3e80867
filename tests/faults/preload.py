"""Imports and builds what every rank needs once, before the ranks are forked.

A rank that is killed while it compiles an extension leaves a lock file behind.
"""

import os

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: E402, F401  # imports much of torch

from hg_scale.parallel.extensions import load_extensions  # noqa: E402

load_extensions()
