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
_LARGEST = {"cpu": 2048, "cuda": 8192}  # side of the measuring product


@dataclass(frozen=True)
class Peak:
    """A peak rate in FLOP/s of one device, and where the figure comes from."""

    flops: float
    source: str


@dataclass(frozen=True)
class _Known:
    """Peak TFLOP/s of a GPU whose name has all these `words`. None: not a figure to hold it to."""

    words: tuple[str, ...]
    bf16: float | None
    fp32: float


# Dense figures of the makers' data sheets (which often print twice as much, with sparsity), per
# device that torch sees. bf16: tensor or matrix cores with fp32 accumulation. fp32: true fp32, not
# TF32. Of two rows that match, the first counts.
_KNOWN = (
    _Known(("B200",), 2250, 75),  # HGX B200: 36 PFLOP/s sparse and 600 TFLOP/s fp32 for eight
    _Known(("GB200",), 2500, 80),  # GB200 superchip, halved
    _Known(("GH200",), 989, 67),  # GH200 data sheet
    _Known(("H200", "NVL"), 835, 60),  # H200 data sheet
    _Known(("H200",), 989, 67),  # H200 data sheet, SXM
    _Known(("H100", "NVL"), 835, 60),  # H100 data sheet
    _Known(("H100", "PCIe"), 756, 51),  # H100 data sheet of 2022
    _Known(("H100", "HBM3"), 989, 67),  # H100 data sheet, SXM
    _Known(("H800", "PCIe"), 756, 51),  # as the H100, its links are slower
    _Known(("H800",), 989, 67),
    _Known(("H20",), 148, 44),  # H20 data sheet
    _Known(("A100",), 312, 19.5),  # A100 data sheet, SXM and PCIe alike
    _Known(("A800",), 312, 19.5),  # as the A100, its links are slower
    _Known(("A40",), 149.7, 37.4),  # A40 data sheet
    _Known(("A30",), 165, 10.3),  # A30 data sheet
    _Known(("A10",), 125, 31.2),  # A10 data sheet
    _Known(("L40S",), 362, 91.6),  # L40S data sheet
    _Known(("L40",), 181, 90.5),  # L40 data sheet
    _Known(("L4",), 121, 30.3),  # L4 data sheet
    _Known(("V100", "SXM2"), None, 15.7),  # V100 data sheet; 125 in fp16, but no bf16 units
    _Known(("V100", "PCIE"), None, 14.0),  # V100 data sheet
    _Known(("RTX", "4090"), 165.2, 82.6),  # Ada white paper, appendix A
    _Known(("RTX", "3090"), 71, 35.6),  # GA102 white paper, appendix A
    _Known(("MI325X",), 1307, 163.4),  # MI325X data sheet
    _Known(("MI300X",), 1307, 163.4),  # MI300X data sheet
    _Known(("MI250X",), 191.5, 47.9),  # MI250X data sheet, one of its two dies
)
# Slices and mobile or cut-down cards carry the name of the whole card.
_LESSER = {"MIG", "Laptop", "D", "Q"}


def device_name(device: str = "cuda") -> str:
    """What `device` ("cuda" or "cpu") is called."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


def peak_flops(precision: Precision, device: str | None = None) -> Peak:
    """Peak rate of matrix products: known for the GPU by its name, else measured in about 1 s.

    device: "cuda" or "cpu"; by default the GPU if there is one. Processes that share cores should
    measure at the same time, or each would take all of them for its own.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda":
        known = known_peak(torch.cuda.get_device_name(), precision)
        if known is not None:
            return known
    return _measured_peak(precision, device)


def known_peak(name: str, precision: Precision) -> Peak | None:
    """The data sheet's figure for the GPU of this name, if the table has it."""
    words = {word for word in re.split(r"[\s-]+", name) if word}
    if words & _LESSER:
        return None
    for known in _KNOWN:
        if words.issuperset(known.words):
            tera = known.bf16 if precision == "bf16" else known.fp32
            return Peak(tera * 1e12, f"known: {name}") if tera is not None else None
    return None


@cache
def _measured_peak(precision: Precision, device: str) -> Peak:
    """The best of several square products, of a size that fits into the time."""
    side = 128
    while True:
        product = _product(side, _DTYPES[precision], device)
        product()  # the first one picks kernels and fetches memory
        seconds = _time(product, device)
        if seconds > _MEASURING_SECONDS / 20 or side == _LARGEST[device]:
            break
        side *= 2
    fastest, end = seconds, time.perf_counter() + _MEASURING_SECONDS / 2
    while time.perf_counter() < end:
        fastest = min(fastest, _time(product, device))
    where = f"on {torch.get_num_threads()} threads" if device == "cpu" else f"on {device_name()}"
    return Peak(2 * side**3 / fastest, f"measured: {side}^3 matmul in {precision} {where}")


def _product(side: int, dtype: torch.dtype, device: str) -> Callable[[], object]:
    a = torch.randn(side, side, device=device).to(dtype)
    b = torch.randn(side, side, device=device).to(dtype)
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def _time(work: Callable[[], object], device: str) -> float:
    """Seconds that `work` takes, to the end on the device."""
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
