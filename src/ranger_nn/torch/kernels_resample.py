"""Kernels of resampling: at the places of a grid, and to another size (nearest, linear, cubic).

To another size: where the scale is a power of two per dimension and corners are not aligned, the framework's own operator runs on a
crop with a margin: the coordinates are computed without rounding, so the numbers are the same. Everywhere else the
taps and weights of each output index are read off the framework once, by resampling one-hot combs along the
dimension, and applied as a gather: the region then uses the very weights of the untouched call, rounding included.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ranger_nn.core.program import Extent
from ranger_nn.core.reach import Box, Interval
from ranger_nn.torch.kernels import SMALL_TENSORS, Call, Kernel, Local, lengths, table
from ranger_nn.torch.layout import dense

PERIOD = 8

PLANE = 128 * 128
"""Places of an output below which the framework resizes images channels-last, whatever order they are in."""

TAPS = {"nearest": 1, "nearest-exact": 1, "linear": 2, "cubic": 4}
"""Inputs that each output index reads along a dimension."""
INDEX = 8
"""Bytes of an index."""

MODES = {
    "nearest": ("nearest", "nearest", "nearest"),
    "nearest-exact": ("nearest-exact", "nearest-exact", "nearest-exact"),
    "linear": ("linear", "bilinear", "trilinear"),
    "cubic": ("", "bicubic", ""),
}


class Sampling(Call):
    """Samples of a whole image at the places of a region of a grid; it works in no memory but its results'."""

    def vjp_scratch(self, at: Extent) -> int:
        """Forward again."""
        return at.out_bytes + SMALL_TENSORS


@dataclass(frozen=True)
class Axis:
    """One resampled dimension: whole sizes, and the scale factor if the caller gave one."""

    size: int
    out: int
    factor: float | None

    @property
    def exact_factor(self) -> int | None:
        """The integer up-scale, where it is a power of two that holds for the whole dimension."""
        step = self.out // self.size if self.size else 0
        if self.out != step * self.size or step < 1 or step & (step - 1):
            return None
        return step if self.factor is None or self.factor == step else None


def _resample(x: Tensor, mode: str, axes: Sequence[Axis], align: bool, sizes: Sequence[int] | None = None) -> Tensor:
    rank = len(axes)
    options = {} if mode.startswith("nearest") else {"align_corners": align}
    name = MODES[mode][rank - 1]
    if sizes is not None or any(a.factor is None for a in axes):
        return F.interpolate(x, size=list(sizes or [a.out for a in axes]), mode=name, **options)
    return F.interpolate(x, scale_factor=[float(a.factor or 1) for a in axes], mode=name, **options)


