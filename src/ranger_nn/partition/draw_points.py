"""How `show` draws points and graphs: dots in the colours of their regions. Regions of arrays are in `draw.py`."""

from __future__ import annotations

from typing import Any

import numpy as np

from ranger_nn.partition.draw import MANY, TINT, colour, rgb
from ranger_nn.partition.graph import GraphSplit

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
Extent = tuple[float, float, float, float]


def marker(region: int) -> str:
    """Marker of a region's points: another one each time that the seven colours come round."""
    return MARKERS[region // 7 % len(MARKERS)]


def points(ax: Any, where: np.ndarray, owner: np.ndarray, centres: np.ndarray, cells: bool) -> None:
    """Points (n, 2) in the colours of their regions, and centres; `cells`: the plane by its nearest centre behind."""
    both = np.concatenate([where, centres])
    margin = 0.05 * np.maximum(np.ptp(both, axis=0), 1e-9)
    (x0, y0), (x1, y1) = both.min(0) - margin, both.max(0) + margin
    if cells:
        _cells(ax, centres, (x0, x1, y0, y1))
    for i, centre in enumerate(centres):
        _dots(ax, where[owner == i], i, float(np.clip(4000 / len(where), 3, 28)))
        ax.scatter(*centre, s=90, c="black", marker="+", linewidths=2, zorder=5).set_gid(f"centre {i}")
        if len(centres) <= MANY:
            _beside(ax, i, centre)
    ax.set(xlim=(x0, x1), ylim=(y0, y1))
    ax.spines[["top", "right"]].set_visible(False)


def graph(ax: Any, split: GraphSplit, where: np.ndarray) -> list[Any]:
    """Nodes (n, 2) in the colours of their parts, edges, those between parts in black; the halo of part 0 in rings.

    Returns the handles of a legend.
    """
    from matplotlib.collections import LineCollection

    target = np.repeat(np.arange(split.nodes), np.diff(split.offsets))
    across = split.part_of[split.sources] != split.part_of[target]
    lines = where[np.stack([split.sources, target], 1)]
    for name, pick, tone, width in (("inside", ~across, "0.75", 0.6), ("cut", across, "black", 0.9)):
        ax.add_collection(LineCollection(lines[pick], colors=tone, linewidths=width, gid=f"edges {name}", zorder=1))
    size = float(np.clip(8000 / split.nodes, 4, 60))
    for i in range(split.parts):
        _dots(ax, where[split.own(i)], i, size)
        if split.parts <= MANY:
            _beside(ax, i, np.median(where[split.own(i)], axis=0))
    halo = split.halo_of(0)
    rings = ax.scatter(*where[halo].T, s=3.5 * size, facecolors="none", edgecolors="black", linewidths=1.3, zorder=4)
    rings.set(gid="halo 0", label=f"halo of part 0: {len(halo)} nodes")
    ax.autoscale_view()
    ax.set_axis_off()
    ax.set_aspect("equal", "datalim")
    cut = LineCollection([], colors="black", linewidths=0.9, label=f"edges between parts: {split.cut} of {len(target)}")
    return [cut, rings] if len(halo) else [cut]


def _dots(ax: Any, where: np.ndarray, region: int, size: float) -> None:
    options = {"c": colour(region), "marker": marker(region), "linewidths": 0.4, "edgecolors": "black", "zorder": 3}
    ax.scatter(where[:, 0], where[:, 1], s=size, **options).set_gid(f"own {region}")


def _beside(ax: Any, region: int, at: np.ndarray) -> None:
    box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
    options = {"textcoords": "offset points", "fontsize": 8, "bbox": box, "zorder": 6}
    ax.annotate(str(region), at, (7, 7), gid=f"number {region}", **options)


def _cells(ax: Any, centres: np.ndarray, extent: Extent, fine: int = 400) -> None:
    """Which centre is nearest, as a tint of 400 x 400 places of the plane."""
    x0, x1, y0, y1 = extent
    across, up = (a + (np.arange(fine) + 0.5) / fine * (b - a) for a, b in ((x0, x1), (y0, y1)))
    places = np.stack(np.meshgrid(across, up), -1).reshape(-1, 2)
    tones = np.array([(*rgb(colour(i)), TINT) for i in range(len(centres))])
    owner = nearest(places, centres).reshape(fine, fine)
    options = {"extent": extent, "origin": "lower", "aspect": "auto", "interpolation": "nearest"}
    ax.imshow(tones[owner], **options).set_gid("cells")


def nearest(where: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Index of the nearest centre of each point."""
    return np.asarray((np.square(centres).sum(1) - 2 * where @ centres.T).argmin(1))


def balanced(where: np.ndarray, centres: np.ndarray, capacity: int) -> np.ndarray:
    """Index of a centre for each point, at most `capacity` points each: nearest pairs first."""
    apart = np.square(centres).sum(1) - 2 * where @ centres.T + np.square(where).sum(1)[:, None]
    owner, left = np.full(len(where), -1), np.full(len(centres), capacity)
    for pair in np.argsort(apart, axis=None, kind="stable").tolist():
        point, centre = divmod(pair, len(centres))
        if owner[point] < 0 and left[centre]:
            owner[point] = centre
            left[centre] -= 1
    return owner


def principal(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mean, the first two principal directions (features, 2)) of data (n, features)."""
    mean = data.mean(0)
    return mean, np.linalg.svd(data - mean, full_matrices=False)[2][:2].T


def spring(edges: np.ndarray, nodes: int, steps: int = 120) -> np.ndarray:
    """Positions (nodes, 2): edges pull, all nodes push (Fruchterman & Reingold 1991), from a fixed random start."""
    where = np.random.default_rng(0).uniform(-1, 1, (nodes, 2))
    pulls = np.zeros((nodes, nodes))
    pulls[edges[0], edges[1]] = pulls[edges[1], edges[0]] = 1
    length = 2 / np.sqrt(nodes)
    for k in range(steps):
        apart = where[:, None] - where[None]
        distance = np.maximum(np.linalg.norm(apart, axis=-1), 1e-3 * length)
        force = length**2 / distance**2 - pulls * distance / length - 0.02 * distance
        move = (apart * force[..., None]).sum(1)
        reach = np.linalg.norm(move, axis=1, keepdims=True)
        where += move / np.maximum(reach, 1e-12) * np.minimum(reach, 0.2 * (1 - k / steps))
    return where
