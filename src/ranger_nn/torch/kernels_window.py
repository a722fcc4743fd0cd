"""Kernels with a window: convolution, transposed convolution, pooling.

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
from ranger_nn.torch.kernels import Kernel, Local, table
from ranger_nn.torch.layout import channels_last, dense

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


SMALL = 192 << 10
"""Bytes that oneDNN may take on small regions, whatever their size."""

WINOGRAD = 640 << 10
"""The same where it may choose Winograd's algorithm (windows of 3, stride 1), for each matrix that it transforms."""


class Convolving(Kernel):
    """What both convolutions share: the copies that oneDNN makes, and a bias's gradient."""

    layout = "makes"

    def _copied(self, at: Extent) -> int:
        """Bytes of the input made channels-last, or made contiguous where its region is not."""
        return 0 if self.channels_last and self.reads_channels_last and dense(at.reads[0]) else at.in_bytes[0]

    def _copied_gradient(self, at: Extent) -> int:
        """The same of the output's gradient, which comes last among what backward reads."""
        return 0 if self.channels_last and dense(at.reads[-1]) and not self.given else at.out_bytes

    @staticmethod
    def _bias_gradient(grad: Tensor) -> Tensor:
        """PyTorch sums in a cascade; oneDNN's running sum loses three digits over a million pixels."""
        return grad.sum([0, *range(2, grad.dim())])


