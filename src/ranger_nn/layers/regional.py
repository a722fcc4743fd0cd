"""What a `RegionalAggregator` does, for any framework: cut, run the local network on batches of regions, join.

    x (batch, ...)  --cut-->  groups of regions of one shape, stacked: (regions, batch, ...)
                    --local-> (regions, batch, ...)
                    --join--> lift each group, merge the groups, finish

Regions of an uneven division have at most a few shapes; each shape is one group and one call of the local network,
so nothing is padded. The skins (`torch/layers/regional.py`, `keras/layers/regional.py`) hold the parameters and run
the local network; everything else is here. Enter at `Layout`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from ranger_nn.aggregate.monoid import Extremum, Moments, Sum
from ranger_nn.aggregate.pieces import Call, Concat, Stitch
from ranger_nn.aggregate.pooling import LogSumExp, Softmax, WeightedMean
from ranger_nn.core.region import AxisPartition, Region
from ranger_nn.errors import PartitionError
from ranger_nn.partition.grid import Grid

Reduction = Sum | Extremum | Moments | LogSumExp | WeightedMean | Softmax


@dataclass(frozen=True)
class Group:
    """Regions of one shape."""

    regions: tuple[Region, ...]

    @property
    def ids(self) -> list[int]:
        """Their indices."""
        return [r.index for r in self.regions]

    def parts(self, size: int) -> list[Group]:
        """The same in groups of at most `size` regions."""
        return [Group(self.regions[i : i + size]) for i in range(0, len(self.regions), size)]


@dataclass(frozen=True)
class Layout:
    """A partition applied to an array of a given shape.

    Attributes:
        axes: axes of the array that are cut, counted from the front.
        sizes: their sizes.
        regions: all regions, in row-major order.
        groups: those of one shape together, in the order in which shapes first appear.
        windows: weights of the partition's blend window along each axis, or None.
    """

    partition: AxisPartition
    axes: tuple[int, ...]
    sizes: tuple[int, ...]
    regions: tuple[Region, ...]
    groups: tuple[Group, ...]
    windows: tuple[list[list[float]] | None, ...]

    @staticmethod
    def of(partition: AxisPartition, shape: Sequence[int | None], spatial: Sequence[int]) -> Layout:
        """Apply `partition` to an array of `shape` (batch first); `spatial`: axes that a `Grid` cuts by default.

        Raises:
            PartitionError: too few axes, an axis without a static size, the batch axis, more regions than elements.
        """
        named = partition.axes if partition.axes is not None else tuple(spatial)
        if len(named) != partition.rank or any(not -len(shape) <= a < len(shape) for a in named):
            raise PartitionError(
                f"{partition} cuts {partition.rank} axes; an array of shape {tuple(shape)} has {len(named)} of them "
                f"{tuple(named)} to cut. Give axes=..., or another partition"
            )
        axes = tuple(a % len(shape) for a in named)
        if len(set(axes)) < len(axes):
            raise PartitionError(f"each axis is cut once; axes {named} of shape {tuple(shape)} name one of them twice")
        if 0 in axes:
            raise PartitionError(f"axis 0 of shape {tuple(shape)} is the batch and is not cut; got axes {axes}")
        sizes = [shape[a] for a in axes]
        if None in sizes:
            raise PartitionError(f"axes {axes} are cut and need static sizes; the shape is {tuple(shape)}")
        whole = tuple(int(s) for s in sizes if s is not None)
        regions = partition.regions(whole)
        return Layout(partition, axes, whole, regions, _grouped(regions), _windows(partition, whole))

    def index(self, region: Region, rank: int) -> tuple[slice, ...]:
        """What picks the region from an array of `rank` axes."""
        picks = [slice(None)] * rank
        for axis, (a, b) in zip(self.axes, region.read):
            picks[axis] = slice(a, b)
        return tuple(picks)

    def gather(self, xp: Any, x: Any, group: Group) -> Any:
        """The regions of a group, stacked: (regions, batch, ...)."""
        if self._divides(group) and all(isinstance(n, int) for n in x.shape[1:]):
            return self._fold(xp, x)
        return xp.stack([x[self.index(r, len(x.shape))] for r in group.regions], axis=0)

    def _divides(self, group: Group) -> bool:
        """Are all regions alike, none reading beyond its own: then stacking is a reshape."""
        return len(group.regions) == len(self.regions) and all(r.own == r.read for r in group.regions)

    def _fold(self, xp: Any, x: Any) -> Any:
        """(N, 6, 4) cut in (2, 2): (N, 2, 3, 2, 2) -> (2, 2, N, 3, 2) -> (4, N, 3, 2)."""
        lengths = dict(zip(self.axes, self.regions[0].shape))
        shape: list[int] = []
        counts: dict[int, int] = {}
        kept: list[int] = []
        for d, size in enumerate(x.shape):
            if d in lengths:
                counts[d] = len(shape)
                shape.append(size // lengths[d])
            kept.append(len(shape))
            shape.append(-1 if d == 0 else lengths.get(d, size))
        order = [counts[a] for a in self.axes] + kept
        split = xp.permute_dims(xp.reshape(x, shape), order)
        return xp.reshape(split, (len(self.regions), *[shape[d] for d in kept]))

    def shares(self) -> list[float]:
        """Each region's share of all elements."""
        owned = [prod([b - a for a, b in r.own]) for r in self.regions]
        return [n / sum(owned) for n in owned]

    def coordinates(self, group: Group) -> list[list[list[float]]]:
        """For each axis and each region of the group: positions from -1 to 1 (see `Grid.coordinates`).

        Raises:
            PartitionError: the partition is not a `Grid`.
        """
        if not isinstance(self.partition, Grid):
            raise PartitionError(f"coordinates=True needs a Grid; got {self.partition}")
        found = []
        for d, size in enumerate(self.sizes):
            cells = list(dict.fromkeys((r.own[d], r.read[d]) for r in self.regions))
            along = dict(zip(cells, self.partition.coordinates(size, d)))
            found.append([along[r.own[d], r.read[d]] for r in group.regions])
        return found