@lru_cache(maxsize=256)
def taps(
    axis: Axis, mode: str, align: bool, dtype: torch.dtype, rank: int = 1
) -> tuple[tuple[tuple[int, ...], tuple[float, ...]], ...]:
    """For each output index: the input indices read and their weights, as the framework has them."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    comb = torch.zeros(1, PERIOD, axis.size, dtype=compute)
    for k in range(PERIOD):
        comb[0, k, k::PERIOD] = 1
    # At the rank of the untouched call: the framework's operators of one and two dimensions round differently.
    ones = [Axis(1, 1, None if axis.factor is None else 1.0)] * (rank - 1)
    flat = _resample(comb.reshape(1, PERIOD, axis.size, *[1] * (rank - 1)), mode, [axis, *ones], align)
    flat = flat.reshape(PERIOD, axis.out)
    weights = flat.t().tolist()
    result = []
    for o in range(axis.out):
        if align:
            source = o * (axis.size - 1) / max(1, axis.out - 1)
        else:
            scale = 1 / axis.factor if axis.factor else axis.size / axis.out
            source = (o + 0.5) * scale - 0.5
            source = o * scale if mode == "nearest" else source + 0.5 if mode == "nearest-exact" else source
        base = math.floor(source)
        near = [j for j in range(base - 3, base + 5) if 0 <= j < axis.size]
        if not near:
            near = [min(max(base, 0), axis.size - 1)]
        found = [(j, weights[o][j % PERIOD]) for j in near if weights[o][j % PERIOD] != 0.0]
        found = found or [(near[0], 0.0)]
        result.append((tuple(j for j, _ in found), tuple(w for _, w in found)))
    return tuple(result)


@lru_cache(maxsize=256)
def gathers(
    axis: Axis, mode: str, align: bool, dtype: torch.dtype, rank: int, interval: Interval, base: int
) -> tuple[tuple[Tensor, Tensor], ...]:
    """For each tap: indices into an input that starts at `base`, and weights, for an interval of output indices.

    Regions of one sweep share their columns, so that these are held once.
    """
    rows = taps(axis, mode, align, dtype, rank)[slice(*interval)]
    real = np.float64 if dtype == torch.float64 else np.float32
    found = []
    for k in range(max(len(js) for js, _ in rows)):
        index = [(js[k] if k < len(js) else js[0]) - base for js, _ in rows]
        weight = [ws[k] if k < len(ws) else 0.0 for _, ws in rows]
        found.append((table(index, np.int64), table(weight, real)))
    return tuple(found)


class Resample(Kernel):
    """Nearest, linear or cubic resampling of the last `len(axes)` dimensions."""

    layout = "keeps"

    def __init__(self, mode: str, axes: Sequence[Axis], align: bool, dtype: torch.dtype) -> None:
        """`axes`: one for each resampled dimension, in order."""
        self.mode, self.axes, self.align, self.dtype = mode, tuple(axes), align, dtype
        exact = not align or mode.startswith("nearest")
        self.native = exact and all(a.exact_factor for a in self.axes)

    def _crops(self, at: Extent) -> list[int]:
        """Bytes of the native result before each dimension that is cropped: the largest last, none where it is not."""
        lead, box = len(at.out_box) - len(self.axes), at.reads[0].box
        sizes, size = [], at.out_bytes
        for i, axis in reversed(list(enumerate(self.axes))):
            (a, b), (lo, hi) = at.out_box[lead + i], box[lead + i]
            full = (hi - lo) * (axis.exact_factor or 1)
            size = size * full // max(1, b - a)
            if full != b - a:
                sizes.append(size)
        return sizes

    def _uncropped(self, at: Extent) -> int:
        """Bytes of the native result before it is cropped; 0 where it is not."""
        return max(self._crops(at), default=0)

    def scratch(self, at: Extent) -> int:
        """The result before it is cropped, or taps of a gather; a copy of what is not in order; tables of taps."""
        return (self._uncropped(at) if self.native else self._gathered(at)) + self._copied(at) + self._tables(at)

    def _tables(self, at: Extent) -> int:
        """Bytes of index and weight of each tap, which the framework writes down for every output index of a dimension.

        Of images next to nothing, of a long series of few channels more than the series.
        """
        box, lead = at.reads[0].box, len(at.out_box) - len(self.axes)
        places = 0
        for i, axis in enumerate(self.axes):
            (a, b), (lo, hi) = at.out_box[lead + i], box[lead + i]
            places += max(b - a, (hi - lo) * (axis.exact_factor or 0))
        return places * TAPS[self.mode] * (INDEX + self.itemsize)

    def _copied(self, at: Extent) -> int:
        """Bytes of the input made contiguous, and of small planes that the framework resizes channels-last and copies back."""
        if self.channels_last and dense(at.reads[0]):
            return 0
        whole = self.dense and at.in_bytes[0] == self.whole_bytes
        factor = prod(axis.exact_factor or 1 for axis in self.axes)
        small = len(self.axes) == 2 and prod(lengths(at.reads[0].box)[-2:]) * factor <= PLANE
        again = at.in_bytes[0] * (1 + factor) if small else 0
        return max(again, 0 if whole else at.in_bytes[0])

    @property
    def _wide(self) -> int:
        """Times the bytes of an element that a gather works in: 16 bits are weighted in 32."""
        return 2 if self.itemsize == 2 and not self.mode.startswith("nearest") else 1

    def _gathered(self, at: Extent) -> int:
        """A tap, its product and the sum so far, beside what the dimension before gave."""
        lead, box = len(at.out_box) - len(self.axes), at.reads[0].box
        before, most = at.in_bytes[0], 0
        for d in range(lead, len(at.out_box)):
            (a, b), (lo, hi) = at.out_box[d], box[d]
            after = before * (b - a) // max(1, hi - lo)
            before, most = after, max(most, before + 3 * after)
        return most * self._wide

    def vjp_scratch(self, at: Extent) -> int:
        """Forward again and the gradient before the crop."""
        if self.native:
            padded = sum(self._crops(at)[-2:])  # the gradient, dimension by dimension
            return at.out_bytes + padded + self._copied(at) + self._tables(at)
        return (
            self._tables(at)
            + (8 * at.out_bytes + 2 * at.in_bytes[0]) * self._wide
            + at.out_bytes
            + self._gathered(at) // 4
        )

    def bind(self, out_box: Box, in_boxes: Sequence[Box]) -> Local:
        """Native on a crop, or a gather along each cut dimension after the native call on the others."""
        lead = len(out_box) - len(self.axes)
        whole = [out_box[lead + i] == (0, a.out) for i, a in enumerate(self.axes)]
        read_whole = [in_boxes[0][lead + i] == (0, a.size) for i, a in enumerate(self.axes)]
        if all(whole) and all(read_whole):
            return lambda x: _resample(x, self.mode, self.axes, self.align)
        if self.native:
            return self._crop(out_box, in_boxes[0], lead)
        return self._gather(out_box, in_boxes[0], lead, whole)

    def _crop(self, out_box: Box, in_box: Box, lead: int) -> Local:
        sizes, crops, axes = [], [], []
        for i, axis in enumerate(self.axes):
            factor = axis.exact_factor or 1
            (a, b), (lo, hi) = out_box[lead + i], in_box[lead + i]
            sizes.append((hi - lo) * factor)
            axes.append(Axis(hi - lo, (hi - lo) * factor, None))
            if (a - lo * factor, b - a) != (0, sizes[-1]):
                crops.append((lead + i, a - lo * factor, b - a))
        mode, align = self.mode, self.align

        def local(x: Tensor) -> Tensor:
            y = _resample(x, mode, axes, align, sizes)
            for dim, start, length in crops:
                y = y.narrow(dim, start, length)
            return y.clone() if crops else y

        return local

    def _gather(self, out_box: Box, in_box: Box, lead: int, whole: list[bool]) -> Local:
        tables: list[tuple[int, list[tuple[Tensor, Tensor]]]] = []
        rank, nearest = len(out_box), self.mode.startswith("nearest")
        for i, axis in enumerate(self.axes):
            if whole[i] and axis.size == axis.out and axis.factor in (None, 1.0):
                continue
            d = lead + i
            pairs = gathers(axis, self.mode, self.align, self.dtype, len(self.axes), out_box[d], in_box[d][0])
            shape = [-1 if other == d else 1 for other in range(rank)]
            tables.append((d, [(index, weight.view(shape)) for index, weight in pairs]))

        def local(x: Tensor) -> Tensor:
            wide = x if x.dtype in (torch.float32, torch.float64) or nearest else x.float()
            for dim, pairs in tables:
                total = None
                for index, weight in pairs:
                    piece = wide.index_select(dim, index.to(x.device))
                    if not nearest:
                        piece = piece * weight.to(wide)
                    total = piece if total is None else total + piece
                wide = wide if total is None else total
            return wide.to(x.dtype)

        return local
