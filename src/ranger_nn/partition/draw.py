"""How `show` draws regions of arrays: tinted patches over an image, a sequence or a matrix. Points: `draw_points.py`.

Colours are those of Okabe & Ito 2008 (Color universal design), which people with any colour vision can tell apart; black
is kept for text. Every artist has a gid that says what it is ("own 3", "number 3", "shared", "read 3", "weight 0 3",
"centre 3"), in SVG files too. matplotlib comes in as the axes that each function is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ranger_nn.core.reach import Interval
from ranger_nn.core.region import Region

COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#F0E442", "#0072B2", "#D55E00")
TINT = 0.3
MANY = 100
"""Beyond so many regions their numbers cannot be read and are left out."""
HEAT_MAP = 8
"""A sequence of more features is drawn as a heat map."""
_HATCH: dict[str, Any] = {"facecolor": "none", "edgecolor": "black", "alpha": 0.45, "hatch": "////", "linewidth": 0}


def colour(region: int) -> str:
    """Colour of a region; they come round again after seven."""
    return COLOURS[region % len(COLOURS)]


def rgb(tone: str) -> tuple[float, float, float]:
    """Red, green and blue, 0 to 1, of "#rrggbb"."""
    return int(tone[1:3], 16) / 255, int(tone[3:5], 16) / 255, int(tone[5:7], 16) / 255


def number(ax: Any, region: int, x: float, y: float, text: str | None = None, size: float = 9, **options: Any) -> None:
    """The number of a region in a white box."""
    box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
    given = {"ha": "center", "va": "center", "color": "black", "bbox": box, "zorder": 6} | options
    ax.text(x, y, str(region) if text is None else text, fontsize=size, gid=f"number {region}", **given)


def legend(figure: Any, handles: Sequence[Any]) -> None:
    """Below everything, in one line."""
    if handles:
        figure.legend(handles=list(handles), loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8)


def plain(ax: Any) -> None:
    """No ticks, no frame."""
    ax.set(xticks=[], yticks=[])
    for side in ax.spines.values():
        side.set_visible(False)


# --------------------------------------------------------------------------------------------- images


def image(ax: Any, pixels: np.ndarray) -> None:
    """(H, W) in grey levels or (H, W, 3 or 4), element (i, j) on [j, j + 1) x [i, i + 1)."""
    height, width = pixels.shape[:2]
    ax.imshow(pixels, cmap="gray", extent=(0, width, height, 0), interpolation="nearest", gid="image")
    ax.set(xlim=(0, width), ylim=(height, 0))
    plain(ax)


def grid(ax: Any, regions: Sequence[Region], columns: int) -> list[Any]:
    """What regions own, tinted; where more than one reads, hatched; what the middle one reads, dashed.

    Returns the handles of a legend.
    """
    from matplotlib.patches import Rectangle

    for region in regions:
        (a, b), (c, d) = region.own
        tone = colour(region.index % columns + 3 * (region.index // columns))
        box = Rectangle((c, a), d - c, b - a, facecolor=(*rgb(tone), TINT), edgecolor="white", linewidth=1.2)
        box.set_gid(f"own {region.index}")
        ax.add_patch(box)
        if len(regions) <= MANY:
            number(ax, region.index, (c + d) / 2, (a + b) / 2)
    if all(r.own == r.read for r in regions):
        return []
    middle = regions[(len(regions) // columns // 2) * columns + (columns - 1) // 2]
    (a, b), (c, d) = middle.read
    for colours, style in (("white", "solid"), ("black", (0, (4, 3)))):
        outline = Rectangle((c, a), d - c, b - a, fill=False, edgecolor=colours, linewidth=1.8, linestyle=style)
        outline.set(zorder=5, gid=f"read {middle.index}", label=f"what region {middle.index} reads", clip_on=False)
        ax.add_patch(outline)
    bands = [ax.axhspan(*span, **_HATCH) for span in shared([r.read[0] for r in regions])]
    bands += [ax.axvspan(*span, **_HATCH) for span in shared([r.read[1] for r in regions])]
    return [outline, *_named(bands)]


def shared(reads: Sequence[Interval]) -> list[Interval]:
    """Where intervals of more than one kind overlap, as disjoint intervals."""
    distinct = sorted(set(reads))
    times = np.zeros(max(b for _, b in distinct) + 1, int)
    for a, b in distinct:
        times[a:b] += 1
    edges = np.flatnonzero(np.diff(np.r_[0, times > 1, 0]))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


def weights(ax: Any, axis: int, cells: Sequence[Region], blend: Sequence[Sequence[float]], upright: bool) -> None:
    """Blend weights of regions along one axis, and their sum; `upright`: the axis runs downwards."""
    total = np.zeros(max(r.read[axis][1] for r in cells))
    for k, (region, values) in enumerate(zip(cells, blend)):
        places = np.arange(*region.read[axis])
        total[places] += values
        _line(ax, places + 0.5, values, upright, color=colour(k if not upright else 3 * k), gid=f"weight {axis} {k}")
    _line(ax, np.arange(len(total)) + 0.5, total, upright, color="black", linestyle=":", linewidth=1, gid=f"sum {axis}")
    if upright:
        ax.set(xlim=(0, 1.1), xticks=[0, 1])
    else:
        ax.set(ylim=(0, 1.1), yticks=[0, 1])
    ax.tick_params(labelsize=7, length=2)
    ax.spines[["top", "right"]].set_visible(False)


def _line(ax: Any, places: Any, values: Any, upright: bool, **options: Any) -> None:
    ax.plot(*((values, places) if upright else (places, values)), **options)


def parts(ax: Any, owner: np.ndarray, places: np.ndarray) -> None:
    """Parts of a callable as a tint of their elements (`owner` (H, W): a part, -1 for none, -2 for several)."""
    for i in sorted(set(owner[owner >= 0].tolist())):
        where = owner == i
        tint = np.zeros((*owner.shape, 4))
        tint[where] = (*rgb(colour(i)), TINT)
        ax.imshow(tint, extent=(0, owner.shape[1], owner.shape[0], 0), interpolation="nearest", gid=f"own {i}")
    several = np.zeros((*owner.shape, 4))
    several[owner == -2] = (0, 0, 0, 0.4)
    ax.imshow(several, extent=(0, owner.shape[1], owner.shape[0], 0), interpolation="nearest", gid="shared")
    for i, (row, column) in enumerate(places[:MANY]):
        number(ax, i, column, row)


# ------------------------------------------------------------------------------------------ sequences


def sequence(ax: Any, values: np.ndarray) -> None:
    """(T, F) as lines, or as a heat map of many features."""
    steps, features = values.shape
    if features > HEAT_MAP:
        shown = ax.imshow(values.T, aspect="auto", cmap="gray", extent=(0, steps, features, 0), interpolation="nearest")
        shown.set_gid("sequence")
        ax.set_ylabel("feature")
    else:
        for k in range(features):
            dark = 0.55 * k / max(features - 1, 1)
            ax.plot(np.arange(steps) + 0.5, values[:, k], color=str(dark), linewidth=0.9, gid=f"feature {k}")
    ax.set(xlim=(0, steps), xlabel="step")
    ax.spines[["top", "right"]].set_visible(False)


def slices(ax: Any, regions: Sequence[Region]) -> list[Any]:
    """Spans of the slices, their numbers above, overlaps hatched. Returns the handles of a legend."""
    for region in regions:
        a, b = region.own[0]
        span = ax.axvspan(a, b, facecolor=(*rgb(colour(region.index)), TINT), edgecolor="white", linewidth=1.2)
        span.set(gid=f"own {region.index}", zorder=0.5)
        if len(regions) <= MANY:
            number(ax, region.index, (a + b) / 2, 1.05, transform=ax.get_xaxis_transform(), size=8)
    return _named([ax.axvspan(*span, **_HATCH) for span in shared([r.read[0] for r in regions])])


def _named(bands: Sequence[Any]) -> list[Any]:
    """Bands of what is shared: the first one stands in the legend."""
    for band in bands:
        band.set(gid="shared", label="read by more than one region", zorder=3)
    return list(bands[:1])


# ------------------------------------------------------------------------------------- weight matrices


def matrix(ax: Any, values: np.ndarray, rows: Sequence[Interval], columns: Sequence[Interval]) -> Any:
    """A weight matrix, inputs downwards and outputs to the right, in its blocks. Returns the image (for a colour bar)."""
    from matplotlib.patches import Rectangle

    inputs, outputs = values.shape
    top = float(np.nanmax(np.abs(values))) or 1.0
    shown = ax.imshow(values, cmap="PuOr", vmin=-top, vmax=top, extent=(0, outputs, inputs, 0), interpolation="nearest")
    shown.set_gid("matrix")
    for i, (a, b) in enumerate(rows):
        for j, (c, d) in enumerate(columns):
            block = i * len(columns) + j
            box = Rectangle((c, a), d - c, b - a, fill=False, edgecolor="black", linewidth=1.6, clip_on=False)
            box.set_gid(f"own {block}")
            ax.add_patch(box)
            if len(rows) * len(columns) <= MANY:
                number(ax, block, (c + d) / 2, (a + b) / 2, f"$W_{{{i},{j}}}$")
    _group_ticks(ax.yaxis, rows, "x")
    _group_ticks(ax.xaxis, columns, "y")
    ax.xaxis.tick_top()
    ax.xaxis.set_label_position("top")
    ax.set(xlabel="outputs: stitched", ylabel="inputs: summed")
    ax.tick_params(length=0, labelsize=9)
    return shown


def _group_ticks(axis: Any, groups: Sequence[Interval], name: str) -> None:
    if len(groups) <= 20:
        axis.set_ticks([(a + b) / 2 for a, b in groups], [f"${name}_{{{i}}}$" for i in range(len(groups))])
    else:
        axis.set_ticks([])