class Convolution(Convolving):
    """Convolution in 1, 2 or 3 dimensions; backward by `convolution_backward`, without running forward again."""

    def __init__(
        self, stride: Ints, padding: Ints, dilation: Ints, groups: int, reaches: Sequence[Reach], bias: bool
    ) -> None:
        """Integers as in `torch.nn.functional.conv*d`, one for each windowed dimension."""
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.reaches, self.bias = reaches, bias
        self.channels: tuple[int, int] = (16, 16)
        self.columns = 0
        self.point = False
        self.winograd = False

    def _blocked(self, at: Extent) -> tuple[int, int]:
        """Bytes of input and output with channels padded to sixteens; `columns`: unfolded input (float64)."""
        if self.columns:
            return at.in_bytes[0] * self.columns, 0
        c_in, c_out = self.channels
        c_in = c_in if c_in > 3 or self.channels_last else 16
        return -(-c_in // 16) * 16 * at.in_bytes[0] // c_in, -(-c_out // 16) * 16 * at.out_bytes // c_out

    def _padded(self, at: Extent) -> int:
        """Bytes of the input with its border filled on the spot; 0 where the operator pads by itself."""
        _, extra = self._geometry(at.out_box, at.reads[0].box)
        return padded_bytes(at, extra)

    def _weights(self, at: Extent, copies: int) -> int:
        """Weights reordered (those of a convolution of size 1 once less), and small buffers."""
        small = min(6 * (at.in_bytes[0] + at.out_bytes), SMALL if not self.winograd else copies * WINOGRAD)
        return small + (copies - (self.point and self.channels_last)) * sum(at.in_bytes[1:])

    def scratch(self, at: Extent) -> int:
        """Channels-last: what is copied, and the weights reordered. Else oneDNN's blocked copies as well."""
        weights = self._weights(at, 2)
        if self.channels_last:
            return self._padded(at) + self._copied(at) + weights
        blocked_in, blocked_out = self._blocked(at)
        copy = at.in_bytes[0] if len(at.reads[0].parts) == 1 and at.reads[0].parts[0][1] else 0
        return self._padded(at) + copy + max(blocked_in + max(0, blocked_out - at.out_bytes), blocked_out) + weights

    def vjp_scratch(self, at: Extent) -> int:
        """Copies of the input and of the output's gradient where they are not in order, and the weights'."""
        weights = self._weights(at, 3)
        border = 2 * self._padded(at)
        if self.channels_last:
            if at.wanted[0] and self.channels[0] % 8 and self.channels[1] % 8 == 0:
                border += sum(self._blocked(at))  # oneDNN has no plain gradient for these
            copy = self._copied(at) if at.reads[0].parts else 0
            return border + copy + self._copied_gradient(at) + weights
        blocked_in, blocked_out = self._blocked(at)
        return border + at.in_bytes[0] + 2 * blocked_in + blocked_out + at.out_bytes + weights

    def _geometry(self, out_box: Box, in_box: Box) -> tuple[list[int], list[int]]:
        lead = len(out_box) - len(self.reaches)
        return split_padding(borders(out_box, in_box, self.reaches, lead), self.padding)

    def bind(self, out_box: Box, in_boxes: Sequence[Box]) -> Local:
        """F.pad where the border is uneven, then the convolution."""
        own, extra = self._geometry(out_box, in_boxes[0])
        stride, dilation, groups = list(self.stride), list(self.dilation), self.groups
        conv = (torch.conv1d, torch.conv2d, torch.conv3d)[len(stride) - 1]
        order = channels_last if self.channels_last else _as_it_is

        def local(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            if extra:
                x = F.pad(x, extra)
            return conv(order(x), weight, bias, stride, own, dilation, groups)

        return local

    def bind_vjp(self, out_box: Box, in_boxes: Sequence[Box], wanted: Sequence[bool]) -> Local:
        """Gradients of input, weight and bias from the input and the output's gradient."""
        own, extra = self._geometry(out_box, in_boxes[0])
        cuts = [-n for n in extra]
        stride, dilation, groups, bias = list(self.stride), list(self.dilation), self.groups, self.bias
        mask = [wanted[0], wanted[1], False]
        zeros = [0] * len(stride)
        generic = super().bind_vjp(out_box, in_boxes, wanted)
        order = channels_last if self.channels_last else _as_it_is
        reads_input = wanted[1]

        def vjp(*args: Any) -> list[Any]:
            *xs, grad = args
            if torch.is_autocast_enabled(grad.device.type):
                return generic(*args)
            x, weight = xs[0], xs[1]
            if extra:
                x = F.pad(x, extra)
            if reads_input:
                x = order(x)
            gx, gw, _ = torch.ops.aten.convolution_backward(
                order(grad), x, weight, None, stride, own, dilation, False, zeros, groups, mask
            )
            if wanted[0] and extra:
                gx = F.pad(gx, cuts)
            return [gx, gw, self._bias_gradient(grad) if wanted[2] else None] if bias else [gx, gw]

        return vjp


def _as_it_is(x: Tensor) -> Tensor:
    return x


class TransposedConvolution(Convolving):
    """Transposed convolution: run on the local input without padding, keep the part of the output asked for."""

    def __init__(
        self,
        stride: Ints,
        padding: Ints,
        output_padding: Ints,
        dilation: Ints,
        groups: int,
        kernel: Ints,
        sizes: tuple[Ints, Ints],
        bias: bool,
    ) -> None:
        """Integers as in `torch.nn.functional.conv_transpose*d`; `sizes`: whole (input, output) spatial sizes."""
        self.stride, self.padding, self.output_padding = stride, padding, output_padding
        self.dilation, self.groups, self.kernel, self.sizes, self.bias = dilation, groups, kernel, sizes, bias

    def scratch(self, at: Extent) -> int:
        """oneDNN's reordered input, its result where windows overlap or it is cropped, copies of input and weights."""
        spread = self._spread(at, at.out_bytes if self.kernel != self.stride else 0)
        return spread + self._copied(at) + 2 * at.in_bytes[0] + 2 * sum(at.in_bytes[1:]) + self._small(at)

    def vjp_scratch(self, at: Extent) -> int:
        """The gradient padded to what was cropped, and copies of input and weights."""
        spread = self._spread(at, self._copied_gradient(at))
        return spread + self._copied(at) + 3 * sum(at.in_bytes[1:]) + self._small(at)

    def _spread(self, at: Extent, least: int) -> int:
        """Bytes of the output before it is cropped; `least` where it is not."""
        for _, _, length, total in self._geometry(at.out_box, at.reads[0].box)[3]:
            least = max(least, at.out_bytes) * total // max(1, length)
        return least

    def _small(self, at: Extent) -> int:
        return min(4 * (at.in_bytes[0] + at.out_bytes), SMALL)

    def _geometry(
        self, out_box: Box, in_box: Box
    ) -> tuple[list[int], list[int], list[tuple[int, int]], list[tuple[int, int, int, int]]]:
        """(padding, output padding, zeros to add to an empty input, crops (dim, start, length, of length))."""
        lead = len(out_box) - len(self.stride)
        padding, extra, crops, fills = [], [], [], []
        for i, (s, p, op, d, k) in enumerate(
            zip(self.stride, self.padding, self.output_padding, self.dilation, self.kernel, strict=True)
        ):
            (a, b), (lo, hi) = out_box[lead + i], in_box[lead + i]
            if (a, b, lo, hi) == (0, self.sizes[1][i], 0, self.sizes[0][i]):
                padding.append(p)
                extra.append(op)
                continue
            fill = 1 if hi == lo else 0
            hi += fill
            begin = lo * s - p
            natural = (hi - lo - 1) * s + d * (k - 1) + 1
            padding.append(0)
            extra.append(max(0, b - begin - natural))
            length = natural + extra[-1]
            if fill:
                fills.append((lead + i, fill))
            if (a - begin, b - a) != (0, length):
                crops.append((lead + i, a - begin, b - a, length))
        return padding, extra, fills, crops

    def bind(self, out_box: Box, in_boxes: Sequence[Box]) -> Local:
        """The transposed convolution of the region, cropped."""
        padding, extra, fills, crops = self._geometry(out_box, in_boxes[0])
        stride, dilation, groups = list(self.stride), list(self.dilation), self.groups
        conv = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)[len(stride) - 1]
        rank = len(out_box)
        order = channels_last if self.channels_last else _as_it_is

        def local(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            for dim, count in fills:
                x = F.pad(x, [0, 0] * (rank - 1 - dim) + [0, count])
            y = conv(order(x), weight, bias, stride, padding, extra, groups, dilation)
            for dim, start, length, _ in crops:
                y = y.narrow(dim, start, length)
            return y.clone() if crops else y

        return local

    def bind_vjp(self, out_box: Box, in_boxes: Sequence[Box], wanted: Sequence[bool]) -> Local:
        """Gradients of input, weight and bias; the gradient is zero where the output was cropped."""
        padding, extra, fills, crops = self._geometry(out_box, in_boxes[0])
        stride, dilation, groups, bias = list(self.stride), list(self.dilation), self.groups, self.bias
        mask = [wanted[0], wanted[1], False]
        pads = [0] * (2 * len(out_box))
        for dim, start, length, total in crops:
            place = 2 * (len(out_box) - 1 - dim)
            pads[place : place + 2] = [start, total - start - length]
        generic = super().bind_vjp(out_box, in_boxes, wanted)
        order = channels_last if self.channels_last else _as_it_is

        def vjp(*args: Any) -> list[Any]:
            *xs, grad = args
            if fills or torch.is_autocast_enabled(grad.device.type):
                return generic(*args)
            padded = F.pad(grad, pads) if crops else grad
            gx, gw, _ = torch.ops.aten.convolution_backward(
                order(padded), order(xs[0]), xs[1], None, stride, padding, dilation, True, extra, groups, mask
            )
            return [gx, gw, self._bias_gradient(grad) if wanted[2] else None] if bias else [gx, gw]

        return vjp


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

    def scratch(self, at: Extent) -> int:
        """Indices (64-bit) of a maximum, a padded copy of the input where its border is filled on the spot."""
        return self._indices(at) + self._padded(at)

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
        return at.out_bytes + self._indices(at) + self._padded(at)

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
    return x.max(dim, keepdim=True).values if x.shape[dim] else x.sum(dim, keepdim=True) - float("inf")


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
        return 3 * at.out_bytes + 2 * at.in_bytes[0]

    def vjp_scratch(self, at: Extent) -> int:
        """Forward again, and gradients of the slices."""
        if self._is_whole(at.out_box):
            return at.out_bytes + self._indices(at)
        return 4 * at.out_bytes + 4 * at.in_bytes[0]

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
            plan.append((lead + i, windows))
        average = self.average

        def local(x: Tensor) -> Tensor:
            for dim, windows in reversed(plan):  # of equal ones the first in memory is the maximum
                pieces = [x.narrow(dim, start, length) for start, length in windows]
                if average:
                    x = torch.cat([p.mean(dim, keepdim=True) for p in pieces], dim)
                else:
                    x = torch.cat([p.max(dim, keepdim=True).values for p in pieces], dim)
            return x

        return local
