"""Heartbeat and watchdog as the loop sees them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hg_scale.config.load import parse_config
from hg_scale.training.monitoring.heartbeat import Heartbeat
from hg_scale.training.monitoring.monitor import Monitor
from hg_scale.training.monitoring.stragglers import OwnTime, Stragglers
from tests.runs import TINY


def watch_of(heart: Heartbeat, **sections: Any) -> Monitor:
    own, device = OwnTime(heart, torch.device("cpu")), torch.device("cpu")
    config = parse_config({**TINY, **sections})
    return Monitor(config, heart, own, Stragglers(heart, own, device, 1, 1.3, print))


def test_a_step_that_fails_is_followed_by_the_end(tmp_path: Path) -> None:
    """The save under way then, which is waited for, is not held to the limit of a step."""
    heart = Heartbeat(tmp_path, 0, 1, print)
    watch = watch_of(heart)
    with pytest.raises(ValueError, match="bad data"), watch.training():
        watch.enter("step", 4)
        raise ValueError("bad data")
    assert (heart.place.phase, heart.place.step) == ("end", 4)
    with watch.training():
        watch.enter("validation", 5)
    assert (heart.place.phase, heart.place.step) == ("end", 5)


def test_how_long_the_other_ranks_are_waited_for(tmp_path: Path) -> None:
    """As long as the watchdog waits, where `parallel.timeout` leaves it the time."""
    heart = Heartbeat(tmp_path, 0, 1, print)
    assert watch_of(heart).patience == 1800  # of the first steps
    heart.durations.extend([90.0, 70.0, 80.0])
    assert watch_of(heart).patience == 800
    assert watch_of(heart, parallel={"timeout": 100}).patience == 0
    assert watch_of(heart, watchdog={"factor": 0}).patience == 0
    heart.durations.extend([1.0] * 20)
    assert watch_of(heart).patience == 300