def _grouped(regions: Sequence[Region]) -> tuple[Group, ...]:
    found: dict[tuple[int, ...], list[Region]] = {}
    for region in regions:
        found.setdefault(region.shape, []).append(region)
    return tuple(Group(tuple(alike)) for alike in found.values())


def _windows(partition: AxisPartition, sizes: Sequence[int]) -> tuple[list[list[float]] | None, ...]:
    if not isinstance(partition, Grid):
        return (None,) * len(sizes)
    return tuple(partition.blend(size, d) for d, size in enumerate(sizes))


@dataclass(frozen=True)
class Result:
    """What the local network gave for some regions: `y` is (regions, batch, ...)."""

    ids: list[int]
    y: Any


def reduce(xp: Any, over: Reduction, results: Sequence[Result], weights: Sequence[Any] | None, present: Any) -> Any:
    """Join regions' results of one shape by a reduction.

    Args:
        xp: array namespace.
        over: the reduction.
        results: groups of regions.
        weights: for each group weights or scores, shape (regions, batch or 1); None: no weights.
        present: (batch, regions) bool, False for absent regions; None: all are there.

    Returns:
        (batch, ...); where no region is present, zero. Moments: mean and variance along the last axis.

    Raises:
        PartitionError: results of different shapes.
    """
    _check_alike(over, results)
    state: Any = None
    total: Any = 0
    for k, result in enumerate(results):
        where, n = _presence(xp, result, present)
        extra = {} if weights is None else {"weight": _spread(xp, weights[k], result.y)}
        lifted = over.lift(xp, result.y, (0,), where, **extra)
        state = lifted if state is None else over.merge(xp, state, lifted, total, n)
        total = total + n
    found = over.finish(xp, state, total)
    found = xp.concat(found, axis=-1) if isinstance(over, Moments) else found
    if present is not None:
        found = xp.where(total > 0, found, xp.zeros_like(found))
    return found[0]


def without_absent(xp: Any, results: Sequence[Result], present: Any) -> list[Result]:
    """Results with zeros in place of absent regions, whatever stands there: what scores are made from."""
    if present is None:
        return list(results)
    kept = []
    for result in results:
        where, _ = _presence(xp, result, present)
        kept.append(Result(result.ids, xp.where(where, result.y, xp.zeros_like(result.y))))
    return kept


def _presence(xp: Any, result: Result, present: Any) -> tuple[Any, Any]:
    """(mask like y, how many regions) of a group."""
    if present is None:
        return None, len(result.ids)
    every = list(result.ids) == list(range(present.shape[1]))
    picked = xp.permute_dims(present, (1, 0)) if every else xp.stack([present[:, i] for i in result.ids], axis=0)
    where = _spread(xp, picked, result.y)
    return where, xp.sum(xp.astype(where, result.y.dtype), axis=0, keepdims=True)


def _spread(xp: Any, w: Any, like: Any) -> Any:
    """(regions, batch or 1) -> (regions, batch or 1, 1, ...)."""
    return xp.reshape(w, (w.shape[0], -1, *[1] * (len(like.shape) - 2)))


def _check_alike(over: Reduction, results: Sequence[Result]) -> None:
    shapes = {tuple(r.y.shape[2:]): r.ids[0] for r in results}
    if len(shapes) > 1:
        (a, i), (b, j) = list(shapes.items())[:2]
        raise PartitionError(
            f"{type(over).__name__} joins results of one shape: the local network gives {a} for region {i} and {b} for "
            f"region {j}. End it with a global pooling or the last state, use stitch or concat, or a partition that "
            "divides evenly"
        )


def piecewise(
    xp: Any, over: Stitch | Concat | Call, results: Sequence[Result], layout: Layout | None, present: Any
) -> Any:
    """Join regions' results by putting them in place, one after the other, or into a callable.

    Absent regions count as zero.
    """
    state = over.empty()
    for result in results:
        for i, piece in zip(result.ids, xp.unstack(result.y, axis=0)):
            if present is not None:
                mask = xp.reshape(present[:, i], (-1, *[1] * (len(piece.shape) - 1)))
                piece = xp.where(mask, piece, xp.zeros_like(piece))
            state = over.merge(state, over.lift(i, piece))
    if not isinstance(over, Stitch):
        return over.finish(state) if isinstance(over, Call) else over.finish(xp, state)
    if layout is None:
        raise PartitionError("stitch needs a partition that knows places: Grid, TimeSlices, Blocks; use concat or sum")
    return over.finish(xp, state, layout.regions, layout.axes, layout.windows)
