"""The flat control of a hierarchical model: a Transformer of equal training FLOPs per token.

Depth and width grow together. Layers added at the width of the outermost level would make a control
that is too deep and narrow, and byte models of one size differ by up to a fifth in loss by their
shape alone (arXiv 2609.29397). The rule is the fit of Levine et al. ("Limits to depth efficiencies
of self-attention", NeurIPS 2020, arXiv 2006.12467), up to which depth adding layers pays more than
adding width, measured on language models of 6 to 48 layers: ln(width) = 5.039 + 0.0555 layers.
Below 6 layers, where it has no measurements, the ratio of width to depth stays that of 6 layers.

Head size, ratio of d_ff to width, attention window and positions stay those of level 0, the full
length. A windowed flat model is the stronger baseline on bytes at equal FLOPs (SpaceByte,
arXiv 2404.14408).
"""

from __future__ import annotations

import json
import os
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from math import exp, lcm, log
from pathlib import Path
from typing import Any

from hg_scale.config.hierarchy import MAX_BLOCKS
from hg_scale.config.load import parse_config
from hg_scale.config.read import merge
from hg_scale.config.schema import Config, ModelConfig
from hg_scale.errors import UserError
from hg_scale.model.costs import training_flops_per_token

TOLERANCE = 0.01  # largest relative difference of the training FLOPs per token
LOG_WIDTH, LOG_WIDTH_PER_LAYER, LEAST_FITTED_DEPTH = 5.039, 0.0555, 6  # Levine et al.
ASPECT_OF_SHALLOW = exp(LOG_WIDTH + LOG_WIDTH_PER_LAYER * LEAST_FITTED_DEPTH) / LEAST_FITTED_DEPTH
GRAINS = (64, 32, 16, 8, 4, 2, 1)  # multiples that d_ff is rounded to, for the speed of kernels
D_FF_WEIGHT = 2  # of the deviation in the ratio of d_ff, beside that in depth
NEIGHBOURS = 4  # widths on each side of the one where equal FLOPs meet the rule


@dataclass(frozen=True)
class FlatControl:
    """The flat control of a configuration, and how it was chosen.

    `settings`: values by dotted key that replace those of the given configuration. FLOPs are
    training FLOPs per token. `rule` and `window` say in words how depth, width and window came
    about.
    """

    settings: dict[str, Any]
    depth: int
    width: int
    flops_per_token: float
    hierarchical_flops_per_token: float
    rule: str
    window: str

    @property
    def difference(self) -> float:
        """FLOPs of the control relative to those of the hierarchy, minus 1."""
        return self.flops_per_token / self.hierarchical_flops_per_token - 1

    @property
    def tree(self) -> dict[str, Any]:
        """The settings as sections of a configuration file."""
        tree: dict[str, Any] = {}
        for key, value in self.settings.items():
            section, name = key.split(".")
            tree.setdefault(section, {})[name] = value
        return tree

    def apply(self, config: Config) -> Config:
        """Return the complete configuration of the control of `config`. Raises ConfigError."""
        return parse_config(merge(config.model_dump(), self.tree), source="the flat control")


def control_file(control: FlatControl, base: Path, target: Path) -> str:
    """Return the JSON of a configuration at `target` that extends the one at `base`."""
    notes = (
        f"The flat control of {base.stem}: {control.flops_per_token / 1e9:.4g} GFLOPs of training "
        f"per token against {control.hierarchical_flops_per_token / 1e9:.4g} "
        f"({control.difference:+.2%}). {control.rule} {control.window} Tune its learning rate on "
        "its own."
    )
    extends = os.path.relpath(base.absolute(), target.absolute().parent)
    return json.dumps({"extends": extends, "notes": notes, **control.tree}, indent=2) + "\n"


def rule_depth(width: int) -> float:
    """Return the layers of a flat model of `width`, not rounded: the rule of this module."""
    depth = (log(width) - LOG_WIDTH) / LOG_WIDTH_PER_LAYER
    return depth if depth >= LEAST_FITTED_DEPTH else width / ASPECT_OF_SHALLOW


def flat_control(config: Config) -> FlatControl:
    """Return the flat configuration of equal training FLOPs per token, within 1%.

    Its width is a multiple of the head size x `parallel.tensor`, and it has a block for every
    pipeline stage. Of the shapes of equal FLOPs it has the one with the least
    |ln(depth / rule)| + 2 |ln(ratio of d_ff / ratio of level 0)|. Raises UserError for a flat
    configuration, and where no flat model has so few FLOPs.
    """
    model = config.model
    if not model.parsed.shortenings:
        raise UserError(
            f"model.hierarchy = '{model.hierarchy}': is flat already; name a configuration with "
            "shortened levels"
        )
    target = training_flops_per_token(model)
    shapes = list(_shapes(config, target))
    if not shapes:
        raise UserError(
            f"model.hierarchy = '{model.hierarchy}': no flat model with heads of width "
            f"{_head_size(model)} and parallel.tensor {config.parallel.tensor} has its "
            f"{target:,.0f} training FLOPs per token within {TOLERANCE:.0%}; use a smaller "
            "parallel.tensor or more heads at level 0"
        )
    best = min(shapes, key=lambda shape: shape.distance)
    settings = _settings(config, best)
    window = settings["model.window"]
    ratio, kept = best.d_ff / best.width, model.by_level("d_ff")[0] / model.by_level("d_model")[0]
    control = FlatControl(
        settings,
        best.depth,
        best.width,
        best.flops,
        target,
        f"{best.depth} layers of width {best.width}, nearest to ln(width) = {LOG_WIDTH} + "
        f"{LOG_WIDTH_PER_LAYER} layers (arXiv 2006.12467), which has {rule_depth(best.width):.1f} "
        f"layers at this width; heads of width {_head_size(model)} as at level 0; d_ff / width "
        f"{ratio:.3g} (level 0: {kept:.3g}).",
        f"Window of {window} tokens in every layer, as at level 0."
        if window
        else "Full attention in every layer, as at level 0.",
    )
    control.apply(config)  # the checks of a configuration
    return control


