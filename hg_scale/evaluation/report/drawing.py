"""Drawing of a model as an hourglass on its side: a bar per block, its sequence as the height."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from hg_scale.config.schema import ModelConfig
from hg_scale.formats import format_number
from hg_scale.model.layer_table import LayerRow, layer_table

# Sizes in units of the SVG's viewBox.
_HEIGHT = 130.0  # of a bar at full length
_MIN_HEIGHT = 5.0  # of a bar
_COLUMN = 46.0  # minimum width of a stack, so that its numbers fit
_GAP = 26.0  # between two stacks, for a resampling
_MAX_THICKNESS = 16.0  # of a bar
_MARGIN = 66.0  # left, for the row labels
_MAX_WIDTH = 420.0  # of the drawing, as far as the columns allow


@dataclass(frozen=True)
class Bar:
    """One block."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Stack:
    """The blocks of one level, with their numbers below `middle`."""

    level: int
    bars: list[Bar]
    middle: float
    right: float
    height: float
    positions: str
    width: str
    blocks: str
    share: str
    title: str


@dataclass(frozen=True)
class Funnel:
    """A shortening or upsampling between two stacks, as the corners of a polygon."""

    points: str
    middle: float
    label: str
    title: str


@dataclass(frozen=True)
class Skip:
    """A skip connection, from a level's input to its output, as a line at `y`."""

    x1: float
    x2: float
    y: float
    title: str


@dataclass(frozen=True)
class Drawing:
    """The drawing of a model, in viewBox units; `centre` is the vertical middle of the bars."""

    width: float
    centre: float
    bottom: float
    stacks: list[Stack]
    funnels: list[Funnel]
    skips: list[Skip]
    summary: str


def draw_hierarchy(model: ModelConfig) -> Drawing:
    """Draw the stacks of a model, from the input on the left to the output on the right."""
    rows = layer_table(model)
    inside = [row for row in rows if row.kind not in ("embedding", "head")]
    parts = [list(group) for _, group in groupby(inside, _resamples)]
    stacks_of = [part for part in parts if not _resamples(part[0])]
    thickness = _thickness(stacks_of)
    centre = _HEIGHT / 2 + 14
    full = stacks_of[0][0].positions

    def height(positions: int) -> float:
        return max(_MIN_HEIGHT, _HEIGHT * positions / full)

    x = _MARGIN
    stacks: list[Stack] = []
    between: list[LayerRow] = []
    for part in parts:
        if _resamples(part[0]):
            between.append(part[0])
            x += _GAP
            continue
        stack = _stack(part, x, centre, height(part[0].positions), thickness)
        stacks.append(stack)
        x = stack.right
    funnels = [
        _funnel(model, row, left, right, centre)
        for row, left, right in zip(between, stacks, stacks[1:], strict=False)
    ]
    return Drawing(
        width=max(x + 14, 200),
        centre=centre,
        bottom=centre + _HEIGHT / 2,
        stacks=stacks,
        funnels=funnels,
        skips=_skips(between, stacks, centre),
        summary="; ".join(stack.title for stack in stacks),
    )


def _resamples(row: LayerRow) -> bool:
    return row.kind in ("shorten", "upsample")


def _thickness(stacks: Sequence[Sequence[LayerRow]]) -> float:
    """Bar thickness per unit of model width: as large as fits, but at least a pixel per bar."""
    widest = max(part[0].width for part in stacks)
    available = _MAX_WIDTH - _MARGIN - _GAP * (len(stacks) - 1)
    bar = _MAX_THICKNESS
    while bar > 1 and sum(_space(part, bar / widest) for part in stacks) > available:
        bar *= 0.95
    return bar / widest


def _space(part: Sequence[LayerRow], thickness: float) -> float:
    """The width of a stack."""
    bar = part[0].width * thickness
    return max(_COLUMN, _blocks(part) * (bar + _between(bar)))


def _between(bar: float) -> float:
    return min(2.0, bar * 0.2)


def _blocks(part: Sequence[LayerRow]) -> int:
    return sum(row.layers for row in part if row.kind == "block")


def _stack(
    part: Sequence[LayerRow], x: float, centre: float, height: float, thickness: float
) -> Stack:
    blocks, row, bar = _blocks(part), part[0], part[0].width * thickness
    space = _between(bar)
    drawn = blocks * (bar + space) - (space if blocks else 0)
    width = _space(part, thickness)
    start = x + (width - drawn) / 2
    bars = [
        Bar(round(start + i * (bar + space), 2), round(centre - height / 2, 2), round(bar, 2),
            round(height, 2))
        for i in range(blocks)
    ]  # fmt: skip
    share, parameters = sum(r.share for r in part), sum(r.parameters for r in part)
    title = (
        f"{blocks} block{'s' if blocks != 1 else ''} on {row.positions:,} positions of width "
        f"{row.width:,}: {format_number(parameters)} parameters, {share:.0%} of the forward FLOPs"
    )
    return Stack(
        level=row.level,
        bars=bars,
        middle=round(x + width / 2, 2),
        right=round(x + width, 2),
        height=round(height, 2),
        positions=f"{row.positions:,}",
        width=f"{row.width:,}",
        blocks=str(blocks),
        share=f"{share:.0%}",
        title=title,
    )


def _ends(stack: Stack) -> tuple[float, float]:
    """Left and right edge of the bars of a stack."""
    if not stack.bars:
        return stack.middle, stack.middle
    return stack.bars[0].x, stack.bars[-1].x + stack.bars[-1].width


def _funnel(model: ModelConfig, row: LayerRow, left: Stack, right: Stack, centre: float) -> Funnel:
    (_, a), (b, _) = _ends(left), _ends(right)
    a, b = a + 3, b - 3
    corners = [
        (a, centre - left.height / 2), (b, centre - right.height / 2),
        (b, centre + right.height / 2), (a, centre + left.height / 2),
    ]  # fmt: skip
    down = row.kind == "shorten"
    k = model.parsed.factors[row.level]
    how = model.pooling if down else model.upsampling
    verb = "shortened" if down else "upsampled"
    return Funnel(
        points=" ".join(f"{x:.1f},{y:.1f}" for x, y in corners),
        middle=round((a + b) / 2, 2),
        label=f"{'÷' if down else '×'}{k}",
        title=f"{verb} by {k} ({how}): {format_number(row.parameters)} parameters, "
        f"{row.share:.0%} of the forward FLOPs",
    )


def _skips(between: Sequence[LayerRow], stacks: Sequence[Stack], centre: float) -> list[Skip]:
    skips: list[Skip] = []
    open_levels: list[Stack] = []
    for i, row in enumerate(between):
        if row.kind == "shorten":
            open_levels.append(stacks[i])
            continue
        start, end = open_levels.pop(), stacks[i + 1]
        skips.append(Skip(
            x1=_ends(start)[1] + 2,
            x2=_ends(end)[0] - 2,
            y=round(centre - start.height / 2 + min(5.0, start.height / 8), 2),
            title=f"skip: {start.positions} positions of width {start.width} is added",
        ))  # fmt: skip
    return skips
