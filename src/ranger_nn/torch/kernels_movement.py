"""Kernels that move elements: views, crops, pads, concatenation, roll, pixel shuffles, on a region."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ranger_nn.core.program import Extent
from ranger_nn.core.reach import Border, Box
from ranger_nn.ops.movement import inner, leading, view_groups
from ranger_nn.torch.kernels import Light, Local, lengths, table
from ranger_nn.torch.layout import FORMATS


class Movement(Light):
    """Base of the movement kernels: no arithmetic, backward through autograd."""

    may_copy = True

    def __init__(self) -> None:
        """Nothing to bind."""
        super().__init__(lambda x: x)

    def scratch(self, at: Extent) -> int:
        """A copy where the region is not contiguous."""
        return at.in_bytes[0]

    def vjp_scratch(self, at: Extent) -> int:
        """Forward again, on zeros that take no memory until they are moved."""
        return at.out_bytes + sum(at.in_bytes)


class View(Movement):
    """Reshape of a region: flatten each group, crop it where the cut does not fall on a row, shape it again."""

    def __init__(self, shape: Sequence[int], out: Sequence[int]) -> None:
        """Whole shapes before and after."""
        super().__init__()
        self.shape, self.out = tuple(shape), tuple(out)
        self.groups = view_groups(self.shape, self.out)

    def copies(self, out_box: Box, in_boxes: Sequence[Box]) -> bool | None:
        """The whole of what lies in order is a view."""
        return False if self.dense and self._uncut(out_box, in_boxes[0]) else None

    def scratch(self, at: Extent) -> int:
        """A copy where the region is not contiguous and is cropped after."""
        return 0 if self._uncut(at.out_box, at.reads[0].box) else super().scratch(at)

    def _uncut(self, out_box: Box, box: Box) -> bool:
        return lengths(box) == list(self.shape) and lengths(out_box) == list(self.out)

    def bind(self, out_box: Box, in_boxes: Sequence[Box]) -> Local:
        """Reshape, crop, reshape."""
        final = lengths(out_box)
        flat: list[int] = []
        crops: list[tuple[int, int, int]] = []
        box = in_boxes[0]
        if self.groups is None or self._uncut(out_box, box):
            return lambda x: x.reshape(final)
        for g, (left, right) in enumerate(self.groups):
            count = 1
            for d in left:
                count *= box[d][1] - box[d][0]
            flat.append(count)
            lead_in, lead_out = leading(left, self.shape), leading(right, self.out)
            if lead_in is None or lead_out is None:
                continue
            offset = box[lead_in][0] * inner(left, lead_in, self.shape)
            step = inner(right, lead_out, self.out)
            start, stop = out_box[lead_out][0] * step - offset, out_box[lead_out][1] * step - offset
            if (start, stop) != (0, count):
                crops.append((g, start, stop - start))
        if not crops:
            return lambda x: x.reshape(final)

        def local(x: Tensor) -> Tensor:
            x = x.reshape(flat)
            for dim, start, length in crops:
                x = x.narrow(dim, start, length)
            return x.reshape(final)

        return local


class Expand(Movement):
    """Broadcast to the size of the region."""

    generates = True

    may_copy = False

    def bind(self, out_box: Box, in_boxes: Sequence[Box]) -> Local:
        """`Tensor.expand`."""
        sizes = lengths(out_box)
        return lambda x: x.expand(sizes)


class Crop(Movement):
    """Slice with a step: the region read starts at the first index and ends at the last."""

    may_copy = False

    layout = "keeps"

    def __init__(self, dim: int, start: int, step: int) -> None:
        """Dimension, first index and step."""
        super().__init__()
        self.dim, self.start, self.step = dim, start, step

    def bind(self, out_box: Box, in_boxes: Sequence[Box]) -> Local:
        """Take every `step`-th index of what is read."""
        dim, step = self.dim, self.step
        (a, b), (lo, hi) = out_box[dim], in_boxes[0][dim]
        first, stop = a * step + self.start - lo, (b - 1) * step + self.start + 1 - lo
        if step == 1 and (first, stop) == (0, hi - lo):
            return lambda x: x
        return lambda x: torch.ops.aten.slice.Tensor(x, dim, first, stop, step)


class Pick(Movement):
    """Indices of one dimension, in any order."""

    shift_invariant = False
    may_copy = False

    def __init__(self, dim: int, places: Sequence[int]) -> None:
        """`places`: of the whole input, one for each index of the whole output."""
        super().__init__()
        self.dim, self.places = dim, tuple(places)

    def scratch(self, at: Extent) -> int:
        """None: one row after the other is copied."""
        return 0

    def bind(self, out_box: Box, in_boxes: Sequence[Box]) -> Local:
        """`index_select` from the rows that are read."""
        dim, (start, stop), base = self.dim, out_box[self.dim], in_boxes[0][self.dim][0]
        index = table([n - base for n in self.places[start:stop]], np.int64)
        return lambda x: x.index_select(dim, index.to(x.device))


class Flip(Movement):
    """Dimensions the other way round: a region of them is, too."""

    shift_invariant = False
    may_copy = False

    def __init__(self, dims: Sequence[int]) -> None:
        """Not negative."""
        super().__init__()
        self.dims = list(dims)

    def bind(self, out_box: Box, in_boxes: Sequence[Box]) -> Local:
        """`Tensor.flip`."""
        return lambda x: x.flip(self.dims)


class Pad(Movement):
    """Padding by a constant, the edge, a mirror or the other end."""

    layout = "keeps"

    def __init__(self, before: Sequence[int], shape: Sequence[int], out: Sequence[int], border: Border, value: float):
        """`before[d]`: indices in front of dimension d, negative to cut off."""
        super().__init__()
        self.before, self.shape, self.out, self.border, self.value = before, shape, out, border, value

    def _index(self, dim: int, interval: tuple[int, int], base: int) -> list[int]:
        size = self.shape[dim]
        result = []
        for o in range(*interval):
            i = o - self.before[dim]
            if self.border is Border.REPLICATE:
                i = min(max(i, 0), size - 1)
            elif self.border is Border.CIRCULAR:
                i %= size
            elif not 0 <= i < size:
                i = -i if i < 0 else 2 * (size - 1) - i
            result.append(i - base)
        return result

    def _missing(self, out_box: Box, box: Box) -> list[int]:
        pads: list[int] = []
        for d in reversed(range(len(out_box))):
            lo = out_box[d][0] - self.before[d]
            pads += [box[d][0] - lo, (out_box[d][1] - self.before[d]) - box[d][1]]
            if box[d][1] == box[d][0]:
                pads[-2:] = [0, out_box[d][1] - out_box[d][0]]
        return pads

    def copies(self, out_box: Box, in_boxes: Sequence[Box]) -> bool | None:
        """A region away from the border is the input itself."""
        return any(self._missing(out_box, in_boxes[0])) if self.border is Border.FILL else None

    def scratch(self, at: Extent) -> int:
        """The result of the dimensions before the last that is gathered."""
        return 0 if self.border is Border.FILL else at.in_bytes[0] + at.out_bytes

    def vjp_scratch(self, at: Extent) -> int:
        """Forward again, on zeros that take no memory."""
        return at.out_bytes if self.border is Border.FILL else 2 * at.out_bytes + at.in_bytes[0]

    def _border(self, out_box: Box) -> Local:
        shape, value = lengths(out_box), self.value
        order = FORMATS[len(shape)] if self.channels_last else torch.contiguous_format

        def local(x: Tensor) -> Tensor:
            return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=order).fill_(value)

        return local

    def bind(self, out_box: Box, in_boxes: Sequence[Box]) -> Local:
        """Constant: F.pad by what is missing. Otherwise gather the indices of each padded dimension."""
        box = in_boxes[0]
        if self.border is Border.FILL:
            pads, value = self._missing(out_box, box), self.value
            if any(hi <= lo for lo, hi in box):
                return self._border(out_box)
            return (lambda x: F.pad(x, pads, value=value)) if any(pads) else (lambda x: x)
        gathers = []
        for d, interval in enumerate(out_box):
            shifted = (interval[0] - self.before[d], interval[1] - self.before[d])
            if box[d] != shifted:
                index = self._index(d, interval, box[d][0])
                gathers.append((d, table(index, np.int64)))

        def local(x: Tensor) -> Tensor:
            for dim, index in gathers:
                x = x.index_select(dim, index.to(x.device))
            return x

        return local


class Concatenate(Movement):
    """Concatenation of those inputs that reach into the region."""

    layout = "keeps"

    def __init__(self, dim: int) -> None:
        """`dim`, not negative."""
        super().__init__()
        self.dim = dim

    def scratch(self, at: Extent) -> int:
        """None."""
        return 0

    def vjp_scratch(self, at: Extent) -> int:
        """None: the gradient is cut in pieces."""
        return 0

    def bind(self, out_box: Box, in_boxes: Sequence[Box]) -> Local:
        """`torch.cat`."""
        dim = self.dim
        keep = [i for i, box in enumerate(in_boxes) if box[dim][1] > box[dim][0]]

        def local(*xs: Tensor) -> Tensor:
            return torch.cat([xs[i] for i in keep], dim)

        return local

    def bind_vjp(self, out_box: Box, in_boxes: Sequence[Box], wanted: Sequence[bool]) -> Local:
        """Copies of the gradient's pieces."""
        dim, pieces, offset = self.dim, [], 0
        for box, w in zip(in_boxes, wanted, strict=True):
            length = box[dim][1] - box[dim][0]
            pieces.append((w, offset, length))
            offset += length

        def vjp(*args: Any) -> list[Any]:
            grad = args[-1]
            return [grad.narrow(dim, start, length).clone() if w else None for w, start, length in pieces]

        return vjp


