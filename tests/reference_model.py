"""The reference model in numpy, and new files in the format of the golden ones.

Implemented in float64 from the README of the golden files alone, independently of the package: it
imports nothing of it and shares neither names nor tricks with it. Attention is a plain sum over
pairs. Weights are requested by name and shape, from a file or drawn at random.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Weight = Callable[[str, tuple[int, ...]], Array]

NORM_EPS, MASK_VALUE = 1e-6, -1e9


@dataclass(frozen=True)
class Case:
    """The model and the input that a golden file's `config` describes."""

    hierarchy: str
    pooling: str | None = "avg"
    upsampling: str | None = "repeat"
    length: int = 24
    d_model: int = 32
    d_ff: int = 64
    heads: int = 4
    vocab: int = 64
    batch: int = 2

    @classmethod
    def of(cls, config: str) -> Case:
        """Read a `config` entry."""
        keys = json.loads(config)
        return cls(**{name: keys[name] for name in cls.__dataclass_fields__})

    def config(self, name: str) -> str:
        """Return the `config` entry of a file."""
        rest = {"dropout": 0.0, "mode": "eval", "norm_eps": NORM_EPS, "mask_value": MASK_VALUE}
        kind = {"activation": "gelu_tanh", "attention": "relative"}
        return json.dumps({"case": name} | asdict(self) | rest | kind)

    @property
    def entries(self) -> list[tuple[int, int]]:
        """(blocks, total factor) of every entry of the hierarchy."""
        pairs = (entry.split("@") for entry in self.hierarchy.split())
        return [(int(blocks), int(factor)) for blocks, factor in pairs]


# Weights


def stored_weights(weights: Mapping[str, Any]) -> Weight:
    """Return the weights of a file, whose names start with `weight/`."""

    def weight(name: str, shape: tuple[int, ...]) -> Array:
        value = np.asarray(weights[f"weight/{name}"], np.float64)
        assert value.shape == shape, (name, value.shape, shape)
        return value

    return weight


def random_weights(seed: int, weights: dict[str, NDArray[np.float32]]) -> Weight:
    """Draw multiples of 1/512 and add them to `weights`; no norm scale is 1, no bias 0."""
    random = np.random.default_rng(seed)

    def weight(name: str, shape: tuple[int, ...]) -> Array:
        if f"weight/{name}" not in weights:
            kind = name.rpartition("/")[2]
            sign = random.choice([-1.0, 1.0], shape)
            if kind in ("kernel", "table"):
                value = random.normal(0, sqrt(2 / sum(shape)), shape)
            elif kind == "scale":
                value = 1 + sign * random.uniform(0.1, 0.4, shape)
            else:  # a bias
                value = sign * random.uniform(0.03, 0.25 if kind == "bias" else 0.6, shape)
            weights[f"weight/{name}"] = (np.round(value * 512) / 512).astype(np.float32)
        return weights[f"weight/{name}"].astype(np.float64)

    return weight


# The forward pass


def gelu(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(0.7978845608 * (x + 0.044715 * x**3)))


