"""The file of a rank: a plain safetensors file with an equal share of replicated states."""

from __future__ import annotations

from pathlib import Path

import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from hg_scale.checkpoint.checksum import ComputeChecksum
from hg_scale.checkpoint.fragments import KINDS, Fragment, Slice, coverage_problems
from hg_scale.checkpoint.rank_file import (
    HostBuffer,
    LocalState,
    equal_share,
    stage,
    write_rank_file,
)


def states(*lengths: int) -> list[LocalState]:
    """Return states of unsharded parameters of these lengths; elements are numbered throughout."""
    result, first = [], 0
    for number, length in enumerate(lengths):
        values = torch.arange(first, first + length, dtype=torch.float32)
        tensors = {kind: values * 10**i for i, kind in enumerate(KINDS)}
        piece = Slice(f"p{number}", (length,))
        result.append(LocalState(nn.Parameter(values), Fragment(piece, 0, length), tensors))
        first += length
    return result


@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.integers(1, 9))
def test_replicated_states_are_written_once_in_equal_shares(lengths: list[int], count: int) -> None:
    shares = [list(equal_share(states(*lengths), index, count)) for index in range(count)]
    assert coverage_problems(local.fragment for part in shares for local in part) == []
    sizes = [sum(local.fragment.length for local in part) for part in shares]
    assert max(sizes) - min(sizes) <= 1
    assert sum(map(len, shares)) < len(lengths) + count
    values = torch.cat([local.tensors["exp_avg"] for part in shares for local in part])
    assert torch.equal(values, torch.arange(sum(lengths)) * 10.0)


def test_file_is_safetensors_ordered_by_kind(tmp_path: Path) -> None:
    path = tmp_path / "rank-00000.safetensors"
    staged = stage(states(3, 5))
    entry = write_rank_file(path, staged)
    data = path.read_bytes()
    assert entry["bytes"] == len(data)
    assert entry["checksum"] == f"xxh3_128:{xxhash.xxh3_128_hexdigest(data)}"
    tensors = load_file(path)
    for number, local in enumerate(states(3, 5)):
        assert entry["fragments"][number] == local.fragment.to_json()
        for kind in KINDS:
            assert torch.equal(tensors[f"{number}.{kind}"], local.tensors[kind])
    flat = torch.frombuffer(bytearray(data[-8 * 3 * 4 :]), dtype=torch.float32)
    assert torch.equal(flat, torch.cat([torch.arange(8.0) * scale for scale in (1, 10, 100)]))


def test_file_of_a_rank_without_states(tmp_path: Path) -> None:
    entry = write_rank_file(tmp_path / "empty", stage([]))
    assert entry["fragments"] == [] and load_file(tmp_path / "empty") == {}


def test_host_copy_is_unaffected_by_later_training_steps(tmp_path: Path) -> None:
    held, buffer = states(3, 5), HostBuffer()
    copy = buffer.copy(stage(held))
    first = write_rank_file(tmp_path / "before", stage(states(3, 5)))
    for local in held:
        for tensor in local.tensors.values():
            tensor.mul_(-1)
    assert write_rank_file(tmp_path / "after", copy)["checksum"] == first["checksum"]
    again = buffer.copy(stage(held))
    assert again.data[0].data_ptr() == copy.data[0].data_ptr()  # reuses the memory
    (fewer,) = buffer.copy(stage(held[:1])).data
    assert fewer.numel() == 9


def test_tensor_larger_than_a_chunk(tmp_path: Path) -> None:
    values = torch.arange(5_000_001, dtype=torch.float32)
    piece = Fragment(Slice("big", (5_000_001,)), 0, 5_000_001)
    local = LocalState(nn.Parameter(values), piece, dict.fromkeys(KINDS, values))
    entry = write_rank_file(tmp_path / "big", stage([local]))
    assert torch.equal(load_file(tmp_path / "big")["0.exp_avg"], values)
    assert entry["checksum"] == ComputeChecksum(tmp_path)("big")