class Roll(Movement):
    """Circular shift; a region away from the seam is read as it is."""

    layout = "keeps"

    def __init__(self, shifts: dict[int, int], shape: Sequence[int]) -> None:
        """Shift of each rolled dimension."""
        super().__init__()
        self.shifts, self.shape = shifts, shape

    def bind(self, out_box: Box, in_boxes: Sequence[Box]) -> Local:
        """Roll and crop the dimensions that cross the seam."""
        todo = []
        for d, shift in self.shifts.items():
            (a, b), (lo, hi) = out_box[d], in_boxes[0][d]
            if (lo, hi) == (a - shift, b - shift):  # the rows as they are numbered, perhaps beyond the ends
                continue
            if (hi - lo) != (b - a) or (hi - lo == self.shape[d] and shift % self.shape[d]):
                todo.append((d, shift, a, b - a))

        def local(x: Tensor) -> Tensor:
            for dim, shift, start, length in todo:
                x = torch.roll(x, shift, dim).narrow(dim, start, length)
            return x

        return local


class PixelShuffle(Movement):
    """Depth to space: shuffle the region, crop it."""

    def __init__(self, factor: int) -> None:
        """Up-scale factor."""
        super().__init__()
        self.factor = factor

    def bind(self, out_box: Box, in_boxes: Sequence[Box]) -> Local:
        """`pixel_shuffle`, cropped."""
        factor, crops = self.factor, []
        for d in (len(out_box) - 2, len(out_box) - 1):
            (a, b), (lo, hi) = out_box[d], in_boxes[0][d]
            if (a - lo * factor, b - a) != (0, (hi - lo) * factor):
                crops.append((d, a - lo * factor, b - a))

        def local(x: Tensor) -> Tensor:
            x = F.pixel_shuffle(x, factor)
            for dim, start, length in crops:
                x = x.narrow(dim, start, length)
            return x.clone() if crops else x

        return local


