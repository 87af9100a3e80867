"""Causal attention on a CPU: `banded.attention` against torch's fused kernel.

    python benchmarks/attention.py [--threads 1]

Forward and backward, medians of interleaved runs; the fused kernel gets a window as a mask.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hg_scale.model import banded

SHAPES = [(2, 8, 1024, 64), (2, 4, 512, 64), (1, 2, 1536, 128)]


def fused(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    if window is None:
        return scaled_dot_product_attention(q, k, v, is_causal=True)
    distance = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
    visible = (distance >= 0) & (distance < window)
    return scaled_dot_product_attention(q, k, v, attn_mask=visible)


def seconds(attend: Callable[..., Tensor], inputs: list[Tensor], window: int | None) -> float:
    start = perf_counter()
    y = attend(*inputs, window)
    y.backward(torch.ones_like(y))
    return perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--runs", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{options.threads} threads, torch {torch.__version__}; ms, fused / banded = ratio")
    for shape in SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            inputs = [torch.randn(shape, dtype=dtype).requires_grad_() for _ in range(3)]
            for window in (None, 128):
                times: list[list[float]] = [[], []]
                for run in range(options.runs + 1):  # the first is a warm-up
                    for which, attend in enumerate((fused, banded.attention)):
                        elapsed = seconds(attend, inputs, window)
                        if run:
                            times[which].append(1e3 * elapsed)
                fused_ms, banded_ms = (median(t) for t in times)
                name = f"{tuple(shape)} {str(dtype).removeprefix('torch.')} window {window}"
                print(f"{name:45} {fused_ms:7.1f} / {banded_ms:7.1f} = {fused_ms / banded_ms:.2f}")


if __name__ == "__main__":
    main()
