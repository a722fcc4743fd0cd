"""`show`: a picture of the regions of a partition on a real input, so that one sees what a layer will get.

    Grid        image (H, W), (H, W, C) or (C, H, W): own regions tinted, overlaps hatched, blend weights at the edges
    TimeSlices  sequence (T,) or (T, F); so does a Grid of one axis
    Blocks      weight matrix (inputs, outputs)
    KMeans      points (n, features)
    GraphParts  edges (2, E), or a GraphSplit's
    callable    an array with its batch: which elements each part takes

What is drawn is in `draw.py` and `draw_points.py`; here each input is checked and brought into their form.
"""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np

from ranger_nn.errors import InputError, MissingExtraError, PartitionError
from ranger_nn.partition import draw, draw_points
from ranger_nn.partition.blocks import Blocks
from ranger_nn.partition.graph import GraphParts, GraphSplit, as_split
from ranger_nn.partition.grid import Grid
from ranger_nn.partition.kmeans import KMeans
from ranger_nn.partition.time import TimeSlices

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NODES = 1500
"""Graphs of more nodes are not laid out: all pairs of nodes push each other."""


def show(
    partition: Any,
    x: Any,
    path: str | PathLike[str] | None = None,
    *,
    centres: Any = None,
    positions: Any = None,
    title: str | None = None,
) -> Figure:
    """Draw the regions of `partition` on `x`.

    Args:
        partition: `Grid` of one or two axes, `TimeSlices`, `Blocks`, `KMeans`, `GraphParts`, a `GraphSplit`, or a
            callable that gives parts. Its `axes` are those of a batch and do not count here.
        x: one sample, without its batch axis (a callable gets what you give, so give it the batch): NumPy, or a tensor.
            Grid: an image (H, W), (H, W, C) or (C, H, W) with C of 1, 3 or 4; of one axis: as TimeSlices.
            TimeSlices: (T,) or (T, features).
            Blocks: a weight matrix (inputs, outputs); that of `torch.nn.Linear` transposed.
            KMeans: (n, features); of more than two features the first two principal components are drawn.
            GraphParts, GraphSplit: edges (2, E), integers.
        path: where to save the picture (PNG, SVG, PDF by its ending); None: nowhere.
        centres: (clusters, features) of a KMeans, such as a layer's; None: `partition.fit(x)`.
        positions: (nodes, 2) of a graph; None: a spring layout, for at most 1500 nodes.
        title: above the picture; None: the partition and the number of its regions.

    Returns:
        The matplotlib Figure. Numbers of more than 100 regions are left out.

    Raises:
        InputError: an array of another rank or type than the partition needs, values that are not finite where they count.
        PartitionError: what is no partition; more regions than elements.
        MissingExtraError: matplotlib is not installed, or what the partition itself needs.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError('drawing regions needs matplotlib: pip install "ranger-nn[plot]"') from error
    figure = Figure(figsize=(5.2, 4.4), dpi=120, layout="constrained")
    count = _drawer(partition)(figure, partition, x, centres, positions)
    figure.suptitle(_title(partition, count) if title is None else title, fontsize=10)
    if path is not None:
        figure.savefig(path)
    return figure


def _drawer(partition: Any) -> Callable[..., int]:
    """What draws this kind of partition and gives the number of regions."""
    if isinstance(partition, Grid):
        if partition.rank > 2:
            raise PartitionError(
                f"a picture has two axes, and {partition} cuts {partition.rank}; show one plane of the array with a Grid "
                f"of its two axes, such as Grid{(partition.counts or partition.size or ())[1:]}"
            )
        return _grid if partition.rank == 2 else _slices
    kinds: dict[type, Callable[..., int]] = {
        TimeSlices: _slices,
        Blocks: _blocks,
        KMeans: _kmeans,
        GraphParts: _graph,
        GraphSplit: _graph,
    }
    found = kinds.get(type(partition)) or (_parts if callable(partition) else None)
    if found is None or isinstance(partition, type):
        raise PartitionError(
            f"show draws a Grid, TimeSlices, Blocks, KMeans, GraphParts, a GraphSplit or a callable; got {partition!r}"
        )
    return found


def _title(partition: Any, count: int) -> str:
    if isinstance(partition, GraphSplit):
        return f"GraphSplit: {count} parts"
    if not isinstance(partition, Grid | TimeSlices | Blocks | KMeans | GraphParts):
        name = getattr(partition, "__name__", type(partition).__name__)
        return f"{'a callable' if name == '<lambda>' else name}: {count} parts"
    given = [f"{k}={v!r}" for k, v in vars(partition).items() if v != getattr(type(partition), k, None)]
    return f"{type(partition).__name__}({', '.join(given)}): {count} regions"


def _array(x: Any) -> np.ndarray:
    """NumPy array of an array, or of a tensor of any framework."""
    if hasattr(x, "detach"):
        x = x.detach().cpu()
    try:
        found = np.asarray(x)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"show takes what numpy.asarray takes; {type(x).__name__} is refused: {error}") from error
    if found.dtype.kind not in "biuf" or not found.size:
        raise InputError(f"show takes an array of real numbers with at least one element; got {_told(found)}")
    return found


def _told(x: np.ndarray) -> str:
    return f"shape {x.shape}, {x.dtype}"


# ---------------------------------------------------------------------------------------- arrays


def _grid(figure: Any, partition: Grid, x: Any, centres: Any, positions: Any) -> int:
    pixels = _pixels(_array(x))
    height, width = pixels.shape[:2]
    figure.set_size_inches(5.2, float(np.clip(5.2 * height / width, 2, 8)) + 0.5)
    regions = partition.regions((height, width))
    ax = figure.add_subplot()
    draw.image(ax, pixels)
    columns = len(partition.intervals(width, 1))
    draw.legend(figure, draw.grid(ax, regions, columns))
    below, beside = partition.blend(width, 1), partition.blend(height, 0)
    if below and beside:
        draw.weights(ax.inset_axes((0, -0.2, 1, 0.16), sharex=ax), 1, regions[:columns], below, False)
        draw.weights(ax.inset_axes((1.03, 0, 0.16, 1), sharey=ax), 0, regions[::columns], beside, True)
    return len(regions)


def _pixels(x: np.ndarray) -> np.ndarray:
    """(H, W) or (H, W, 3 or 4), from 0 to 1."""
    if x.ndim == 3 and x.shape[-1] not in (1, 3, 4) and x.shape[0] in (1, 3, 4):
        x = np.moveaxis(x, 0, -1)
    if x.ndim not in (2, 3) or (x.ndim == 3 and x.shape[-1] not in (1, 3, 4)):
        raise InputError(
            f"a Grid of two axes is shown on one image (H, W), (H, W, C) or (C, H, W) with C of 1, 3 or 4; got "
            f"{_told(x)}. Of a batch give one image, x[0]; of many channels one or three"
        )
    x = x[..., 0] if x.ndim == 3 and x.shape[-1] == 1 else x
    if x.dtype == np.uint8:
        return np.asarray(x / 255)
    x = x.astype(np.float64)
    if not np.isfinite(x).all():
        raise InputError(f"an image has finite pixels; {int((~np.isfinite(x)).sum())} of {x.size} are NaN or infinite")
    low, high = float(x.min()), float(x.max())
    return x if low >= 0 and high <= 1 else (x - low) / max(high - low, 1e-300)


def _slices(figure: Any, partition: TimeSlices | Grid, x: Any, centres: Any, positions: Any) -> int:
    values = _array(x)
    if values.ndim not in (1, 2):
        raise InputError(
            f"{type(partition).__name__} of one axis is shown on one sequence (T,) or (T, features); got "
            f"{_told(values)}. Of a batch give one sequence, x[0]"
        )
    steps = len(values)
    regions = partition.regions((steps,))
    blend = partition.blend(steps, 0) if isinstance(partition, Grid) else None
    figure.set_size_inches(7, 4 if blend else 3.2)
    ax, *lower = figure.subplots(
        2 if blend else 1, 1, sharex=True, squeeze=False, height_ratios=(3, 1)[: 1 + bool(blend)]
    )[:, 0]
    draw.sequence(ax, values.reshape(steps, -1))
    draw.legend(figure, draw.slices(ax, regions))
    if blend:
        draw.weights(lower[0], 0, regions, blend, False)
        ax.set_xlabel(None)
        lower[0].set(xlabel="step", ylabel="weight")
    return len(regions)


def _blocks(figure: Any, partition: Blocks, x: Any, centres: Any, positions: Any) -> int:
    values = _array(x)
    if values.ndim != 2:
        raise InputError(f"Blocks are shown on a weight matrix (inputs, outputs); got {_told(values)}")
    rows, columns = partition.matrix(*values.shape)
    ax = figure.add_subplot()
    shown = draw.matrix(ax, values.astype(np.float64), rows, columns)
    bar = figure.colorbar(shown, ax=ax, shrink=0.6, label="weight")
    bar.ax.tick_params(labelsize=7)
    return len(rows) * len(columns)


def _parts(figure: Any, partition: Callable[[Any], Any], x: Any, centres: Any, positions: Any) -> int:
    values = _array(x)
    if not 2 <= values.ndim <= 4:
        raise InputError(
            f"a callable is shown on an array with its batch: (batch, features), (1, T, F), (1, H, W, C) or (1, C, H, W); "
            f"got {_told(values)}"
        )
    numbers = np.arange(values.size).reshape(values.shape)
    try:
        parts = [np.asarray(part) for part in partition(numbers)]
        given = [np.asarray(part) for part in partition(values)]
    except Exception as error:
        raise InputError(
            f"{partition} is called with a NumPy array to see what its parts take; it failed: {error}"
        ) from error
    if not parts:
        raise PartitionError(f"the partition {partition} gave no parts for an array of {_told(values)}")
    for i, (part, found) in enumerate(zip(parts, given)):
        inside = part.dtype.kind in "iu" and part.size and part.min() >= 0 and part.max() < values.size
        if not inside or not np.array_equal(values.ravel()[part], found, equal_nan=values.dtype.kind == "f"):
            raise InputError(
                f"show draws parts that take elements of x; part {i} computes something else. Show what it computes from"
            )
    taken = np.stack([np.bincount(np.unique(part), minlength=values.size) for part in parts])
    _draw_parts(figure.add_subplot(), values, taken.astype(bool).reshape(len(parts), *values.shape))
    return len(parts)


def _draw_parts(ax: Any, values: np.ndarray, taken: np.ndarray) -> None:
    """`taken` (parts, *shape): does a part take the element."""
    if values.ndim > 2:
        values, taken = values[0], taken[:, 0]
    if values.ndim == 3:
        channels = 0 if values.shape[-1] not in (1, 3, 4) and values.shape[0] in (1, 3, 4) else 2
        values, taken = _pixels(values), np.any(taken, axis=channels + 1)
    times = taken.sum(0)
    owner = np.where(times > 1, -2, np.where(times == 1, taken.argmax(0), -1))
    draw.image(ax, values)
    ax.set_aspect("equal" if 0.2 < values.shape[0] / values.shape[1] < 5 else "auto")
    places = np.array([np.argwhere(mine).mean(0) + 0.5 for mine in taken])
    draw.parts(ax, owner, places)


# ------------------------------------------------------------------------------- points and graphs


def _kmeans(figure: Any, partition: KMeans, x: Any, centres: Any, positions: Any) -> int:
    data = _array(x).astype(np.float64)
    if data.ndim != 2 or data.shape[1] < 2:
        raise InputError(f"KMeans is shown on points (n, features) of at least two features; got {_told(data)}")
    at = partition.fit(data) if centres is None else _array(centres).astype(np.float64)
    if at.shape != (partition.clusters, data.shape[1]):
        raise InputError(
            f"centres are (clusters, features) = {(partition.clusters, data.shape[1])} for {partition}; got {at.shape}"
        )
    if not (np.isfinite(data).all() and np.isfinite(at).all()):
        raise InputError("points and centres are finite; some are NaN or infinite. Leave those samples out")
    capacity = partition.capacity or -(-len(data) // partition.clusters)
    if partition.balanced and capacity * partition.clusters < len(data):
        raise PartitionError(
            f"the clusters must hold all samples: {partition.clusters} clusters of capacity {capacity} hold "
            f"{capacity * partition.clusters}, there are {len(data)}; give a capacity of at least "
            f"{-(-len(data) // partition.clusters)}"
        )
    owner = draw_points.balanced(data, at, capacity) if partition.balanced else draw_points.nearest(data, at)
    flat = data.shape[1] == 2
    if not flat:
        mean, directions = draw_points.principal(data)
        data, at = (data - mean) @ directions, (at - mean) @ directions
    ax = figure.add_subplot()
    draw_points.points(ax, data, owner, at, flat and not partition.balanced)
    names = ("feature 0", "feature 1") if flat else ("first principal component", "second principal component")
    ax.set(xlabel=names[0], ylabel=names[1])
    return partition.clusters


def _graph(figure: Any, partition: GraphParts | GraphSplit, x: Any, centres: Any, positions: Any) -> int:
    edges = _array(x)
    where = None if positions is None else _array(positions).astype(np.float64)
    if where is not None and (where.ndim != 2 or where.shape[1] != 2 or not np.isfinite(where).all()):
        raise InputError(f"positions of a graph are finite numbers (nodes, 2); got {_told(where)}")
    nodes = len(where) if where is not None else _nodes(partition, edges)
    split = as_split(partition, edges, nodes)
    if where is None and nodes > NODES:
        raise InputError(
            f"graphs of at most {NODES} nodes are laid out; this one has {nodes}. Give positions=, an array (nodes, 2)"
        )
    where = draw_points.spring(edges.astype(np.int64), nodes) if where is None else where
    figure.set_size_inches(5.2, 4.8)
    draw.legend(figure, draw_points.graph(figure.add_subplot(), split, where))
    return split.parts


def _nodes(partition: GraphParts | GraphSplit, edges: np.ndarray) -> int:
    return partition.nodes if isinstance(partition, GraphSplit) else int(edges.max()) + 1
