"""Golden files: weights of the published reference implementation, and how they map to hg_scale's.

The reference stores dense kernels as (in, out) and queries, keys and values apart; hg_scale stores
linear weights as (out, in) and queries, keys and values fused head by head.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from math import lcm
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hg_scale.bounded_read import FormatError, parse_json, require_regular
from hg_scale.checkpoint.errors import CheckpointError
from hg_scale.config.errors import ConfigError
from hg_scale.config.hierarchy import Hierarchy
from hg_scale.config.load import parse_config
from hg_scale.config.resampling_kind import ResamplingKind
from hg_scale.config.schema import ModelConfig
from hg_scale.convert.source import WeightSource
from hg_scale.model.plan import LayerPlan, layer_plan, model_levels

Float32Array = NDArray[np.float32]

_RESAMPLINGS = {  # the reference's name: hg_scale's
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
_FIXED = {"activation": "gelu_tanh", "attention": "relative"}  # the only values supported
_SIZES = {"d_model": "d_model", "heads": "heads", "d_ff": "d_ff", "vocab": "vocab_size"}


class GoldenSource(WeightSource):
    """A golden file (`.npz`) as a source of weights. Raises CheckpointError if it is not one."""

    format_name = "golden file"

    def __init__(self, path: Path) -> None:
        try:
            arrays = read_golden_arrays(path, "config")
            model = reference_config(str(arrays["config"]))
            self._weights = reference_weights(strip_prefix(arrays, "weight/"), model)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        shapes = {name: value.shape for name, value in self._weights.items()}
        super().__init__((path,), path, model, shapes)

    def _read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        return torch.from_numpy(self._weights[name].reshape(-1)[start:stop].copy()).float()


def read_golden_arrays(path: Path, *required: str) -> dict[str, Any]:
    """Return all arrays of a golden file by name; nothing is unpickled.

    Raises CheckpointError if it cannot be read, or lacks a required array.
    """
    try:
        require_regular(path)
        with np.load(path, allow_pickle=False) as file:
            arrays: dict[str, Any] = {name: file[name] for name in file.files}
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror or error}") from None
    except FormatError as error:
        raise CheckpointError(f"cannot be read: {error}") from None
    except Exception:  # a corrupt file may raise anything
        raise CheckpointError("not a golden file: expected numpy's .npz, without pickles") from None
    for name in required:
        if name not in arrays:
            raise CheckpointError(f"not a golden file: has no {name}")
    return arrays


def describe_array(array: NDArray[Any]) -> str:
    """Describe an array by its dtype and shape, for messages."""
    return f"{array.dtype} {array.shape}"


def strip_prefix(arrays: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return the arrays whose names begin with `prefix`, under the rest of their names."""
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def reference_config(text: str, tensor: int = 1) -> ModelConfig:
    """Parse the `config` entry of a golden file, for `tensor` tensor-parallel ranks.

    Raises CheckpointError if hg_scale has no such model, or it cannot be sharded so.
    """
    try:
        config = parse_json(text)
        model = {key: config[name] for name, key in _SIZES.items()}
        hierarchy = config["hierarchy"]
        for key, value in _FIXED.items():
            if config.get(key, value) != value:
                raise CheckpointError(f"config: {key} is {config[key]!r}, expected {value!r}")
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
    with suppress(ValueError, AttributeError):  # `parse_config` below reports an invalid hierarchy
        parsed = Hierarchy.parse(hierarchy)
        model["sequence_length"] = parsed.total_factor  # golden files may have any length
        if parsed.shortenings:
            model |= {key: _resampling(config, key) for key in _RESAMPLINGS}
    try:
        return parse_config({"model": model, "parallel": {"tensor": tensor}}).model
    except ConfigError as error:
        by_key = {problem.key: str(problem) for problem in reversed(error.problems)}
        raise CheckpointError("config: " + "; ".join(reversed(by_key.values()))) from None


def _resampling(config: dict[str, Any], key: str) -> str:
    kinds, kind = _RESAMPLINGS[key], config.get(key)
    if not isinstance(kind, str) or kind not in kinds:
        expected = ", ".join(map(repr, kinds))
        raise CheckpointError(f"config: {key} is {kind!r}, expected one of {expected}")
    return kinds[kind]


