"""A real Slurm on this machine: one controller and nine `slurmd` with eight fake GPUs each.

Needs root and Debian's `slurm-wlm` and `munge` (`.ci/run` installs them), but no configuration of
the machine: keys, sockets, ports, spool folders and logs belong to the cluster. A fake GPU is an
empty file, which Slurm allocates like a real one.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

NODES, GPUS = 9, 8
_FINAL = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE"}


class Cluster:
    """A running cluster: submit jobs, query them, kill nodes."""

    def __init__(self) -> None:
        """Start all daemons and wait until the nodes are idle. Raises RuntimeError."""
        # A short path: that of a socket may not exceed 108 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._configure()
        _adopt_orphans()
        self.environment = {"SLURM_CONF": str(self.folder / "slurm.conf")}
        try:
            self._start_all()
        except BaseException:
            self.stop()
            raise

    def submit(
        self, *arguments: str, folder: Path, environment: Mapping[str, str] | None = None
    ) -> int:
        """Run `sbatch` from `folder` in a minimal environment plus `environment`; return the id."""
        inherited = {key: os.environ[key] for key in ("PATH", "HOME", "LANG") if key in os.environ}
        environment = inherited | self.environment | dict(environment or {})
        done = self._command(
            "sbatch", "--parsable", *arguments, folder=folder, environment=environment
        )
        return int(done.split(";")[0])

    def state(self, job: int | str) -> dict[str, str]:
        """Return the controller's fields of a job: `JobState`, `ExitCode`, `Restarts`, ..."""
        output = self._command("scontrol", "--oneliner", "show", "job", str(job))
        first = output.strip().splitlines()[0]
        return dict(word.split("=", 1) for word in first.split() if "=" in word)

    def wait(self, job: int | str, timeout: float = 240) -> dict[str, str]:
        """Wait until a job has ended; return its fields. Raises TimeoutError."""
        return self.wait_for(job, _FINAL, timeout)

    def wait_for(self, job: int | str, states: set[str], timeout: float = 240) -> dict[str, str]:
        """Wait until a job is in one of the states; return its fields. Raises TimeoutError."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            state = self.state(job)
            if state["JobState"] in states:
                return state
            time.sleep(0.2)
        raise TimeoutError(f"job {job} is {state['JobState']} ({state.get('Reason')}): {state}")

    def command(self, *words: str) -> str:
        """Run a Slurm command, such as `scancel`; return its output."""
        return self._command(*words)

    def lose(self, node: str) -> None:
        """Kill a node's daemon and all its processes, like a power failure."""
        self._processes.pop(node).kill()
        steps = _steps_with(self.folder / f"slurmd-{node}.log")
        if not steps:
            raise RuntimeError(f"no job step runs on {node}")
        _kill(steps)

    def start_node(self, node: str) -> None:
        """Start or restart a node's daemon."""
        self._start(node, "slurmd", "-D", "-N", node)

    def wait_for_idle(self, nodes: int) -> bool:
        """Wait up to a minute until `nodes` nodes are idle; whether they are."""

        def are_idle() -> bool:
            done = subprocess.run(
                ["sinfo", "--noheader", "--partition=main", "--format=%t %D"],
                env=self._environment(), capture_output=True, text=True, timeout=30, check=False,
            )  # fmt: skip
            return f"idle {nodes}" in done.stdout.splitlines()

        return _wait_until(are_idle, 60)

    def stop(self) -> None:
        """Cancel the jobs, stop every daemon, and remove the folder."""
        if self._alive("slurmctld"):
            with suppress(RuntimeError):  # there is no job
                self.command("scancel", "--full", "--user=root")
            _wait_until(lambda: not self.command("squeue", "--noheader").strip(), 20)
        for name in sorted(self._processes, key=lambda name: name == "munged"):
            self._processes[name].terminate()
        for process in self._processes.values():
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes.clear()
        _kill(_steps_with(self.folder))
        _wait_until(lambda: not _steps_with(self.folder), 10)
        _reap_orphans()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _configure(self) -> None:
        folder, host = self.folder, socket.gethostname()
        folder.chmod(0o755)
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        for number in range(GPUS):
            (folder / f"gpu{number}").touch()
        for number in range(1, NODES + 1):
            (folder / f"spool-n{number}").mkdir()
        (folder / "state").mkdir()
        ports = _free_ports(NODES + 1)
        (folder / "gres.conf").write_text(
            f"NodeName=n[1-{NODES}] Name=gpu File={folder}/gpu[0-{GPUS - 1}] Flags=nvidia_gpu_env\n"
        )
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        nodes = "".join(
            f"NodeName=n{n} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[n]} CPUs=8 "
            f"RealMemory=4000 Gres=gpu:{GPUS}\n"
            for n in range(1, NODES + 1)
        )
        (folder / "slurm.conf").write_text(
            f"""ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SlurmctldTimeout=20
SlurmdTimeout=20
KillWait=10
MinJobAge=600
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 \
  GraceTime=30
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
        )

    def _start_all(self) -> None:
        folder = self.folder
        self._start(
            "munged", "munged", "--foreground", "--force", f"--socket={folder}/munge.socket",
            f"--key-file={folder}/munge.key", f"--pid-file={folder}/munged.pid",
            f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed",
        )  # fmt: skip
        _wait_until((folder / "munge.socket").exists, 20)
        self._start("slurmctld", "slurmctld", "-D")
        for number in range(1, NODES + 1):
            self.start_node(f"n{number}")

        if not self.wait_for_idle(NODES):
            logs = "".join(p.read_text()[-2000:] for p in sorted(folder.glob("slurm*.log"))[:2])
            raise RuntimeError(f"the cluster did not come up:\n{logs}")

    def _start(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as output:
            self._processes[name] = subprocess.Popen(
                command, env=self._environment(), cwd=self.folder, stdin=subprocess.DEVNULL,
                stdout=output, stderr=output,
            )  # fmt: skip

    def _alive(self, name: str) -> bool:
        process = self._processes.get(name)
        return process is not None and process.poll() is None

    def _environment(self) -> dict[str, str]:
        return {"PATH": os.environ["PATH"], "SLURM_CONF": str(self.folder / "slurm.conf")}

    def _command(
        self, *words: str, folder: Path | None = None, environment: dict[str, str] | None = None
    ) -> str:
        done = subprocess.run(
            words, cwd=folder or self.folder, env=environment or self._environment(),
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")
        return done.stdout


def _wait_until(holds: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if holds():
            return True
        time.sleep(0.1)
    return False


def _kill(processes: list[int]) -> None:
    """Kill processes that may not be our children."""
    for number in processes:
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)


def _adopt_orphans() -> None:
    """Become the parent of orphaned step daemons, which `slurmd` forks twice, to reap them."""
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def _reap_orphans() -> None:
    """Reap step daemons that have ended; other children are left alone."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        with suppress(OSError):
            words = (entry / "stat").read_text()
            name, rest = words.partition("(")[2].rpartition(")")[::2]
            state, parent = rest.split()[:2]
            if name.startswith("slurmstepd") and state == "Z" and int(parent) == os.getpid():
                os.waitpid(int(entry.name), 0)


def _steps_with(path: Path) -> list[int]:
    """PIDs of step daemons with `path` or a file below it open, and of their descendants."""
    parents: dict[int, int] = {}
    roots: set[int] = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            stat = (entry / "stat").read_text()
            files = [os.readlink(f) for f in (entry / "fd").iterdir()]
            words = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        number = int(entry.name)
        parents[number] = int(stat.rpartition(")")[2].split()[1])
        if words.startswith(b"slurmstepd") and any(f.startswith(str(path)) for f in files):
            roots.add(number)
    found = set(roots)
    while grown := {child for child, parent in parents.items() if parent in found} - found:
        found |= grown
    return sorted(found)


def _free_ports(count: int) -> list[int]:
    """Return ports that are free now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        return [free.getsockname()[1] for free in sockets]
    finally:
        for free in sockets:
            free.close()
