"""Heartbeat and watchdog as the loop sees them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hg_scale.training.heartbeat import Heartbeat
from hg_scale.training.stragglers import OwnTime, Stragglers
from hg_scale.training.watch import Watch


def test_a_step_that_fails_is_followed_by_the_end(tmp_path: Path) -> None:
    """The save under way then, which is waited for, is not held to the limit of a step."""
    heart, device = Heartbeat(tmp_path, 0, 1, print), torch.device("cpu")
    own = OwnTime(heart, device)
    watch = Watch(heart, own, Stragglers(heart, own, device, 1, 1.3, print))
    with pytest.raises(ValueError, match="bad data"), watch.training():
        watch.enter("step", 4)
        raise ValueError("bad data")
    assert (heart.place.phase, heart.place.step) == ("end", 4)
    with watch.training():
        watch.enter("validation", 5)
    assert (heart.place.phase, heart.place.step) == ("end", 5)
