"""Kernels of overlapping patches: taken out of a map, and added up into one. Each is the other's gradient.

    map      rows with their border filled   --F.unfold-->   a column of values for each place of the window
    places   (samples, channels * window, rows of places, columns of places)

`F.unfold` and `F.fold` join rows and columns of places; here they stay apart, so that regions are rows of both. Results are
made before they are written: left to itself PyTorch makes both as large as what it reads, and what `F.fold` gives keeps that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ranger_nn.core.program import Extent
from ranger_nn.core.reach import Box, Reach
from ranger_nn.ops import window
from ranger_nn.torch.kernels import Local, lengths
from ranger_nn.torch.kernels_movement import Movement

aten = torch.ops.aten


@dataclass(frozen=True)
class Patch:
    """The window along one dimension."""

    kernel: int
    stride: int
    dilation: int
    padding: int

    @property
    def reach(self) -> Reach:
        """What a place reads of the map."""
        return window.window_reach(self.kernel, self.stride, self.dilation, self.padding)

    @property
    def transposed(self) -> Reach:
        """The places that write to an index of the map."""
        return window.transposed_reach(self.kernel, self.stride, self.dilation, self.padding)

    def places(self, size: int) -> int:
        """How many fit on a dimension of the map."""
        return window.pooled_size(size, self.kernel, self.stride, self.dilation, self.padding, False)


class Patches(Movement):
    """What both directions share: calls on regions whose border is `missing` or too much."""

    layout = ""
    may_copy = False

    def __init__(self, patches: Sequence[Patch]) -> None:
        """Of rows and columns."""
        super().__init__()
        self.patches = tuple(patches)
        kernel, dilation, stride = ([getattr(p, n) for p in patches] for n in ("kernel", "dilation", "stride"))
        self.options: Any = (kernel, dilation, [0, 0], stride)
        self.window = prod(kernel)

    def missing(self, places: Box, given: Box) -> list[int]:
        """Border of a region of the map, as `F.pad` takes it, until it is what these places read; negative: too much."""
        pads: list[int] = []
        for patch, (a, b), (lo, hi) in reversed(list(zip(self.patches, places[-2:], given[-2:], strict=True))):
            first, stop = patch.reach.needs(a, b)
            pads += [stop - first, 0] if hi <= lo else [lo - first, stop - hi]
        return pads

    def taken(self, x: Tensor, pads: Sequence[int], places: Sequence[int]) -> Tensor:
        """Patches of a region of the map."""
        x = F.pad(x, list(pads)) if any(pads) else x
        out = x.new_empty([*x.shape[:-3], x.shape[-3] * self.window, prod(places[-2:])])
        return aten.im2col.out(x, *self.options, out=out).unflatten(-1, list(places[-2:]))

    def added(self, patches: Tensor, pads: Sequence[int], size: Sequence[int]) -> Tensor:
        """The same, the other way."""
        if 0 in patches.shape:
            return patches.new_zeros([*patches.shape[:-3], size[-3], *size[-2:]])
        full = [size[-2] + pads[2] + pads[3], size[-1] + pads[0] + pads[1]]
        out = patches.new_empty([*patches.shape[:-3], size[-3], *full])
        aten.col2im.out(patches.flatten(-2), full, *self.options, out=out)
        return F.pad(out, [-n for n in pads]) if any(pads) else out

    def bordered(self, places: Box, region: Box) -> int:
        """Bytes of the map that these places read, border and all; `region`: of the map."""
        if any(hi <= lo for lo, hi in places):
            return 0
        spans = [p.reach.needs(*side) for p, side in zip(self.patches, places[-2:], strict=True)]
        return prod(lengths(region)[:-2]) * prod(stop - first for first, stop in spans) * self.itemsize


class Unfold(Patches):
    """A column of values for each place of the window."""

    def bind(self, out_box: Box, in_boxes: Sequence[Box]) -> Local:
        """`F.unfold` with the border that is missing."""
        pads, places = self.missing(out_box, in_boxes[0]), lengths(out_box)
        return lambda x: self.taken(x, pads, places)

    def bind_vjp(self, out_box: Box, in_boxes: Sequence[Box], wanted: Sequence[bool]) -> Local:
        """`F.fold` of the gradient, without the border."""
        pads, size = self.missing(out_box, in_boxes[0]), lengths(in_boxes[0])
        return lambda x, grad: [self.added(grad, pads, size)]

    def scratch(self, at: Extent) -> int:
        """The map with its border, and once more in order."""
        return 2 * self.bordered(at.out_box, at.reads[0].box)

    def vjp_scratch(self, at: Extent) -> int:
        """The gradient in order, and the sum with its border."""
        return at.out_bytes + self.bordered(at.out_box, at.reads[0].box)


class Fold(Patches):
    """Patches added up where they overlap."""

    def bind(self, out_box: Box, in_boxes: Sequence[Box]) -> Local:
        """`F.fold` of the places that reach into the region, cropped."""
        pads, size = self.missing(in_boxes[0], out_box), lengths(out_box)
        return lambda x: self.added(x, pads, size)

    def bind_vjp(self, out_box: Box, in_boxes: Sequence[Box], wanted: Sequence[bool]) -> Local:
        """`F.unfold` of the gradient."""
        pads, places = self.missing(in_boxes[0], out_box), lengths(in_boxes[0])

        def vjp(x: Tensor, grad: Tensor) -> list[Any]:
            return [self.taken(grad, pads, places) if 0 not in places else torch.zeros_like(x)]

        return vjp

    def scratch(self, at: Extent) -> int:
        """The patches in order, where they are not, and their sum with its border."""
        in_order = self.dense and at.in_bytes[0] == self.whole_bytes
        return (0 if in_order else at.in_bytes[0]) + self.bordered(at.reads[0].box, at.out_box)

    def vjp_scratch(self, at: Extent) -> int:
        """The gradient with its border, and once more in order."""
        return 2 * self.bordered(at.reads[0].box, at.out_box)
