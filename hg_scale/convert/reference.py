"""Weights of the published reference implementation, as golden files and imports name them.

One table of names: theirs to the left, with dense kernels (in, out); ours to the right, with
linear weights (out, in) and queries, keys and values fused head by head.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from math import lcm
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hg_scale.checkpoint.errors import CheckpointError
from hg_scale.config.errors import ConfigError
from hg_scale.config.hierarchy import Hierarchy
from hg_scale.config.load import parse_config
from hg_scale.config.resampling_kind import ResamplingKind
from hg_scale.config.schema import ModelConfig
from hg_scale.model.plan import LayerPlan, layer_plan, model_levels

Float32Array = NDArray[np.float32]

_KINDS = {  # theirs and ours of a resampling
    "pooling": {
        "avg": "average",
        "linear": "linear",
        "attention+avg": "attention+average",
        "attention+linear": "attention+linear",
    },
    "upsampling": {
        "repeat": "repeat",
        "linear": "linear",
        "attention+repeat": "attention+repeat",
        "attention+linear": "attention+linear",
        "attention+none": "attention+none",
    },
}
_ONLY = {"activation": "gelu_tanh", "attention": "relative"}  # what the format can say of these
_SIZES = {"d_model": "d_model", "heads": "heads", "d_ff": "d_ff", "vocab": "vocab_size"}


def read_entries(path: Path, *needed: str) -> dict[str, Any]:
    """All arrays of a golden file. Raises CheckpointError where it is none; unpickles nothing."""
    try:
        with np.load(path, allow_pickle=False) as file:
            entries: dict[str, Any] = {name: file[name] for name in file.files}
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror or error}") from None
    except Exception:  # a damaged one raises nearly any
        raise CheckpointError("not a golden file: expected numpy's .npz, without pickles") from None
    for name in needed:
        if name not in entries:
            raise CheckpointError(f"not a golden file: has no {name}")
    return entries


def describe_array(array: NDArray[Any]) -> str:
    """Its type and shape, in words."""
    return f"{array.dtype} {array.shape}"


def under(entries: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The entries whose names begin with `prefix`, without it."""
    return {k.removeprefix(prefix): v for k, v in entries.items() if k.startswith(prefix)}


def reference_config(text: str, tensor: int = 1) -> ModelConfig:
    """The model of a file's `config` entry, to be cut into `tensor` slices.

    Raises CheckpointError where it is not one of ours, or cannot be cut so.
    """
    try:
        config = json.loads(text)
        model = {ours: config[theirs] for theirs, ours in _SIZES.items()}
        hierarchy = config["hierarchy"]
        for key, only in _ONLY.items():
            if config.get(key, only) != only:
                raise CheckpointError(f"config: {key} is {config[key]!r}, expected {only!r}")
    except (ValueError, TypeError, AttributeError):
        raise CheckpointError(f"config: expected a JSON object, got {text[:40]!r}") from None
    except KeyError as error:
        raise CheckpointError(f"config: has no {error}") from None
    model |= {
        "hierarchy": hierarchy,
        "norm_eps": config.get("norm_eps", 1e-6),
        "positions": "relative",
        "shared_position_bias": True,
        "vocab_multiple": lcm(64, tensor),
    }
    with suppress(ValueError, AttributeError):  # a faulty hierarchy is told of below
        parsed = Hierarchy.parse(hierarchy)
        model["sequence_length"] = parsed.total_factor  # the files' may be any
        if parsed.shortenings:
            model |= {key: _resampling(config, key) for key in _KINDS}
    try:
        return parse_config({"model": model, "parallel": {"tensor": tensor}}).model
    except ConfigError as error:
        by_key = {problem.key: str(problem) for problem in reversed(error.problems)}
        raise CheckpointError("config: " + "; ".join(reversed(by_key.values()))) from None


def _resampling(config: dict[str, Any], key: str) -> str:
    kinds, kind = _KINDS[key], config.get(key)
    if not isinstance(kind, str) or kind not in kinds:
        expected = ", ".join(map(repr, kinds))
        raise CheckpointError(f"config: {key} is {kind!r}, expected one of {expected}")
    return kinds[kind]