def reference_weights(
    weights: Mapping[str, Float32Array], model: ModelConfig
) -> dict[str, Float32Array]:
    """Convert the reference's weights to hg_scale's names and layout, with the vocabulary padded.

    weights: by name without the leading `weight/`. Raises CheckpointError naming the first that is
    missing, of another shape, or unused.
    """
    reader = _Reader(weights, model)
    result: dict[str, Float32Array] = {}
    for layer in layer_plan(model):
        for name, value in reader.layer(layer).items():
            result[f"{layer.name}.{name}"] = value
    heads, d = reader.levels[0].heads, reader.levels[0].d_model
    for name, reference_name in (("u", "pos_bias_u"), ("v", "pos_bias_v")):
        result[f"position_bias.{name}"] = reader.weight(reference_name, heads, d // heads)
    unused = sorted(weights.keys() - reader.used)
    if unused:
        raise CheckpointError(f"weight/{unused[0]}: '{model.hierarchy}' has no such parameter")
    return result


class _Reader:
    """Convert the reference's weights layer by layer.

    Methods take the reference's name first, then hg_scale's, and return weights by hg_scale's name.
    """

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
                parent = path.removesuffix("/upsample")
                return {
                    **self.norm(f"{parent}/upsample_norm", "norm", d),
                    **self.resampling(
                        path, ("expand", d, k * d), model.upsampling_kind, layer.level
                    ),
                }

    def dense(self, source: str, name: str, d_in: int, d_out: int) -> dict[str, Float32Array]:
        return {
            f"{name}.weight": self.weight(f"{source}/kernel", d_in, d_out).T,
            f"{name}.bias": self.weight(f"{source}/bias", d_out),
        }

    def norm(self, source: str, name: str, d: int) -> dict[str, Float32Array]:
        return {
            f"{name}.weight": self.weight(f"{source}/scale", d),
            f"{name}.bias": self.weight(f"{source}/bias", d),
        }

    def feed_forward(self, source: str, prefix: str, d: int, d_ff: int) -> dict[str, Float32Array]:
        return {
            **self.norm(f"{source}/ff_norm", f"{prefix}ff_norm", d),
            **self.dense(f"{source}/ff1", f"{prefix}ff.up", d, d_ff),
            **self.dense(f"{source}/ff2", f"{prefix}ff.down", d_ff, d),
        }

    def attention(
        self, source: str, name: str, heads: int, fused: str, d: int
    ) -> dict[str, Float32Array]:
        """fused: "qkv", or "kv" beside a separate q."""
        projections = [self.dense(f"{source}/{part}", part, d, d) for part in fused]
        result = {
            f"{name}.{fused}.{kind}": _interleave(
                [dense[f"{p}.{kind}"] for p, dense in zip(fused, projections, strict=True)], heads
            )
            for kind in ("weight", "bias")
        }
        for part in ("pos", "out") if fused == "qkv" else ("q", "pos", "out"):
            result |= self.dense(f"{source}/{part}", f"{name}.{part}", d, d)
        return result

    def resampling(
        self, source: str, linear: tuple[str, int, int], kind: ResamplingKind, queries: int
    ) -> dict[str, Float32Array]:
        """linear: name, input and output width of a linear resampling; queries: their level."""
        level = self.levels[queries]
        result: dict[str, Float32Array] = {}
        if kind.base == "linear":
            name, d_in, d_out = linear
            result |= self.dense(f"{source}/{name}", name, d_in, d_out)
        if kind.attends:
            for name in ("in_norm", "base_norm"):
                result |= self.norm(f"{source}/{name}", f"attend.{name}", level.d_model)
            result |= self.attention(
                f"{source}/attn", "attend.attention", level.heads, "kv", level.d_model
            )
            result |= self.feed_forward(source, "attend.", level.d_model, level.d_ff)
        return result


def _interleave(parts: list[Float32Array], heads: int) -> Float32Array:
    """Fuse matrices (heads * d_head, ...) into one with rows ordered (head, part, d_head)."""
    split = [part.reshape(heads, -1, *part.shape[1:]) for part in parts]
    stacked = np.stack(split, 1)
    return stacked.reshape(-1, *parts[0].shape[1:])
