"""Kernels with a window: its border, and pooling; convolutions are in `kernels_convolution.py`.

    the window's input          [ lo ............ hi )         unclipped
    inside of the value              [ a ..... b )             what is read
    before, after               <---->         <-->            border: filled on the spot

Along a dimension that is not cut the framework pads as ever; along one that is cut, the border of the first and
last region is filled before the call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ranger_nn.core.program import Extent
from ranger_nn.core.reach import Box, Reach
from ranger_nn.torch.kernels import SMALL_TENSORS, Kernel, Local, table

Ints = tuple[int, ...]


def borders(out_box: Box, in_box: Box, reaches: Sequence[Reach], lead: int) -> list[tuple[int, int]]:
    """Indices missing before and after, for each windowed dimension; negative where more was read than is needed.

    Where the window lies beyond what was read, all of that is cropped and the window is border alone.
    """
    result = []
    for i, reach in enumerate(reaches):
        lo, hi = reach.needs(*out_box[lead + i])
        a, b = in_box[lead + i]
        if b <= a:
            result.append((0, hi - lo))
        elif hi <= a:
            result.append((hi - lo, a - b))
        elif lo >= b:
            result.append((a - b, hi - lo))
        else:
            result.append((a - lo, hi - b))
    return result


def split_padding(missing: Sequence[tuple[int, int]], native: Sequence[int]) -> tuple[list[int], list[int]]:
    """(padding that the operator does itself, padding for F.pad, last dimension first)."""
    own, extra = [], []
    for (before, after), pad in zip(missing, native, strict=True):
        if before == after == pad:
            own.append(pad)
            extra.append((0, 0))
        else:
            own.append(0)
            extra.append((before, after))
    flat = [n for pair in reversed(extra) for n in pair]
    return own, flat if any(flat) else []


def padded_bytes(at: Extent, extra: Sequence[int]) -> int:
    """Bytes of the first input padded by `extra` (as F.pad takes it); 0 where nothing is padded."""
    if not extra:
        return 0
    size, box = at.in_bytes[0], at.reads[0].box
    for i in range(len(extra) // 2):
        lo, hi = box[len(box) - 1 - i]
        size = size * max(1, hi - lo + extra[2 * i] + extra[2 * i + 1]) // max(1, hi - lo)
    return max(size, at.in_bytes[0])


class Pooling(Kernel):
    """Maximum or average pooling; `whole` is the untouched call, used where no dimension is cut."""

    layout = "keeps"

    def __init__(
        self,
        whole: Callable[[Tensor], Tensor],
        average: bool,
        kernel: Ints,
        stride: Ints,
        padding: Ints,
        dilation: Ints,
        ceil_mode: bool,
        count_pad: bool,
        divisor: int | None,
        sizes: tuple[Ints, Ints],
        reaches: Sequence[Reach],
    ) -> None:
        """Integers as in `torch.nn.functional.{max,avg}_pool*d`."""
        self.whole, self.average, self.kernel, self.stride = whole, average, kernel, stride
        self.padding, self.dilation, self.ceil_mode = padding, dilation, ceil_mode
        self.count_pad, self.divisor, self.sizes, self.reaches = count_pad, divisor, sizes, reaches
        self.shift_invariant = not ceil_mode and not any(padding)

    def scratch(self, at: Extent) -> int:
        """Indices (64-bit) of a maximum, copies of the input where its border is filled or it is not in order."""
        return self._indices(at) + self._padded(at) + self._copied(at)

    def _copied(self, at: Extent) -> int:
        parts = at.reads[0].parts
        return at.in_bytes[0] if len(parts) == 1 and parts[0][1] and not self.channels_last else 0

    def _indices(self, at: Extent) -> int:
        return at.out_bytes if self.average else at.out_bytes * 8 // self.itemsize

    def _padded(self, at: Extent) -> int:
        lead = len(at.out_box) - len(self.reaches)
        if self._is_whole(at.out_box, lead):
            return 0
        own, extra = split_padding(borders(at.out_box, at.reads[0].box, self.reaches, lead), self.padding)
        if self._overhangs(extra):
            return 3 * at.in_bytes[0] + 2 * at.out_bytes
        if self.average and any(own):
            extra = extra or [n for pad in reversed(own) for n in (pad, pad)]
        return padded_bytes(at, extra)

    def _is_whole(self, out_box: Box, lead: int) -> bool:
        return all(box == (0, n) for box, n in zip(out_box[lead:], self.sizes[1], strict=True))

    def _overhangs(self, extra: Sequence[int]) -> bool:
        """True where a border as large as the map would have to be filled: windows larger than the map."""
        sizes = self.sizes[0]
        return any(max(extra[2 * i : 2 * i + 2], default=0) >= n for i, n in enumerate(reversed(sizes)))

    def vjp_scratch(self, at: Extent) -> int:
        """Forward again: output, indices, padded input and its gradient."""
        return 2 * at.out_bytes + self._indices(at) + 2 * self._padded(at) + self._copied(at) + SMALL_TENSORS

    def bind(self, out_box: Box, in_boxes: Sequence[Box]) -> Local:
        """The untouched call, or one on a region with its border filled."""
        lead = len(out_box) - len(self.reaches)
        if self._is_whole(out_box, lead):
            return self.whole
        missing = borders(out_box, in_boxes[0], self.reaches, lead)
        own, extra = split_padding(missing, self.padding)
        if self._overhangs(extra):
            return self._clipped(out_box, in_boxes[0], lead)
        if self.average:
            return self._average(out_box, lead, own, extra)
        pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(self.kernel) - 1]
        kernel, stride, dilation = self.kernel, self.stride, self.dilation

        def local(x: Tensor) -> Tensor:
            if extra:
                x = F.pad(x, extra, value=float("-inf"))
            return pool(x, kernel, stride, own, dilation)

        return local

    def _clipped(self, out_box: Box, in_box: Box, lead: int) -> Local:
        """Windows clipped to the map, one dimension after the other: nothing is padded."""
        plan = []
        for i, (size, k) in enumerate(zip(self.sizes[0], self.kernel, strict=True)):
            dim, windows = lead + i, []
            for o in range(*out_box[lead + i]):
                first = o * self.stride[i] - self.padding[i]
                inside = [first + n * self.dilation[i] for n in range(k) if 0 <= first + n * self.dilation[i] < size]
                start = inside[0] - in_box[dim][0] if inside else 0
                windows.append((start, start + (inside[-1] - inside[0] + 1 if inside else 0)))
            plan.append((dim, windows, self.dilation[i]))
        weight = 1.0 / (self.divisor or 1)
        scales = [] if self.divisor is not None else self._shares(out_box, lead)
        average = self.average

        def local(x: Tensor) -> Tensor:
            for dim, windows, step in reversed(plan):  # of equal ones the first in memory is the maximum
                pieces = [torch.ops.aten.slice.Tensor(x, dim, start, stop, step) for start, stop in windows]
                x = torch.cat([_window(p, dim, average) for p in pieces], dim)
            for share in scales:
                x = x * share.to(x)
            return x * weight if average and weight != 1.0 else x

        return local

    def _shares(self, out_box: Box, lead: int) -> list[Tensor]:
        """One over the elements that a window counts, for each dimension of an average."""
        found = []
        for i, k in enumerate(self.kernel if self.average else ()):
            shape = [-1 if d == lead + i else 1 for d in range(len(out_box))]
            counted = [scale / k for scale in self._scales(i, out_box[lead + i], k)]
            found.append(table(counted, np.float64).view(shape))
        return found

    def _average(self, out_box: Box, lead: int, own: list[int], extra: list[int]) -> Local:
        pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(self.kernel) - 1]
        kernel, stride = self.kernel, self.stride
        if not extra and not any(own):
            options: dict[str, Any] = {} if self.divisor is None else {"divisor_override": self.divisor}
            return lambda x: pool(x, kernel, stride, 0, **options)
        missing = [(0, 0)] * len(kernel)
        for i, pad in enumerate(own):
            missing[i] = (pad, pad)
        for i in range(len(extra) // 2):
            axis = len(kernel) - 1 - i
            before, after = extra[2 * i], extra[2 * i + 1]
            if before or after:
                missing[axis] = (before, after)
        pads = [n for pair in reversed(missing) for n in pair]
        total = 1
        for k in kernel:
            total *= k
        scales = []
        for i, k in enumerate(kernel):
            shape = [-1 if d == lead + i else 1 for d in range(len(out_box))]
            scales.append(table(self._scales(i, out_box[lead + i], k), np.float64).view(shape))
        divisor = self.divisor

        def local(x: Tensor) -> Tensor:
            y = pool(F.pad(x, pads), kernel, stride)
            if divisor is not None:
                return y * (total / divisor)
            for scale in scales:
                y = y * scale.to(y)
            return y

        return local

    def _scales(self, axis: int, interval: tuple[int, int], k: int) -> list[float]:
        size, pad, stride = self.sizes[0][axis], self.padding[axis], self.stride[axis]
        result = []
        for o in range(*interval):
            start = o * stride - pad
            stop = min(start + k, size + pad)
            count = stop - start if self.count_pad else min(stop, size) - max(start, 0)
            result.append(k / count)
        return result


def _window(x: Tensor, dim: int, average: bool) -> Tensor:
    """Sum or maximum along `dim`; of nothing, what a border holds."""
    if average:
        return x.sum(dim, keepdim=True)
    if not x.shape[dim]:
        return x.sum(dim, keepdim=True) - float("inf")
    # With indices, which take eight bytes each, where a gradient goes to the first of equals.
    return x.max(dim, keepdim=True).values if torch.is_grad_enabled() else x.amax(dim, keepdim=True)


class AdaptivePooling(Kernel):
    """Adaptive pooling by windows that vary: separable, one dimension after the other."""

    layout = "keeps"

    def __init__(self, whole: Callable[[Tensor], Tensor], average: bool, sizes: tuple[Ints, Ints]) -> None:
        """`sizes`: whole (input, output) spatial sizes."""
        self.whole, self.average, self.sizes = whole, average, sizes

    def scratch(self, at: Extent) -> int:
        """The result after the first dimension; nothing where the operator runs whole."""
        if self._is_whole(at.out_box):
            return self._indices(at)
        return 3 * at.out_bytes + (2 if self.itemsize > 2 else 3) * at.in_bytes[0]

    def vjp_scratch(self, at: Extent) -> int:
        """Forward again, and gradients of the slices."""
        if self._is_whole(at.out_box):
            return at.out_bytes + self._indices(at)
        return 4 * at.out_bytes + (4 if self.itemsize > 2 else 6) * at.in_bytes[0]

    def _is_whole(self, out_box: Box) -> bool:
        lead = len(out_box) - len(self.sizes[0])
        return all(box == (0, n) for box, n in zip(out_box[lead:], self.sizes[1], strict=True))

    def _indices(self, at: Extent) -> int:
        """Indices (64-bit) of a maximum."""
        return 0 if self.average else at.out_bytes * 8 // self.itemsize

    def bind(self, out_box: Box, in_boxes: Sequence[Box]) -> Local:
        """Mean or maximum over each window."""
        lead = len(out_box) - len(self.sizes[0])
        if self._is_whole(out_box):
            return self.whole
        plan = []
        for i, (size, out) in enumerate(zip(*self.sizes, strict=True)):
            base = in_boxes[0][lead + i][0]
            windows = []
            for o in range(*out_box[lead + i]):
                start, stop = o * size // out, -(-(o + 1) * size // out)
                windows.append((start - base, stop - start))
            if size != out:  # else each window is its own place
                plan.append((lead + i, windows))
        average = self.average

        def local(x: Tensor) -> Tensor:
            for dim, windows in reversed(plan):  # of equal ones the first in memory is the maximum
                pieces = [x.narrow(dim, start, length) for start, length in windows]
                x = torch.cat([p.mean(dim, True) if average else _window(p, dim, False) for p in pieces], dim)
            return x if plan else x.clone()

        return local
