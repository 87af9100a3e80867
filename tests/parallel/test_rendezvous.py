"""Ranks that cannot meet say why, and for whom they wait; real stores on real ports."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator, Mapping

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from hg_scale.exit_codes import CONFIG_ERROR, LOST
from hg_scale.parallel import rendezvous
from hg_scale.parallel.launch import Launch
from hg_scale.parallel.rendezvous import (
    BadMasterAddress,
    PortInUse,
    RanksMissing,
    address_advice,
    master_address,
    meet,
    name_ranks,
    port_advice,
)
from tests.ports import free_port

DEEPSPEED, TORCHRUN = {"CROSS_RANK": "0"}, {"TORCHELASTIC_RUN_ID": "none"}
STEP = {"SLURM_STEP_ID": "0"}


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A free port of this host, to which MASTER_ADDR and MASTER_PORT lead."""
    for name in (*DEEPSPEED, *TORCHRUN, *STEP, "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    number = free_port()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(number))
    yield number


def test_the_ranks_that_are_missing_are_reported_less_and_less_often(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 of 3 waits; the others arrive one by one, each after a report."""
    monkeypatch.setattr(rendezvous, "_FIRST_REPORT", 0.05)
    monkeypatch.setattr(rendezvous, "_POLL", 0.01)
    lines: list[str] = []
    stores: list[dist.Store] = []
    others: list[threading.Thread] = []

    def arrive(rank: int) -> None:
        stores.append(meet(Launch(rank, 3, rank), lines.append))

    def report(line: str) -> None:
        lines.append(line)
        if len(others) < 2:
            others.append(threading.Thread(target=arrive, args=(2 - len(others),)))
            others[-1].start()

    stores.append(meet(Launch(0, 3, 0), report))
    for other in others:
        other.join(30)
    stores[0].set("key", "value")
    assert [store.get("key") for store in stores] == [b"value"] * 3
    assert [line.rpartition(", for")[0] for line in lines] == [
        "waiting for ranks 1, 2 of 3",
        "waiting for rank 1 of 3",
    ]


def test_a_long_wait_is_reported_ever_less_often_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, lines = [0.0], list[str]()
    monkeypatch.setattr(rendezvous.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(rendezvous.time, "sleep", lambda _: clock.append(clock.pop() + 1))
    patience = rendezvous._Patience(lines.append)
    with pytest.raises(RanksMissing, match="waiting for rank 1 for 30 minutes; the job") as raised:
        while True:
            patience.wait("waiting for rank 1", reported=True)
    assert raised.value.exit_code == LOST
    assert lines == [f"waiting for rank 1, for {seconds} s" for seconds in (10, 30, 90, 270, 810)]


def test_a_rank_says_that_nothing_answers_until_rank_0_does(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendezvous, "_FIRST_REPORT", 0.0)
    monkeypatch.setattr(rendezvous, "_ATTEMPT", rendezvous.timedelta(seconds=0.1))
    lines: list[str] = []
    first: list[threading.Thread] = []

    def report(line: str) -> None:
        lines.append(line)
        first.append(threading.Thread(target=meet, args=(Launch(0, 2, 0), lines.append)))
        first[-1].start()

    meet(Launch(1, 2, 1), report)
    first[0].join(30)
    assert lines[0].startswith(
        f"nothing answers at MASTER_ADDR=127.0.0.1 MASTER_PORT={port}; waiting for rank 0, for "
    )


@pytest.mark.parametrize(
    ("launcher", "option"),
    [
        (DEEPSPEED, "choose another one with --master_port of deepspeed"),
        (TORCHRUN, "choose another one with --master_port of torchrun"),
        (STEP, "export another MASTER_PORT before srun"),
        ({}, "choose another one with MASTER_PORT, the same on all ranks"),
    ],
)
def test_a_port_in_use_is_reported_with_the_option_that_changes_it(
    port: int, monkeypatch: pytest.MonkeyPatch, launcher: Mapping[str, str], option: str
) -> None:
    """Under deepspeed and torchrun, which set it themselves, MASTER_PORT would not help."""
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    with socket.socket() as other:
        other.bind(("", port))
        other.listen()
        with pytest.raises(PortInUse) as raised:
            meet(Launch(0, 2, 0), print)
    assert raised.value.exit_code == LOST and raised.value.__cause__ is None
    assert str(raised.value) == (
        f"rank 0: MASTER_PORT={port} on MASTER_ADDR=127.0.0.1 is already in use; {option}"
    )
    assert port_advice(os.environ) == option


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (("no-such-host.invalid", "7"), "rank 3: MASTER_ADDR='no-such-host.invalid': "),
        (("", "7"), "rank 3: MASTER_ADDR='': "),
        (("x" * 64 + ".org", "7"), "rank 3: MASTER_ADDR='xxx"),
        (("127.0.0.1", "70000"), "rank 3: MASTER_PORT='70000': expected a port from 1 to 65535; "),
        (("127.0.0.1", "-1"), "rank 3: MASTER_PORT='-1': "),
        (("127.0.0.1", "0"), "rank 3: MASTER_PORT='0': "),
    ],
)
def test_an_address_that_cannot_be_used_is_refused_at_once(
    address: tuple[str, str], message: str
) -> None:
    environment = dict(zip(("MASTER_ADDR", "MASTER_PORT"), address, strict=True))
    with pytest.raises(BadMasterAddress) as raised:
        master_address(Launch(3, 8, 3), environment)
    assert str(raised.value).startswith(message) and raised.value.exit_code == CONFIG_ERROR
    assert "\n" not in str(raised.value)


def test_the_address_is_set_where_the_launcher_takes_it() -> None:
    assert address_advice(DEEPSPEED) == "set it with --master_addr of deepspeed"
    assert address_advice({}) == "set MASTER_ADDR, the same on all ranks"


@given(st.sets(st.integers(0, 5000), min_size=1))
def test_few_ranks_are_named(ranks: set[int]) -> None:
    text = name_ranks(sorted(ranks))
    assert str(min(ranks)) in text and len(text) < 80
    if len(ranks) > 8:
        assert text.endswith(f" and {len(ranks) - 8} more")