def distances(kind: str, n: int, m: int, k: int, p: int) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Signed distance r and visibility of every pair of query i and key j, each (n, m)."""
    i, j = np.arange(n)[:, None], np.arange(m)[None, :]
    if kind == "stack":
        return (j - i) * p, j <= i
    if kind == "shorten":
        return (j - k * i) * p, j // k <= i
    return k * j - i, j <= i // k


class Reference:
    """One forward pass; `activations` collects them under their names in the files."""

    def __init__(self, case: Case, weight: Weight) -> None:
        self.case, self.weight, self.d = case, weight, case.d_model
        self.activations: dict[str, Array] = {}

    def run(self, shifted: NDArray[np.int32]) -> Array:
        """Return the logits (B, L, vocab) of ids (B, L) that are already shifted."""
        entries, vocab = self.case.entries, self.case.vocab
        x = self.weight("embed/table", (vocab, self.d))[shifted]
        self.record("embed", x)
        x = self.record("pre", self.stack("pre", x, entries[0][0], 1))
        if len(entries) > 1:
            levels = entries[1 : 1 + len(entries[1:-1]) // 2 + 1]
            x = self.level(0, levels, x, 1)
            x = self.record("post", self.stack("post", x, entries[-1][0], 1))
        return self.dense("head", x, vocab)

    def record(self, name: str, x: Array) -> Array:
        self.activations[f"act/{name}"] = x
        return x

    def dense(self, name: str, x: Array, d_out: int) -> Array:
        kernel = self.weight(f"{name}/kernel", (x.shape[-1], d_out))
        return x @ kernel + self.weight(f"{name}/bias", (d_out,))

    def norm(self, name: str, x: Array) -> Array:
        centred = x - x.mean(-1, keepdims=True)
        variance = (centred**2).mean(-1, keepdims=True)
        scale, bias = (self.weight(f"{name}/{part}", (self.d,)) for part in ("scale", "bias"))
        return centred / np.sqrt(variance + NORM_EPS) * scale + bias

    def feed_forward(self, name: str, x: Array) -> Array:
        hidden = gelu(self.dense(f"{name}/ff1", self.norm(f"{name}/ff_norm", x), self.case.d_ff))
        return self.dense(f"{name}/ff2", hidden, self.d)

    def attention(self, name: str, kind: str, queries: Array, source: Array, k: int, p: int):  # type: ignore[no-untyped-def]
        """Attend from `queries` (B, n, d) to `source` (B, m, d), pair by pair."""
        heads, d_h = self.case.heads, self.d // self.case.heads
        n, m = queries.shape[1], source.shape[1]
        split = (heads, d_h)
        q = self.dense(f"{name}/q", queries, self.d).reshape(-1, n, *split)
        keys = self.dense(f"{name}/k", source, self.d).reshape(-1, m, *split)
        values = self.dense(f"{name}/v", source, self.d).reshape(-1, m, *split)
        r, visible = distances(kind, n, m, k, p)
        w = 10000.0 ** (-2 * np.arange(self.d // 2) / self.d)
        angles = r[..., None] * w
        waves = np.concatenate([np.sin(angles), np.cos(angles)], -1)  # (n, m, d)
        e = self.dense(f"{name}/pos", waves, self.d).reshape(n, m, *split)
        u, v = self.weight("pos_bias_u", split), self.weight("pos_bias_v", split)
        score = np.einsum("bihc,bjhc->bhij", q + u, keys)
        score = (score + np.einsum("bihc,ijhc->bhij", q + v, e)) / sqrt(d_h)
        score = np.where(visible, score, MASK_VALUE)
        weights = np.exp(score - score.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        mixed = np.einsum("bhij,bjhc->bihc", weights, values).reshape(-1, n, self.d)
        return self.dense(f"{name}/out", mixed, self.d)

    def stack(self, name: str, x: Array, blocks: int, p: int) -> Array:
        for i in range(blocks):
            block = f"{name}/{i}"
            t = self.norm(f"{block}/attn_norm", x)
            x = x + self.attention(f"{block}/attn", "stack", t, t, 1, p)
            x = x + self.feed_forward(block, x)
        return self.norm(f"{name}/final_norm", x)

    def level(self, j: int, levels: list[tuple[int, int]], x: Array, p: int) -> Array:
        """Run level j, the first (blocks, factor) in `levels`, entered at factor p."""
        (blocks, f), *inside = levels
        k, name = f // p, f"level{j}"
        zeros = np.zeros((x.shape[0], k - 1, self.d))
        s = np.concatenate([zeros, x[:, : x.shape[1] - (k - 1)]], 1)
        z = self.record(f"{name}/shorten", self.shorten(f"{name}/shorten", s, k, p))
        if inside:
            z = self.record(f"{name}/pre", self.stack(f"{name}/pre", z, blocks, f))
            z = self.level(j + 1, inside, z, f)
            z = self.record(f"{name}/post", self.stack(f"{name}/post", z, blocks, f))
        else:
            z = self.record(f"{name}/stack", self.stack(f"{name}/stack", z, blocks, f))
        y = self.record(f"{name}/upsample", self.upsample(f"{name}/upsample", z, x, k))
        return self.record(f"{name}/out", x + self.norm(f"{name}/upsample_norm", y))

    def shorten(self, name: str, s: Array, k: int, p: int) -> Array:
        attention, _, kind = str(self.case.pooling).rpartition("+")

        def resize(x: Array) -> Array:
            groups = x.reshape(x.shape[0], -1, k * self.d)
            if kind == "linear":
                return self.dense(f"{name}/pool", groups, self.d)
            assert kind == "avg", kind
            return groups.reshape(*groups.shape[:2], k, self.d).mean(2)

        if not attention:
            return resize(s)
        t = self.norm(f"{name}/in_norm", s)
        b = self.norm(f"{name}/base_norm", resize(t))
        b = b + self.attention(f"{name}/attn", "shorten", b, t, k, p)
        return b + self.feed_forward(name, b)

    def upsample(self, name: str, z: Array, x: Array, k: int) -> Array:
        attention, _, kind = str(self.case.upsampling).rpartition("+")

        def resize(z: Array) -> Array:
            if kind == "linear":
                return self.dense(f"{name}/expand", z, k * self.d).reshape(x.shape)
            if kind == "none":
                return np.zeros_like(x)
            assert kind == "repeat", kind
            return z.repeat(k, axis=1)

        if not attention:
            return resize(z)
        t = self.norm(f"{name}/in_norm", z)
        b = self.norm(f"{name}/base_norm", resize(t)) + x
        b = b + self.attention(f"{name}/attn", "upsample", b, t, k, 0)
        return b + self.feed_forward(name, b)


# Files


def make_file(path: Path, case: Case, seed: int = 1) -> Path:
    """Write a file in the golden format: random weights and ids, and the model's outputs."""
    weights: dict[str, NDArray[np.float32]] = {}
    tokens = np.random.default_rng(seed).integers(0, case.vocab, (case.batch, case.length))
    tokens = tokens.astype(np.int32)
    tokens[:, 1:2] = 0  # an ordinary id
    shifted = np.pad(tokens, ((0, 0), (1, 0)))[:, :-1]
    reference = Reference(case, random_weights(seed, weights))
    logits = reference.run(shifted).astype(np.float32)
    activations = {name: x.astype(np.float32) for name, x in reference.activations.items()}
    inputs = {"input/tokens": tokens, "input/tokens_shifted": shifted, "output/logits": logits}
    config: dict[str, Any] = {"config": np.array(case.config(path.stem))}
    np.savez_compressed(path, **config, **inputs, **weights, **activations)
    return path
