"""Aggregators that keep the regions' results apart: stitch, concat, a callable.

Their state is a tuple of (index of the region, result), so that merging is joining: in any order for `Stitch` and
`Call`, which put the pieces in the order of their regions when they finish, and for `Concat` as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ranger_nn.core.reach import Interval
from ranger_nn.core.region import Region
from ranger_nn.errors import PartitionError

Pieces = tuple[tuple[int, Any], ...]


class _Pieces:
    """The free monoid of pieces."""

    def empty(self) -> Pieces:
        """No piece."""
        return ()

    def lift(self, index: int, result: Any) -> Pieces:
        """One piece."""
        return ((index, result),)

    def merge(self, a: Pieces, b: Pieces) -> Pieces:
        """Both."""
        return a + b

    @staticmethod
    def ordered(state: Pieces) -> list[Any]:
        """Results in the order of their regions."""
        return [result for _, result in sorted(state, key=lambda piece: piece[0])]


@dataclass(frozen=True)
class Stitch(_Pieces):
    """Every region's result back in its place; overlaps are cropped, or blended by the partition's window."""

    def finish(
        self,
        xp: Any,
        state: Pieces,
        regions: Sequence[Region],
        axes: Sequence[int],
        blend: Sequence[list[list[float]] | None],
    ) -> Any:
        """The array that the regions cover.

        Args:
            state: all pieces; each has its region's extent along `axes`.
            regions: in row-major order.
            axes: axes of the pieces that were cut.
            blend: for each of `axes` the weights of `Grid.blend`, or None to crop.

        Raises:
            PartitionError: a piece whose extent is not its region's.
        """
        pieces = self.ordered(state)
        for region, piece in zip(regions, pieces):
            _check_extent(region, piece, axes)
        for d in reversed(range(len(axes))):
            cells = list(dict.fromkeys((r.own[d], r.read[d]) for r in regions))
            pieces = [
                _join(xp, pieces[i : i + len(cells)], cells, blend[d], axes[d])
                for i in range(0, len(pieces), len(cells))
            ]
        return pieces[0]


@dataclass(frozen=True)
class Concat(_Pieces):
    """The regions' results one after the other along `axis` (that of the features, -1)."""

    axis: int = -1

    def __post_init__(self) -> None:
        """Refuse what is no axis."""
        if isinstance(self.axis, bool) or not isinstance(self.axis, int):
            raise PartitionError(f"the axis of concat is an integer, -1 for the features; got {self.axis!r}")

    def finish(self, xp: Any, state: Pieces) -> Any:
        """Concatenated in the order of the regions."""
        pieces = self.ordered(state)
        rank = len(pieces[0].shape)
        if not -rank <= self.axis < rank:
            raise PartitionError(
                f"concat joins along axis {self.axis}; results of shape {tuple(pieces[0].shape)} have {rank}"
            )
        return xp.concat(pieces, axis=self.axis)


@dataclass(frozen=True)
class Call(_Pieces):
    """A callable that takes the list of the regions' results, in their order."""

    function: Callable[[list[Any]], Any]

    def __post_init__(self) -> None:
        """Refuse what cannot be called."""
        if not callable(self.function):
            raise PartitionError(f"Call takes a callable of the list of results; got {self.function!r}")

    def finish(self, state: Pieces) -> Any:
        """What the callable makes of them."""
        return self.function(self.ordered(state))


def _check_extent(region: Region, piece: Any, axes: Sequence[int]) -> None:
    found = tuple(piece.shape[a] if a < len(piece.shape) else None for a in axes)
    if found != region.shape:
        raise PartitionError(
            f"stitch puts results back in place, so the local network must keep the region's extent: region "
            f"{region.index} has {region.shape} elements along axes {tuple(axes)}, its result has {found} (shape "
            f"{tuple(piece.shape)}); pad the local network ('same'), or join with mean, max, concat ..."
        )


def _join(
    xp: Any,
    pieces: Sequence[Any],
    cells: Sequence[tuple[Interval, Interval]],
    weights: Any,
    axis: int,
) -> Any:
    """Pieces side by side along one axis: cropped to their own share, or blended where they overlap."""
    if weights is None:
        own = [_take(p, axis, a - lo, b - lo) for p, ((a, b), (lo, _)) in zip(pieces, cells)]
        return own[0] if len(own) == 1 else xp.concat(own, axis=axis)
    layers = [_layer(xp, pieces, cells, weights, axis, picks) for picks in _disjoint(cells)]
    return sum(layers[1:], layers[0])


def _disjoint(cells: Sequence[tuple[Interval, Interval]]) -> list[list[int]]:
    """Regions in as few classes as may be, so that those of one class do not overlap (greedy, from left to right)."""
    classes: list[list[int]] = []
    for i, (_, (lo, _)) in enumerate(cells):
        free = next((c for c in classes if cells[c[-1]][1][1] <= lo), None)
        if free is None:
            classes.append([i])
        else:
            free.append(i)
    return classes


def _layer(
    xp: Any,
    pieces: Sequence[Any],
    cells: Sequence[tuple[Interval, Interval]],
    weights: Any,
    axis: int,
    picks: list[int],
) -> Any:
    """Pieces that do not overlap, in place, times their windows; zero between them."""
    size = max(hi for _, (_, hi) in cells)
    parts, window, end = [], [0.0] * size, 0
    for i in picks:
        lo, hi = cells[i][1]
        parts += [_zeros(xp, pieces[i], axis, lo - end), pieces[i]]
        window[lo:hi] = weights[i]
        end = hi
    parts.append(_zeros(xp, pieces[picks[-1]], axis, size - end))
    whole = xp.concat([p for p in parts if p is not None], axis=axis)
    shape = [size if d == axis else 1 for d in range(len(whole.shape))]
    return whole * xp.reshape(xp.asarray(window, dtype=whole.dtype, **_device(whole)), shape)


def _zeros(xp: Any, like: Any, axis: int, length: int) -> Any:
    """Zeros with the shape of `like` but `length` along the axis; None of no length."""
    if length == 0:
        return None
    zeros = xp.zeros_like(like)
    times = -(-length // like.shape[axis])
    return _take(zeros if times == 1 else xp.concat([zeros] * times, axis=axis), axis, 0, length)


def _take(piece: Any, axis: int, start: int, stop: int) -> Any:
    if start == 0 and stop == piece.shape[axis]:
        return piece
    return piece[tuple(slice(start, stop) if d == axis else slice(None) for d in range(len(piece.shape)))]


def _device(piece: Any) -> dict[str, Any]:
    """Where an array lives, for namespaces whose arrays live somewhere (PyTorch)."""
    device = getattr(piece, "device", None)
    return {} if device is None or isinstance(device, str) else {"device": device}
