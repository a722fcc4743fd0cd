"""Every picture of the documentation, made anew: `python docs/make_pictures.py [NAME ...]`.

Partitions are drawn by `ranger_nn.show`; aggregators are applied to the regions of a photograph of 24 coins, `Grid(4, 6)`, by
the layer itself. PNG with a palette, at the largest of a few resolutions at which the picture takes less than 60 kB.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch  # noqa: TID251
from matplotlib.figure import Figure
from PIL import Image
from scipy.spatial import Delaunay
from skimage import data
from sklearn.datasets import load_iris
from torch import Tensor, nn  # noqa: TID251

from ranger_nn import Blocks, GraphParts, Grid, KMeans, TimeSlices, show
from ranger_nn.aggregate import WeightedMean
from ranger_nn.partition import draw
from ranger_nn.torch import RegionalAggregator

FOLDER = Path(__file__).resolve().parent / "pictures"
COINS = Grid(4, 6)
LARGEST = 60_000


def coins() -> np.ndarray:
    """(284, 354), 0 to 1: four rows of six coins."""
    return np.asarray(data.coins()[12:296, 20:374] / 255)


def joined(aggregator: Any) -> np.ndarray:
    """What the layer makes of the regions themselves (no local network)."""
    x = torch.tensor(coins(), dtype=torch.float32)[None, None]
    with torch.no_grad():
        return np.asarray(RegionalAggregator(COINS, aggregator)(x)[0, 0])


def panels(titles: list[str], ratios: list[float], size: tuple[float, float]) -> tuple[Figure, Any]:
    """Panels side by side."""
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    axes = figure.subplots(1, len(titles), width_ratios=ratios)
    for ax, title in zip(axes, titles):
        ax.set_title(title, fontsize=9)
    return figure, axes


def cut(ax: Any) -> None:
    """The coins, and where they are cut."""
    draw.image(ax, coins())
    for region in COINS.regions(coins().shape):
        (a, b), (c, d) = region.own
        ax.plot((c, d, d, c, c), (a, a, b, b, a), color="white", linewidth=0.8)


def reduction(aggregator: Any, name: str) -> Figure:
    """The regions, and their join."""
    figure, (left, right) = panels(["24 regions of 71 x 59", name], [3, 1], (6, 3.1))
    cut(left)
    found = joined(aggregator)
    draw.image(right, (found - found.min()) / np.ptp(found))
    return figure


def moments() -> Figure:
    """Mean and standard deviation."""
    figure, (left, mean, deviation) = panels(["24 regions", "mean", "deviation"], [3, 1, 1], (7.4, 3.1))
    cut(left)
    x = torch.tensor(coins(), dtype=torch.float32)[None, None]
    found = np.asarray(RegionalAggregator(COINS, "moments")(x)[0, 0])
    draw.image(mean, found[:, :59])
    draw.image(deviation, np.sqrt(found[:, 59:]) * 3)
    return figure


def weighted(weights: np.ndarray, name: str) -> Figure:
    """Regions, their weights as numbers and as brightness, and the weighted mean."""
    figure, (left, right) = panels([f"weights {name}", "joined"], [3, 1], (6, 3.1))
    regions = COINS.regions(coins().shape)
    light = np.zeros(coins().shape)
    for region, w in zip(regions, weights):
        light[tuple(slice(a, b) for a, b in region.own)] = 0.35 + 0.65 * w / weights.max()
    draw.image(left, coins() * light)
    for region, w in zip(regions, weights):
        (_, b), (c, _) = region.own
        draw.number(left, region.index, c + 30, b - 9, f"{w:.2f}".removeprefix("0"), 7)
    draw.image(right, joined(WeightedMean(tuple(weights.tolist()))))
    return figure


def attention() -> np.ndarray:
    """Softmax over scores of the regions: how much they vary, times a query."""
    spread = np.array([coins()[tuple(slice(a, b) for a, b in r.own)].std() for r in COINS.regions(coins().shape)])
    scores = 40 * spread
    return np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()


def stretched(regions: Tensor) -> Tensor:
    """A local step that differs from region to region: contrast stretched to 0 ... 1."""
    low, high = regions.amin((2, 3), keepdim=True), regions.amax((2, 3), keepdim=True)
    return (regions - low) / (high - low)


def stitch() -> Figure:
    """One local step, cropped and blended."""
    grids = {"regions side by side": Grid(3, 3), "blended by a cosine window": Grid(3, 3, overlap=0.4, window="cosine")}
    figure, axes = panels(["input", *grids], [1, 1, 1], (7.4, 2.8))
    x = torch.tensor(data.camera()[::2, ::2] / 255, dtype=torch.float32)[None, None] * 0.6
    draw.image(axes[0], np.asarray(x[0, 0]))
    for ax, grid in zip(axes[1:], grids.values()):
        draw.image(ax, np.asarray(RegionalAggregator(grid, "stitch", local=stretched)(x)[0, 0]))
    return figure


def histogram(regions: Tensor) -> Tensor:
    """(n, 1, H, W) -> (n, 8): share of the pixels in each of eight grey levels."""
    return torch.stack([torch.histc(r, 8, 0, 1) / r.numel() for r in regions])


def concat() -> Figure:
    """Histograms of six regions, one after the other."""
    grid = Grid(2, 3)
    figure, (left, right) = panels(["six regions", "their histograms, one after the other"], [1.3, 2], (7.4, 2.6))
    draw.image(left, coins())
    draw.grid(left, grid.regions(coins().shape), 3)
    x = torch.tensor(coins(), dtype=torch.float32)[None, None]
    bars = np.asarray(RegionalAggregator(grid, "concat", local=histogram)(x)[0])
    tones = [draw.colour(i % 3 + 3 * (i // 3)) for i in range(6) for _ in range(8)]
    right.bar(np.arange(48), bars, color=tones, width=0.9)
    right.set(xlabel="feature of the result", yticks=[])
    right.spines[["top", "right", "left"]].set_visible(False)
    return figure


def median(parts: list[Tensor]) -> Tensor:
    """Of the regions, element by element."""
    return torch.stack(parts).median(0).values


def strips(x: Any) -> list[Any]:
    """Strips of an image: the middle, the left, the lower right. They overlap, and leave some out."""
    return [x[:, :, 130:330], x[:, :, :160], x[:, 250:, 300:]]


def mesh() -> tuple[np.ndarray, np.ndarray]:
    """(edges in both directions, positions) of a Delaunay triangulation of 220 points."""
    where = np.random.default_rng(1).uniform(0, 1, (220, 2))
    corners = Delaunay(where).simplices
    pairs = np.concatenate([corners[:, [0, 1]], corners[:, [1, 2]], corners[:, [2, 0]]])
    short = np.linalg.norm(where[pairs[:, 0]] - where[pairs[:, 1]], axis=1) < 0.2
    edges = np.unique(np.concatenate([pairs[short], pairs[short, ::-1]]), axis=0)
    return edges.T, where


def trained_matrix() -> np.ndarray:
    """Weights (20, 30) of a dense layer: the smooth part of a random matrix."""
    torch.manual_seed(0)
    return np.asarray(nn.AvgPool2d(3, 1, 1)(torch.randn(1, 20, 30))[0])


def graph() -> Figure:
    """A mesh in six parts."""
    edges, where = mesh()
    return show(GraphParts(6), edges, positions=where)


def petals() -> np.ndarray:
    """(150, 2): length and width of the petals of irises."""
    return np.asarray(load_iris().data[:, 2:])


PICTURES: dict[str, Callable[[], Figure]] = {
    "grid": lambda: show(Grid(3, 4, overlap=24), data.chelsea()),
    "grid_window": lambda: show(Grid(2, 3, overlap=0.25, window="cosine"), data.coffee()),
    "blocks": lambda: show(Blocks(2, 3), trained_matrix()),
    "time_slices": lambda: show(TimeSlices(6, overlap=12), coins()[45]),
    "time_window": lambda: show(Grid(5, overlap=0.3, window="cosine"), coins()[45]),
    "kmeans": lambda: show(KMeans(4), petals()),
    "kmeans_balanced": lambda: show(KMeans(4, balanced=True), petals()),
    "graph_parts": graph,
    "callable": lambda: show(strips, data.astronaut()[None]),
    "sum": lambda: reduction("sum", "sum (scaled to be seen)"),
    "mean": lambda: reduction("mean", "mean"),
    "max": lambda: reduction("max", "max"),
    "min": lambda: reduction("min", "min"),
    "logsumexp": lambda: reduction("logsumexp", "logsumexp (scaled)"),
    "moments": moments,
    "weighted_mean": lambda: weighted(np.repeat([0.1, 0.3, 0.6, 1.0], 6), "given"),
    "softmax": lambda: weighted(attention(), "from a query"),
    "stitch": stitch,
    "concat": concat,
    "median": lambda: reduction(median, "median, a callable"),
}


def write(name: str) -> int:
    """Bytes of the picture written."""
    path = FOLDER / f"{name}.png"
    for dots in (110, 95, 85, 75, 65):
        made = io.BytesIO()
        PICTURES[name]().savefig(made, format="png", dpi=dots)
        small = Image.open(made).convert("RGB").quantize(80, dither=Image.Dither.NONE)
        small.save(path, optimize=True)
        if path.stat().st_size < LARGEST:
            break
    return path.stat().st_size


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name in sys.argv[1:] or PICTURES:
        print(f"{name}.png {write(name) / 1e3:.0f} kB")
