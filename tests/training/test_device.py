"""Peak rates: looked up for known GPUs, measured for this CPU."""

from __future__ import annotations

import time

import pytest

from hg_scale.training.device import PeakFlops, device_name, known_peak, peak_flops


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("NVIDIA A100 80GB PCIe", 312e12, 19.5e12),
        ("NVIDIA A10", 125e12, 31.2e12),
        ("NVIDIA H100 80GB HBM3", 989e12, 67e12),
        ("NVIDIA H100 PCIe", 756e12, 51e12),
        ("NVIDIA H100 NVL", 835e12, 60e12),
        ("NVIDIA H200", 989e12, 67e12),
        ("NVIDIA H200 NVL", 835e12, 60e12),
        ("NVIDIA GH200 480GB", 989e12, 67e12),
        ("NVIDIA B200", 2250e12, 75e12),
        ("NVIDIA L40S", 362e12, 91.6e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12, 82.6e12),
        ("AMD Instinct MI250X", 191.5e12, 47.9e12),
        ("AMD Instinct MI300X", 1307e12, 163.4e12),
    ],
)
def test_known_gpus(name, bf16, fp32):
    assert known_peak(name, "bf16") == PeakFlops(pytest.approx(bf16), f"known: {name}")
    assert known_peak(name, "fp32") == PeakFlops(pytest.approx(fp32), f"known: {name}")


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA A10G",  # slower than an A10
        "NVIDIA H100",  # of an unknown form
        "Some GPU 9000",
    ],
)
def test_a_name_that_only_resembles_a_known_gpu_is_unknown(name):
    assert known_peak(name, "bf16") is None


def test_a_gpu_without_bf16_units_is_unknown_in_bf16():
    assert known_peak("Tesla V100-SXM2-16GB", "bf16") is None
    assert known_peak("Tesla V100-SXM2-16GB", "fp32") == PeakFlops(
        15.7e12, "known: Tesla V100-SXM2-16GB"
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_cpu_is_measured_once(precision):
    peak = peak_flops(precision, "cpu")
    assert 1e8 < peak.flops < 1e15
    assert peak.source.startswith("measured: ") and f"matmul in {precision} on " in peak.source
    start = time.perf_counter()
    assert peak_flops(precision, "cpu") is peak
    assert time.perf_counter() - start < 0.1


def test_a_cpu_has_a_name():
    assert "CPU" in device_name("cpu")