def reference_weights(
    weights: Mapping[str, Float32Array], model: ModelConfig
) -> dict[str, Float32Array]:
    """Their weights (names without the leading `weight/`) under our names, vocabulary padded.

    Raises CheckpointError naming the first that is missing, of another shape, or left over.
    """
    reader = _Reader(weights, model)
    result: dict[str, Float32Array] = {}
    for layer in layer_plan(model):
        for name, value in reader.layer(layer).items():
            result[f"{layer.name}.{name}"] = value
    heads, d = reader.levels[0].heads, reader.levels[0].d_model
    for ours, theirs in (("u", "pos_bias_u"), ("v", "pos_bias_v")):
        result[f"position_bias.{ours}"] = reader.weight(theirs, heads, d // heads)
    left = sorted(weights.keys() - reader.used)
    if left:
        raise CheckpointError(f"weight/{left[0]}: '{model.hierarchy}' has no use for it")
    return result


class _Reader:
    def __init__(self, weights: Mapping[str, Float32Array], model: ModelConfig) -> None:
        self.weights, self.model, self.levels = weights, model, model_levels(model)
        self.used: set[str] = set()

    def weight(self, name: str, *shape: int) -> Float32Array:
        if name not in self.weights:
            raise CheckpointError(f"weight/{name} is missing")
        value = self.weights[name]
        if value.shape != shape or value.dtype.kind not in "fiu":
            raise CheckpointError(
                f"weight/{name} is {describe_array(value)}, expected numbers {shape}"
            )
        self.used.add(name)
        return value

    def layer(self, layer: LayerPlan) -> dict[str, Float32Array]:
        path, model, level = layer.name.replace(".", "/"), self.model, self.levels[layer.level]
        d, vocab = level.d_model, model.vocab_size
        pad = model.padded_vocab - vocab
        match layer.kind:
            case "embedding":
                table = self.weight("embed/table", vocab, d)
                return {"table.weight": np.pad(table, ((0, pad), (0, 0)))}
            case "head":
                dense = self.dense("head", "linear", d, vocab)
                return {
                    "linear.weight": np.pad(dense["linear.weight"], ((0, pad), (0, 0))),
                    "linear.bias": np.pad(dense["linear.bias"], (0, pad)),
                }
            case "norm":
                return self.norm(path.removesuffix("norm") + "final_norm", "norm", d)
            case "block":
                return {
                    **self.norm(f"{path}/attn_norm", "attention_norm", d),
                    **self.attention(f"{path}/attn", "attention", level.heads, "qkv", d),
                    **self.feed_forward(path, "", d, level.d_ff),
                }
            case "shorten":
                k = self.levels[layer.level + 1].factor // level.factor
                return self.resampling(
                    path, ("pool", k * d, d), model.pooling_kind, layer.level + 1
                )
            case "upsample":
                k = self.levels[layer.level + 1].factor // level.factor
                theirs = path.removesuffix("/upsample")
                return {
                    **self.norm(f"{theirs}/upsample_norm", "norm", d),
                    **self.resampling(
                        path, ("expand", d, k * d), model.upsampling_kind, layer.level
                    ),
                }

    def dense(self, theirs: str, ours: str, d_in: int, d_out: int) -> dict[str, Float32Array]:
        return {
            f"{ours}.weight": self.weight(f"{theirs}/kernel", d_in, d_out).T,
            f"{ours}.bias": self.weight(f"{theirs}/bias", d_out),
        }

    def norm(self, theirs: str, ours: str, d: int) -> dict[str, Float32Array]:
        return {
            f"{ours}.weight": self.weight(f"{theirs}/scale", d),
            f"{ours}.bias": self.weight(f"{theirs}/bias", d),
        }

    def feed_forward(self, theirs: str, ours: str, d: int, d_ff: int) -> dict[str, Float32Array]:
        return {
            **self.norm(f"{theirs}/ff_norm", f"{ours}ff_norm", d),
            **self.dense(f"{theirs}/ff1", f"{ours}ff.up", d, d_ff),
            **self.dense(f"{theirs}/ff2", f"{ours}ff.down", d_ff, d),
        }

    def attention(
        self, theirs: str, ours: str, heads: int, fused: str, d: int
    ) -> dict[str, Float32Array]:
        """`fused`: "qkv", or "kv" beside a separate q."""
        parts = [self.dense(f"{theirs}/{part}", part, d, d) for part in fused]
        result = {
            f"{ours}.{fused}.{kind}": _interleave(
                [part[f"{name}.{kind}"] for name, part in zip(fused, parts, strict=True)], heads
            )
            for kind in ("weight", "bias")
        }
        for name in ("pos", "out") if fused == "qkv" else ("q", "pos", "out"):
            result |= self.dense(f"{theirs}/{name}", f"{ours}.{name}", d, d)
        return result

    def resampling(
        self, theirs: str, linear: tuple[str, int, int], kind: ResamplingKind, queries: int
    ) -> dict[str, Float32Array]:
        """`linear`: name, input and output width of the linear one; `queries`: their level."""
        level = self.levels[queries]
        result: dict[str, Float32Array] = {}
        if kind.base == "linear":
            name, d_in, d_out = linear
            result |= self.dense(f"{theirs}/{name}", name, d_in, d_out)
        if kind.attends:
            for name in ("in_norm", "base_norm"):
                result |= self.norm(f"{theirs}/{name}", f"attend.{name}", level.d_model)
            result |= self.attention(
                f"{theirs}/attn", "attend.attention", level.heads, "kv", level.d_model
            )
            result |= self.feed_forward(theirs, "attend.", level.d_model, level.d_ff)
        return result


def _interleave(parts: list[Float32Array], heads: int) -> Float32Array:
    """Matrices (heads * d_head, ...) as one of (heads, part, d_head, ...) rows."""
    split = [part.reshape(heads, -1, *part.shape[1:]) for part in parts]
    stacked = np.stack(split, 1)
    return stacked.reshape(-1, *parts[0].shape[1:])
