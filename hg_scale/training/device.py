"""The accelerator and its peak rate, the denominator of model FLOPs utilisation (MFU)."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from hg_scale.config.training_sections import Precision

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_MEASURING_SECONDS = 1.0
_LARGEST = {"cpu": 2048, "cuda": 8192}  # side of the matrices in the measurement


@dataclass(frozen=True)
class PeakFlops:
    """The peak rate of one device in FLOP/s, and the source of the figure."""

    flops: float
    source: str


@dataclass(frozen=True)
class _KnownGpu:
    """Peak TFLOP/s of GPUs whose names contain all `words`; None: no bf16 units, measure it."""

    words: tuple[str, ...]
    bf16: float | None
    fp32: float


# Dense figures from the vendors' data sheets (which often print twice as much, with sparsity), per
# device that torch sees. bf16: tensor or matrix cores with fp32 accumulation. fp32: true fp32, not
# TF32. The first row that matches counts.
_KNOWN_GPUS = (
    _KnownGpu(("B200",), 2250, 75),  # HGX B200: 36 PFLOP/s sparse and 600 TFLOP/s fp32 for eight
    _KnownGpu(("GB200",), 2500, 80),  # GB200 superchip, halved
    _KnownGpu(("GH200",), 989, 67),  # GH200 data sheet
    _KnownGpu(("H200", "NVL"), 835, 60),  # H200 data sheet
    _KnownGpu(("H200",), 989, 67),  # H200 data sheet, SXM
    _KnownGpu(("H100", "NVL"), 835, 60),  # H100 data sheet
    _KnownGpu(("H100", "PCIe"), 756, 51),  # H100 data sheet of 2022
    _KnownGpu(("H100", "HBM3"), 989, 67),  # H100 data sheet, SXM
    _KnownGpu(("H800", "PCIe"), 756, 51),  # like the H100, with slower links
    _KnownGpu(("H800",), 989, 67),
    _KnownGpu(("H20",), 148, 44),  # H20 data sheet
    _KnownGpu(("A100",), 312, 19.5),  # A100 data sheet, SXM and PCIe
    _KnownGpu(("A800",), 312, 19.5),  # like the A100, with slower links
    _KnownGpu(("A40",), 149.7, 37.4),  # A40 data sheet
    _KnownGpu(("A30",), 165, 10.3),  # A30 data sheet
    _KnownGpu(("A10",), 125, 31.2),  # A10 data sheet
    _KnownGpu(("L40S",), 362, 91.6),  # L40S data sheet
    _KnownGpu(("L40",), 181, 90.5),  # L40 data sheet
    _KnownGpu(("L4",), 121, 30.3),  # L4 data sheet
    _KnownGpu(("V100", "SXM2"), None, 15.7),  # V100 data sheet; 125 in fp16, but no bf16 units
    _KnownGpu(("V100", "PCIE"), None, 14.0),  # V100 data sheet
    _KnownGpu(("RTX", "4090"), 165.2, 82.6),  # Ada white paper, appendix A
    _KnownGpu(("RTX", "3090"), 71, 35.6),  # GA102 white paper, appendix A
    _KnownGpu(("MI325X",), 1307, 163.4),  # MI325X data sheet
    _KnownGpu(("MI300X",), 1307, 163.4),  # MI300X data sheet
    _KnownGpu(("MI250X",), 191.5, 47.9),  # MI250X data sheet, one of its two dies
)
# MIG slices and mobile or cut-down cards have the full card's name plus one of these.
_CUT_DOWN = {"MIG", "Laptop", "D", "Q"}


def device_name(device: str = "cuda") -> str:
    """Return the name of `device` ("cuda" or "cpu")."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


def peak_flops(precision: Precision, device: str | None = None) -> PeakFlops:
    """Return the peak rate of matrix products, looked up by GPU name, else measured in about 1 s.

    device: "cuda" or "cpu"; by default the GPU if there is one. Processes that share cores should
    call this at the same time, so that each measures its share of them.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda":
        known = known_peak(torch.cuda.get_device_name(), precision)
        if known is not None:
            return known
    return _measure_peak(precision, device)


def known_peak(name: str, precision: Precision) -> PeakFlops | None:
    """Return the data sheet's figure for the GPU of this name, or None if it is not known."""
    words = {word for word in re.split(r"[\s-]+", name) if word}
    if words & _CUT_DOWN:
        return None
    for known in _KNOWN_GPUS:
        if words.issuperset(known.words):
            tera = known.bf16 if precision == "bf16" else known.fp32
            return PeakFlops(tera * 1e12, f"known: {name}") if tera is not None else None
    return None


@cache
def _measure_peak(precision: Precision, device: str) -> PeakFlops:
    """Time the fastest of several square matrix products, as large as the time allows."""
    side = 128
    while True:
        matmul = _make_matmul(side, _DTYPES[precision], device)
        matmul()  # warm-up: selects kernels and allocates memory
        seconds = _time(matmul, device)
        if seconds > _MEASURING_SECONDS / 20 or side == _LARGEST[device]:
            break
        side *= 2
    fastest, end = seconds, time.perf_counter() + _MEASURING_SECONDS / 2
    while time.perf_counter() < end:
        fastest = min(fastest, _time(matmul, device))
    where = f"on {torch.get_num_threads()} threads" if device == "cpu" else f"on {device_name()}"
    return PeakFlops(2 * side**3 / fastest, f"measured: {side}^3 matmul in {precision} {where}")


def _make_matmul(side: int, dtype: torch.dtype, device: str) -> Callable[[], object]:
    a = torch.randn(side, side, device=device).to(dtype)
    b = torch.randn(side, side, device=device).to(dtype)
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def _time(work: Callable[[], object], device: str) -> float:
    """Return the seconds that `work` takes, including its kernels on the device."""
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