class Scatter(Movement):
    """The first input with the second written over the indices start, start + step, ... of `dim`."""

    shift_invariant = False

    def __init__(self, dim: int, start: int, squeeze: bool, step: int = 1) -> None:
        """`squeeze`: the second input lacks `dim` (select_scatter)."""
        super().__init__()
        self.dim, self.start, self.squeeze, self.step = dim, start, squeeze, step

    def bind(self, out_box: Box, in_boxes: Sequence[Box]) -> Local:
        """Copy, then overwrite the part that falls into the region."""
        dim, step, squeeze = self.dim, self.step, self.squeeze
        low, high = (0, 1) if squeeze else in_boxes[1][dim]
        start, stop = out_box[dim]
        a, b = max(low, -((self.start - start) // step)), min(high, (stop - 1 - self.start) // step + 1)
        first, last = self.start + a * step - start, self.start + (b - 1) * step - start

        def local(base: Tensor, source: Tensor) -> Tensor:
            if b <= a:
                return base
            source = (source.unsqueeze(dim) if squeeze else source).narrow(dim, a - low, b - a).to(base.dtype)
            if step > 1:
                return torch.slice_scatter(base, source, dim, first, last + 1, step)
            pieces = [base.narrow(dim, 0, first)] if first > 0 else []
            pieces.append(source)
            if stop - start > last + 1:
                pieces.append(base.narrow(dim, last + 1, stop - start - last - 1))
            return torch.cat(pieces, dim)

        return local
