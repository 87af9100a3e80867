"""Time per generated token: Hourglass and flat model with cache, and recomputation.

    python benchmarks/generate.py [--threads 2]

Medians over rounds with interleaved models; batch size 1, fp32, random weights. `paper`: attention
resampling and relative positions, as in the paper; `preset`: linear resampling and rotary
positions, as in configs/. `public`: hourglass-transformer-pytorch 0.0.6 if installed; it has no
cache.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch

from hg_scale.config.schema import ModelConfig
from hg_scale.model.costs import cache_bytes
from hg_scale.model.decoding import Decoder
from hg_scale.model.hourglass import Hourglass

KINDS = {
    "paper": {"positions": "relative", "shared_position_bias": True},
    "preset": {
        "positions": "rotary", "pooling": "linear", "upsampling": "linear", "norm": "rmsnorm",
        "activation": "swiglu", "d_ff": 1408, "qk_norm": True, "bias": False,
    },
}  # fmt: skip
HOURGLASS, FLAT = "2@1 8@3 2@1", "12@1"
STEPS = 12  # per round: a multiple of the factor


def make(hierarchy: str, kind: str, **changes: object) -> Hourglass:
    """Make a model of width 512 on bytes."""
    config = ModelConfig(hierarchy=hierarchy, **{**KINDS[kind], **changes})  # type: ignore[arg-type]
    return Hourglass(config).eval()


def decode_with_cache(model: Hourglass, position: int, length: int) -> Callable[[], object]:
    """Return a function that generates one token, starting at `position`."""
    decoder = Decoder(model, length)
    token = torch.tensor([7])
    decoder.prefill(torch.randint(0, 256, (1, position)))
    return lambda: decoder.step(token)


def recompute(model: torch.nn.Module, position: int) -> Callable[[], object]:
    """Return a function that runs the model on `position` tokens."""
    ids = torch.randint(0, 256, (1, position))

    def run() -> object:
        with torch.inference_mode():
            return model(ids)[:, -1]

    return run


def public_model(length: int) -> torch.nn.Module | None:
    """Return the public package's model of the same shape; None if it is not installed."""
    try:
        from hourglass_transformer_pytorch import HourglassTransformerLM
    except ImportError:
        return None
    return HourglassTransformerLM(
        num_tokens=256, dim=512, max_seq_len=length, heads=8, dim_head=64, shorten_factor=3,
        depth=(2, 8, 2), causal=True,
    ).eval()  # fmt: skip


def milliseconds(
    candidates: dict[str, tuple[Callable[[], object], int]], rounds: int
) -> dict[str, float]:
    """Return medians over rounds of the mean time per call; candidates: (function, calls)."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(rounds + 1):  # the first is a warm-up
        for name, (call, count) in candidates.items():
            start = perf_counter()
            for _ in range(count):
                call()
            if turn:
                times[name].append(1e3 * (perf_counter() - start) / count)
    return {name: median(t) for name, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--kind", choices=list(KINDS), action="append")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{options.threads} threads, torch {torch.__version__}; ms per token, batch size 1")
    for kind in options.kind or KINDS:
        compare(kind, options.rounds)


def compare(kind: str, rounds: int) -> None:
    near, far = 400, 4000
    divisible = near - near % 3  # the public package fails at lengths that 3 does not divide
    short, flat = make(HOURGLASS, kind), make(FLAT, kind)
    windows = make(HOURGLASS, kind, window=[512, None])
    length = far + STEPS * (rounds + 2)
    candidates = {}
    for name, model in ((HOURGLASS, short), ("same, windows of 512", windows), (FLAT, flat)):
        for position in (near, far):
            step = decode_with_cache(model, position, length if position == far else 1000)
            candidates[f"{name} cached at {position:,}"] = step, STEPS
    candidates[f"{HOURGLASS} recomputed at {divisible}"] = recompute(short, divisible), 1
    other = public_model(divisible)
    if other is not None:
        candidates[f"public recomputed at {divisible}"] = recompute(other, divisible), 1
    times = milliseconds(candidates, rounds)
    print(f"\n{kind}", flush=True)
    for name, ms in times.items():
        print(f"  {name:40} {ms:8.2f}   {1e3 / ms:7.1f} tokens/s")
    baseline = times[f"{HOURGLASS} cached at {near:,}"]
    for name in times:
        if name != f"{HOURGLASS} cached at {near:,}":
            print(f"  {name} takes {times[name] / baseline:.2f} times {HOURGLASS} cached at {near}")
    for name in (HOURGLASS, "same, windows of 512", FLAT):
        at = [times[f"{name} cached at {p:,}"] for p in (far, near)]
        print(f"  {name}: {at[0] / at[1]:.2f} times as long per token at {far:,} as at {near}")
    for model in (short, windows, flat):
        size = cache_bytes(model.config, far) / 1e6
        print(f"  cache of {model.config.hierarchy}, {model.config.window}: {size:.1f} MB")


if __name__ == "__main__":
    main()
