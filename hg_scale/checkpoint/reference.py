"""Weights of the published reference implementation, as golden files and imports name them.

One table of names: theirs to the left, with dense kernels (in, out); ours to the right, with
linear weights (out, in) and queries, keys and values fused head by head.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from hg_scale.config.errors import ConfigError
from hg_scale.config.load import parse_config
from hg_scale.config.schema import ModelConfig
from hg_scale.model.plan import LayerPlan, layer_plan, model_scales

Array = NDArray[np.float32]

_KINDS = {"avg": "average", "attention+avg": "attention+average"}


def reference_config(text: str) -> ModelConfig:
    """The model of a file's `config` entry. Raises ConfigError where it is not one of ours."""
    config = json.loads(text)
    model = {
        "hierarchy": config["hierarchy"],
        "d_model": config["d_model"],
        "heads": config["heads"],
        "d_ff": config["d_ff"],
        "vocab_size": config["vocab"],
        "norm_eps": config["norm_eps"],
        "shared_position_bias": True,
    }
    for key in ("pooling", "upsampling"):
        if config.get(key) not in (None, "none"):
            model[key] = _KINDS.get(config[key], config[key])
    tree = {"model": model | {"sequence_length": 2**20, "positions": "relative"}}
    try:
        return parse_config(_fit(tree)).model
    except ConfigError as error:
        raise ConfigError(error.problems, "the reference file's config") from None


def _fit(tree: dict) -> dict:
    """A training length that suits the hierarchy; the reference files' own may be any."""
    factors = [int(word.split("@")[1]) for word in tree["model"]["hierarchy"].split()]
    tree["model"]["sequence_length"] = max(factors)
    return tree


def reference_weights(weights: Mapping[str, Array], model: ModelConfig) -> dict[str, Array]:
    """Their weights (names without the leading `weight/`) under our names, vocabulary padded."""
    reader = _Reader(weights, model)
    result: dict[str, Array] = {}
    for layer in layer_plan(model):
        for name, value in reader.layer(layer).items():
            result[f"{layer.name}.{name}"] = value
    for ours, theirs in (("u", "pos_bias_u"), ("v", "pos_bias_v")):
        result[f"position_bias.{ours}"] = weights[theirs]
    return result


class _Reader:
    def __init__(self, weights: Mapping[str, Array], model: ModelConfig) -> None:
        self.weights, self.model, self.scales = weights, model, model_scales(model)

    def layer(self, layer: LayerPlan) -> dict[str, Array]:
        path, pad = layer.name.replace(".", "/"), self.model.padded_vocab - self.model.vocab_size
        match layer.kind:
            case "embedding":
                return {"table.weight": np.pad(self.weights["embed/table"], ((0, pad), (0, 0)))}
            case "head":
                dense = self.dense("head", "linear")
                return {
                    "linear.weight": np.pad(dense["linear.weight"], ((0, pad), (0, 0))),
                    "linear.bias": np.pad(dense["linear.bias"], (0, pad)),
                }
            case "norm":
                return self.norm(path.removesuffix("norm") + "final_norm", "norm")
            case "block":
                heads = self.scales[layer.scale].heads
                return {
                    **self.norm(f"{path}/attn_norm", "attention_norm"),
                    **self.attention(f"{path}/attn", "attention", heads, "qkv"),
                    **self.feed_forward(path, ""),
                }
            case "shorten":
                heads = self.scales[layer.scale + 1].heads
                return self.resampling(path, "pool", self.model.pooling, heads)
            case "upsample":
                level = path.removesuffix("/upsample")
                return {
                    **self.norm(f"{level}/upsample_norm", "norm"),
                    **self.resampling(
                        path, "expand", self.model.upsampling, self.scales[layer.scale].heads
                    ),
                }

    def dense(self, theirs: str, ours: str) -> dict[str, Array]:
        return {
            f"{ours}.weight": self.weights[f"{theirs}/kernel"].T,
            f"{ours}.bias": self.weights[f"{theirs}/bias"],
        }

    def norm(self, theirs: str, ours: str) -> dict[str, Array]:
        return {
            f"{ours}.weight": self.weights[f"{theirs}/scale"],
            f"{ours}.bias": self.weights[f"{theirs}/bias"],
        }

    def feed_forward(self, theirs: str, ours: str) -> dict[str, Array]:
        return {
            **self.norm(f"{theirs}/ff_norm", f"{ours}ff_norm"),
            **self.dense(f"{theirs}/ff1", f"{ours}ff.up"),
            **self.dense(f"{theirs}/ff2", f"{ours}ff.down"),
        }

    def attention(self, theirs: str, ours: str, heads: int, fused: str) -> dict[str, Array]:
        """`fused`: "qkv", or "kv" beside a separate q."""
        parts = [self.dense(f"{theirs}/{part}", part) for part in fused]
        result = {
            f"{ours}.{fused}.{kind}": _interleave(
                [part[f"{name}.{kind}"] for name, part in zip(fused, parts, strict=True)], heads
            )
            for kind in ("weight", "bias")
        }
        for name in ("pos", "out") if fused == "qkv" else ("q", "pos", "out"):
            result |= self.dense(f"{theirs}/{name}", f"{ours}.{name}")
        return result

    def resampling(self, theirs: str, linear: str, kind: str, heads: int) -> dict[str, Array]:
        result: dict[str, Array] = {}
        if "linear" in kind:
            result |= self.dense(f"{theirs}/{linear}", linear)
        if kind.startswith("attention"):
            for name in ("in_norm", "base_norm"):
                result |= self.norm(f"{theirs}/{name}", f"attend.{name}")
            result |= self.attention(f"{theirs}/attn", "attend.attention", heads, "kv")
            result |= self.feed_forward(theirs, "attend.")
        return result


def _interleave(parts: list[Array], heads: int) -> Array:
    """Matrices (heads * d_head, ...) as one of (heads, part, d_head, ...) rows."""
    split = [part.reshape(heads, -1, *part.shape[1:]) for part in parts]
    stacked = np.stack(split, 1)
    return stacked.reshape(-1, *parts[0].shape[1:])
