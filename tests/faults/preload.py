"""What is imported and built once, before ranks are forked: a rank that is killed in the middle of
building an extension leaves a lock that all later starts on this machine would wait for."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: E402, F401  # with much of torch

from hg_scale.parallel.extensions import load_extensions  # noqa: E402

load_extensions()