@dataclass(frozen=True)
class _Shape:
    """A flat model: its shape, training FLOPs per token, and distance from the rule."""

    depth: int
    width: int
    heads: int
    d_ff: int
    flops: float
    distance: float


def _shapes(config: Config, target: float) -> Iterator[_Shape]:
    """Yield flat models within the tolerance, around the width where equal FLOPs meet the rule."""
    model, tensor = config.model, config.parallel.tensor
    head, least_depth = _head_size(model), config.parallel.pipeline
    ratio = model.by_level("d_ff")[0] / model.by_level("d_model")[0]
    unit = lcm(head * tensor, 2)  # relative positions need an even width
    family = _FlatFamily(model, head)

    def wanted_depth(width: int) -> float:
        return min(max(rule_depth(width), least_depth), MAX_BLOCKS)

    def too_wide(multiple: int) -> bool:
        width = multiple * unit
        return family.depth(width, ratio * width, target) < wanted_depth(width)

    widths = range(1, max(2, 1_000_000 // unit))
    crossing = widths[min(bisect_left(widths, True, key=too_wide), len(widths) - 1)]
    for multiple in range(max(1, crossing - NEIGHBOURS), crossing + NEIGHBOURS + 1):
        width = multiple * unit
        equal_depth = family.depth(width, ratio * width, target)
        for depth in {int(equal_depth), int(equal_depth) + 1}:
            if not max(1, least_depth) <= depth <= MAX_BLOCKS:
                continue
            for grain in GRAINS:
                step = lcm(grain, tensor)
                d_ff = step * max(1, round(family.d_ff(width, depth, target) / step))
                flops = family.flops(width, depth, d_ff)
                if abs(flops / target - 1) <= TOLERANCE:
                    distance = abs(log(depth / rule_depth(width)))
                    distance += D_FF_WEIGHT * abs(log(d_ff / width / ratio))
                    yield _Shape(depth, width, width // head, d_ff, flops, distance)
                    break


class _FlatFamily:
    """Training FLOPs per token of flat models: linear in the depth, and in d_ff of each layer."""

    def __init__(self, model: ModelConfig, head: int) -> None:
        self.model, self.head = model, head

    def flops(self, width: int, depth: int, d_ff: int) -> float:
        """Return the training FLOPs per token of one model."""
        keys = _model_keys(self.model, depth, width, width // self.head, d_ff)
        return training_flops_per_token(ModelConfig(**{**self.model.model_dump(), **keys}))

    def _line(self, width: int) -> tuple[float, float, float]:
        """Return (FLOPs of the rest, of a layer without feed-forward, of a unit of d_ff)."""
        one, wider, two = (
            self.flops(width, depth, d_ff) for depth, d_ff in ((1, 1), (1, 2), (2, 1))
        )
        layer, unit = two - one, wider - one
        return one - layer, layer - unit, unit

    def depth(self, width: int, d_ff: float, target: float) -> float:
        """Return the depth of equal FLOPs, not rounded."""
        rest, layer, unit = self._line(width)
        return (target - rest) / (layer + unit * d_ff)

    def d_ff(self, width: int, depth: int, target: float) -> float:
        """Return the d_ff of equal FLOPs, not rounded."""
        rest, layer, unit = self._line(width)
        return ((target - rest) / depth - layer) / unit


def _head_size(model: ModelConfig) -> int:
    """Return the width of a head at level 0."""
    size: int = model.by_level("d_model")[0] // model.by_level("heads")[0]
    return size


def _model_keys(
    model: ModelConfig, depth: int, width: int, heads: int, d_ff: int
) -> dict[str, Any]:
    """Return the keys of the section `model` that make it flat."""
    positions = model.by_level("positions")[0]
    keys = {
        "hierarchy": f"{depth}@1",
        "d_model": width,
        "heads": heads,
        "d_ff": d_ff,
        "window": model.by_level("window")[0],
        "positions": positions,
    }
    if model.shorten_factor_choices is not None:
        keys["shorten_factor_choices"] = None
    if model.shared_position_bias and positions != "relative":
        keys["shared_position_bias"] = False
    return keys


def _settings(config: Config, shape: _Shape) -> dict[str, Any]:
    """Return all settings of the control; lists by level get one value."""
    keys = _model_keys(config.model, shape.depth, shape.width, shape.heads, shape.d_ff)
    settings = {f"model.{key}": value for key, value in keys.items()}
    if isinstance(factors := config.optimizer.learning_rate_by_level, list):
        settings["optimizer.learning_rate_by_level"] = factors[0]
    if isinstance(recompute := config.training.activation_checkpointing, list):
        settings["training.activation_checkpointing"] = any(recompute)
    return settings
