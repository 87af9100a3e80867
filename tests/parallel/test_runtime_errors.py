"""Which exceptions count as a lost connection, a GPU failure or out of memory."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from hg_scale.parallel.runtime_errors import connection_error, gpu_error, out_of_memory


def raised_from(error: Exception, cause: Exception) -> Exception:
    """`error` as it is caught after `raise error from cause`."""
    try:
        raise error from cause
    except Exception as caught:
        return caught


def test_connection_errors_of_gloo_and_nccl() -> None:
    gloo = RuntimeError(
        "[/a/gloo/transport/tcp/pair.cc:537] Read error [10.0.0.1]:5: Connection reset by peer. "
        "This is typically caused by a remote worker hanging."
    )
    assert connection_error(gloo) == "Read error [10.0.0.1]:5: Connection reset by peer"
    assert connection_error(raised_from(ValueError("x"), gloo)) == connection_error(gloo)
    nccl = dist.DistBackendError("NCCL error in: /a.cpp:1, remote process exited\nLast error: 3")
    assert connection_error(nccl) == "NCCL error in: /a.cpp:1, remote process exited"
    for other in (RuntimeError("shapes differ"), ConnectionResetError(104, "Connection reset")):
        assert connection_error(other) is None


@pytest.mark.parametrize("kind", [RuntimeError, getattr(torch, "AcceleratorError", RuntimeError)])
def test_gpu_errors_are_those_of_the_hardware(kind: type[RuntimeError]) -> None:
    more = "\nCUDA kernel errors might be asynchronously reported"
    for message in ("uncorrectable ECC error encountered", "device(s) is/are busy or unavailable"):
        assert gpu_error(kind(f"CUDA error: {message}{more}")) == f"CUDA error: {message}"
    for message in ("an illegal memory access was encountered", "device-side assert triggered"):
        assert gpu_error(kind(f"CUDA error: {message}{more}")) is None


def test_out_of_memory_on_the_host_and_on_a_gpu() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**62, dtype=torch.uint8)
    message = "DefaultCPUAllocator: can't allocate memory: you tried to allocate"
    assert out_of_memory(raised.value) == f"{message} {2**62} bytes"
    gpu = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB "
        "of which 1.00 GiB is free."
    )
    assert out_of_memory(gpu) == "CUDA out of memory. Tried to allocate 2.00 GiB"
    assert out_of_memory(MemoryError()) == "MemoryError"
    runtime = RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later")
    assert out_of_memory(runtime) == "CUDA error: out of memory"
    assert out_of_memory(RuntimeError("shapes differ")) is None
