"""How the ranks find each other: at MASTER_ADDR and MASTER_PORT, where rank 0 listens.

torch would wait there for half an hour without a word, for a host that does not exist as well as
for a rank that is late.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping
from datetime import timedelta

import torch.distributed as dist

from hg_scale.errors import UserError
from hg_scale.exit_codes import CONFIG_ERROR, LOST
from hg_scale.parallel.launch import Launch, in_slurm_step
from hg_scale.parallel.timeouts import LONG

_FIRST_REPORT = 10.0  # seconds of waiting; each later report takes three times as long
_ATTEMPT = timedelta(seconds=5)  # to connect
_POLL = 0.1  # seconds
_NAMED = 8  # ranks named in a report; the others are counted


class BadMasterAddress(UserError):
    """MASTER_ADDR or MASTER_PORT cannot be used."""

    exit_code = CONFIG_ERROR


class PortInUse(UserError):
    """Another process listens on MASTER_PORT. A restarted Slurm job gets another port."""

    exit_code = LOST


class RanksMissing(UserError):
    """Some ranks have not arrived in time."""

    exit_code = LOST


def meet(launch: Launch, report: Callable[[str], None]) -> dist.Store:
    """Wait until all ranks are connected; return the store that they share.

    report: told for which ranks this one waits, after some seconds and then less often. Raises
    BadMasterAddress, PortInUse, and RanksMissing after the timeout of start-up.
    """
    host, port = master_address(launch)
    patience = _Patience(report)
    store = _connect(launch, host, port, patience)
    store.set_timeout(LONG)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun may keep its store
    shared = dist.PrefixStore(f"hg_scale-{attempt}", store)
    shared.set(f"arrived/{launch.rank}", "")
    if launch.rank != 0:
        shared.wait(["all"], LONG)
        return shared
    missing = list(range(launch.world_size))
    while missing := [rank for rank in missing if not shared.check([f"arrived/{rank}"])]:
        patience.wait(f"waiting for {name_ranks(missing)} of {launch.world_size}", reported=True)
    shared.set("all", "")
    return shared


def master_address(launch: Launch, environment: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """Return MASTER_ADDR and MASTER_PORT. Raises BadMasterAddress if they cannot be used."""
    host, port = environment["MASTER_ADDR"], environment["MASTER_PORT"]
    if not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise BadMasterAddress(
            f"rank {launch.rank}: MASTER_PORT={port!r}: expected a port from 1 to 65535; "
            f"{port_advice(environment)}"
        )
    try:
        if not host:
            raise UnicodeError  # getaddrinfo takes it for this host
        socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not a host name"
        raise BadMasterAddress(
            f"rank {launch.rank}: MASTER_ADDR={host!r}: {socket.gethostname()} cannot resolve it "
            f"({why}); expected the host of rank 0; {address_advice(environment)}"
        ) from None
    return host, int(port)


def _connect(launch: Launch, host: str, port: int, patience: _Patience) -> dist.TCPStore:
    """Connect to the store at the address; rank 0 starts it unless torchrun has."""
    started = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    own = f", which has to be this host, {socket.gethostname()}," if launch.rank == 0 else ""
    state = f"nothing answers at MASTER_ADDR={host}{own} MASTER_PORT={port}; waiting for rank 0"
    while True:
        try:
            return dist.TCPStore(
                host,
                port,
                launch.world_size,
                is_master=launch.rank == 0 and not started,
                timeout=_ATTEMPT,
                wait_for_workers=False,
                multi_tenant=True,
            )
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            in_use = "EADDRINUSE" in str(error)
        if in_use:  # raised outside the handler: torch's error would count as a lost connection
            raise PortInUse(
                f"rank {launch.rank}: MASTER_PORT={port} on MASTER_ADDR={host} is already in use; "
                f"{port_advice(os.environ)}"
            )
        patience.wait(state, launch.rank <= 1 or launch.local_rank == 0)  # one rank of each node


class _Patience:
    """Waits for other ranks, reports it less and less often, and ends after LONG."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report
        self._start = time.monotonic()
        self._next = _FIRST_REPORT

    def wait(self, state: str, reported: bool) -> None:
        """Sleep for a moment; `state`: what for, and whether to report it. Raises RanksMissing."""
        seconds = time.monotonic() - self._start
        if seconds >= LONG.total_seconds():
            minutes = f"{seconds / 60:.0f} minutes"
            raise RanksMissing(f"{state} for {minutes}; the job is to be started again")
        if seconds >= self._next:
            self._next *= 3
            if reported:
                self._report(f"{state}, for {seconds:.0f} s")
        time.sleep(_POLL)


def name_ranks(ranks: list[int]) -> str:
    """Name some ranks and count the others: rank 3; ranks 1, 2; ranks 0, 1, ... and 56 more."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    named = ", ".join(map(str, ranks[:_NAMED]))
    return f"ranks {named}" + (f" and {len(ranks) - _NAMED} more" if len(ranks) > _NAMED else "")


def port_advice(environment: Mapping[str, str]) -> str:
    """Return how to choose another port under this launcher, which may override MASTER_PORT."""
    if launcher := _overriding_launcher(environment):
        return f"choose another one with --master_port of {launcher}"
    if in_slurm_step(environment):
        return "export another MASTER_PORT before srun"
    return "choose another one with MASTER_PORT, the same on all ranks"


def address_advice(environment: Mapping[str, str]) -> str:
    """Return how to set the address under this launcher, which may override MASTER_ADDR."""
    if launcher := _overriding_launcher(environment):
        return f"set it with --master_addr of {launcher}"
    return "set MASTER_ADDR, the same on all ranks"


def _overriding_launcher(environment: Mapping[str, str]) -> str | None:
    """The launcher that sets MASTER_ADDR and MASTER_PORT itself, whatever the environment has."""
    if "TORCHELASTIC_RUN_ID" in environment:
        return "torchrun"
    return "deepspeed" if "CROSS_RANK" in environment else None
