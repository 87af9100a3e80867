"""The interface of the training loop to heartbeat and watchdog."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hg_scale.config.load import parse_config
from hg_scale.training.monitoring.heartbeat import Heartbeat
from hg_scale.training.monitoring.monitor import Monitor
from hg_scale.training.monitoring.stragglers import RankTimer, Stragglers
from tests.runs import TINY


def make_monitor(heartbeat: Heartbeat, **sections: Any) -> Monitor:
    device = torch.device("cpu")
    timer = RankTimer(heartbeat, device)
    stragglers = Stragglers(heartbeat, timer, device, 1, 1.3, print)
    return Monitor(parse_config({**TINY, **sections}), heartbeat, timer, stragglers)


def test_an_error_in_a_step_begins_the_end_phase(tmp_path: Path) -> None:
    """The save in progress, which the end waits for, may take longer than a step."""
    heartbeat = Heartbeat(tmp_path, 0, 1, print)
    monitor = make_monitor(heartbeat)
    with pytest.raises(ValueError, match="bad data"), monitor.training():
        monitor.enter("step", 4)
        raise ValueError("bad data")
    assert (heartbeat.position.phase, heartbeat.position.step) == ("end", 4)
    with monitor.training():
        monitor.enter("validation", 5)
    assert (heartbeat.position.phase, heartbeat.position.step) == ("end", 5)


def test_step_limit_is_that_of_the_watchdog(tmp_path: Path) -> None:
    """Unless `parallel.timeout` is shorter than every limit, or the watchdog is off."""
    heartbeat = Heartbeat(tmp_path, 0, 1, print)
    assert make_monitor(heartbeat).step_limit == 1800  # `watchdog.first`
    heartbeat.durations.extend([90.0, 70.0, 80.0])
    assert make_monitor(heartbeat).step_limit == 800
    assert make_monitor(heartbeat, parallel={"timeout": 100}).step_limit == 0
    assert make_monitor(heartbeat, watchdog={"factor": 0}).step_limit == 0
    heartbeat.durations.extend([1.0] * 20)
    assert make_monitor(heartbeat).step_limit == 300
