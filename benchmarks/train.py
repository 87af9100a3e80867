"""Training speed: our flat model against a plain GPT of equal shape, in one run.

    python benchmarks/train.py [--hierarchy 8@1] [--length 1024] [--precision bf16 fp32]

Both train on the same random batches with the same fused AdamW, step by step in turn, and the
ratio of the medians is printed: it holds when the machine's speed drifts. The plain GPT is written
here the way nanoGPT is: one fused projection, `scaled_dot_product_attention`, LayerNorm, GELU,
learned positions. Ours has the same sizes, with rotary positions in place of learned ones.
"""

from __future__ import annotations

import argparse
from statistics import median
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hg_scale.config.schema import ModelConfig
from hg_scale.model.costs import forward_flops
from hg_scale.model.hourglass import Hourglass


class PlainBlock(nn.Module):
    """A pre-norm Transformer block."""

    def __init__(self, d: int, heads: int, d_ff: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, d_ff), nn.Linear(d_ff, d)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).split(d, dim=2)
        q, k, v = (t.view(b, n, self.heads, -1).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, n, d))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class PlainGPT(nn.Module):
    """Token and position embeddings, blocks, a norm, a head."""

    def __init__(self, vocab: int, length: int, d: int, heads: int, d_ff: int, blocks: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, d), nn.Embedding(length, d)
        self.blocks = nn.Sequential(*(PlainBlock(d, heads, d_ff) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, vocab, bias=False)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        logits = self.head(self.norm(self.blocks(x)))
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


def stepper(model: nn.Module, ids: Tensor) -> tuple[nn.Module, object]:
    """The model and a function that does one training step on `ids` (B, L + 1)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ids.is_cuda:
            torch.cuda.synchronize()

    return model, step


def seconds(step) -> float:  # type: ignore[no-untyped-def]
    start = perf_counter()
    step()
    return perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hierarchy", default="8@1")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--steps", type=int, default=9, help="of each model, after two warm-ups")
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    d, heads = options.d_model, options.d_model // 64
    config = ModelConfig(
        hierarchy=options.hierarchy, d_model=d, heads=heads, d_ff=4 * d, positions="rotary",
        sequence_length=options.length,
    )  # fmt: skip
    ids = torch.randint(0, 256, (options.batch, options.length + 1), device=device)
    threads = torch.get_num_threads()
    print(f"{options.hierarchy}, d_model {d}, batch {options.batch} x {options.length}, {device}, "
          f"{threads} threads, torch {torch.__version__}")  # fmt: skip
    for precision in options.precision:
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        ours = Hourglass(config)
        plain = PlainGPT(256, options.length, d, heads, 4 * d, config.parsed.blocks)
        steps = [stepper(m.to(device, dtype), ids)[1] for m in (ours, plain)]
        times: list[list[float]] = [[], []]
        for round_ in range(options.steps + 2):
            for which in (0, 1):
                elapsed = seconds(steps[which])
                if round_ >= 2:
                    times[which].append(elapsed)
        a, b = (median(t) for t in times)
        tokens = ids[:, 1:].numel()
        flops = 3 * forward_flops(config) * options.batch
        print(
            f"{precision}: ours {tokens / a:,.0f} tokens/s ({flops / a / 1e9:,.0f} GFLOP/s), "
            f"plain {tokens / b:,.0f} tokens/s, ratio {b / a:.3f}"
        )


if __name__ == "__main__":
    main()
