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

import torch
from torch import Tensor
from torch.nn import functional as F

from ranger_nn.core.reach import Box, Reach
from ranger_nn.torch.kernels import Kernel, Local

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


class Convolution(Kernel):
    """Convolution in 1, 2 or 3 dimensions; backward by `convolution_backward`, without running forward again."""

    def __init__(
        self, stride: Ints, padding: Ints, dilation: Ints, groups: int, reaches: Sequence[Reach], bias: bool
    ) -> None:
        """Integers as in `torch.nn.functional.conv*d`, one for each windowed dimension."""
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.reaches, self.bias = reaches, bias
        self.channels: tuple[int, int] = (16, 16)
        self.columns = 0

    def _blocked(self, out_bytes: int, in_bytes: Sequence[int]) -> tuple[int, int]:
        """Bytes of input and output with channels padded to sixteens; `columns`: unfolded input (float64)."""
        if self.columns:
            return in_bytes[0] * self.columns, 0
        c_in, c_out = self.channels
        return -(-c_in // 16) * 16 * in_bytes[0] // c_in, -(-c_out // 16) * 16 * out_bytes // c_out

    def scratch(self, out_bytes: int, in_bytes: Sequence[int], joined: bool) -> int:
        """A contiguous or padded copy of the input, and oneDNN's blocked copies (channels in sixteens)."""
        blocked_in, blocked_out = self._blocked(out_bytes, in_bytes)
        copy = 0 if joined else in_bytes[0]
        return copy + max(blocked_in + max(0, blocked_out - out_bytes), blocked_out) + 2 * sum(in_bytes[1:])

    def vjp_scratch(self, out_bytes: int, in_bytes: Sequence[int], joined: bool) -> int:
        """Copies of the input and of the output's gradient, plain and blocked, and the blocked input gradient."""
        blocked_in, blocked_out = self._blocked(out_bytes, in_bytes)
        return in_bytes[0] + 2 * blocked_in + blocked_out + out_bytes + 4 * sum(in_bytes[1:])

    def _geometry(self, out_box: Box, in_box: Box) -> tuple[list[int], list[int]]:
        lead = len(out_box) - len(self.reaches)
        return split_padding(borders(out_box, in_box, self.reaches, lead), self.padding)

    def bind(self, out_box: Box, in_boxes: Sequence[Box]) -> Local:
        """F.pad where the border is uneven, then the convolution."""
        own, extra = self._geometry(out_box, in_boxes[0])
        stride, dilation, groups = list(self.stride), list(self.dilation), self.groups
        conv = (torch.conv1d, torch.conv2d, torch.conv3d)[len(stride) - 1]

        def local(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            if extra:
                x = F.pad(x, extra)
            return conv(x, weight, bias, stride, own, dilation, groups)

        return local

    def bind_vjp(self, out_box: Box, in_boxes: Sequence[Box], wanted: Sequence[bool]) -> Local:
        """Gradients of input, weight and bias from the input and the output's gradient."""
        own, extra = self._geometry(out_box, in_boxes[0])
        cuts = [-n for n in extra]
        stride, dilation, groups, bias = list(self.stride), list(self.dilation), self.groups, self.bias
        mask = [wanted[0], wanted[1], bias and wanted[2]]
        zeros = [0] * len(stride)
        generic = super().bind_vjp(out_box, in_boxes, wanted)

        def vjp(*args: Any) -> list[Any]:
            *xs, grad = args
            if torch.is_autocast_enabled(grad.device.type):
                return generic(*args)
            x, weight = xs[0], xs[1]
            if extra:
                x = F.pad(x, extra)
            gx, gw, gb = torch.ops.aten.convolution_backward(
                grad, x, weight, [weight.shape[0]] if bias else None, stride, own, dilation, False, zeros, groups, mask
            )
            if wanted[0] and extra:
                gx = F.pad(gx, cuts)
            return [gx, gw, gb] if bias else [gx, gw]

        return vjp


class TransposedConvolution(Kernel):
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
    ) -> None:
        """Integers as in `torch.nn.functional.conv_transpose*d`; `sizes`: whole (input, output) spatial sizes."""
        self.stride, self.padding, self.output_padding = stride, padding, output_padding
        self.dilation, self.groups, self.kernel, self.sizes = dilation, groups, kernel, sizes

    def scratch(self, out_bytes: int, in_bytes: Sequence[int], joined: bool) -> int:
        """The output before it is cropped, and a contiguous copy of the input."""
        return int(out_bytes * 0.5) + in_bytes[0]

    def bind(self, out_box: Box, in_boxes: Sequence[Box]) -> Local:
        """The transposed convolution of the region, cropped."""
        lead = len(out_box) - len(self.stride)
        padding, extra, crops, fills = [], [], [], []
        for i, (s, p, op, d, k) in enumerate(
            zip(self.stride, self.padding, self.output_padding, self.dilation, self.kernel, strict=True)
        ):
            (a, b), (lo, hi) = out_box[lead + i], in_boxes[0][lead + i]
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
                crops.append((lead + i, a - begin, b - a))
        stride, dilation, groups = list(self.stride), list(self.dilation), self.groups
        conv = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)[len(stride) - 1]
        rank = len(out_box)

        def local(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            for dim, count in fills:
                x = F.pad(x, [0, 0] * (rank - 1 - dim) + [0, count])
            y = conv(x, weight, bias, stride, padding, extra, groups, dilation)
            for dim, start, length in crops:
                y = y.narrow(dim, start, length)
            return y

        return local

    def bind_vjp(self, out_box: Box, in_boxes: Sequence[Box], wanted: Sequence[bool]) -> Local:
        """Generic, but forward runs again on the region."""
        return super().bind_vjp(out_box, in_boxes, wanted)


class Pooling(Kernel):
    """Maximum or average pooling; `whole` is the untouched call, used where no dimension is cut."""

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

    def scratch(self, out_bytes: int, in_bytes: Sequence[int], joined: bool) -> int:
        """Indices (64-bit) of a maximum, or a padded copy of the input."""
        return 2 * out_bytes + int(in_bytes[0] * 1.1)

    def vjp_scratch(self, out_bytes: int, in_bytes: Sequence[int], joined: bool) -> int:
        """Forward again: output, indices, padded input and its gradient."""
        return 4 * out_bytes + int(in_bytes[0] * 2.2)

    def bind(self, out_box: Box, in_boxes: Sequence[Box]) -> Local:
        """The untouched call, or one on a region with its border filled."""
        lead = len(out_box) - len(self.reaches)
        if all(box == (0, n) for box, n in zip(out_box[lead:], self.sizes[1], strict=True)):
            return self.whole
        missing = borders(out_box, in_boxes[0], self.reaches, lead)
        own, extra = split_padding(missing, self.padding)
        if self.average:
            return self._average(out_box, lead, own, extra)
        pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(self.kernel) - 1]
        kernel, stride, dilation = self.kernel, self.stride, self.dilation

        def local(x: Tensor) -> Tensor:
            if extra:
                x = F.pad(x, extra, value=float("-inf"))
            return pool(x, kernel, stride, own, dilation)

        return local

    def _average(self, out_box: Box, lead: int, own: list[int], extra: list[int]) -> Local:
        pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(self.kernel) - 1]
        kernel, stride, rank = self.kernel, self.stride, len(out_box)
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
            scales.append(self._scales(i, out_box[lead + i], k))
        divisor = self.divisor

        def local(x: Tensor) -> Tensor:
            y = pool(F.pad(x, pads), kernel, stride)
            if divisor is not None:
                return y * (total / divisor)
            for i, scale in enumerate(scales):
                shape = [1] * rank
                shape[lead + i] = len(scale)
                y = y * torch.tensor(scale, dtype=y.dtype, device=y.device).view(shape)
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


class AdaptivePooling(Kernel):
    """Adaptive pooling by windows that vary: separable, one dimension after the other."""

    def __init__(self, whole: Callable[[Tensor], Tensor], average: bool, sizes: tuple[Ints, Ints]) -> None:
        """`sizes`: whole (input, output) spatial sizes."""
        self.whole, self.average, self.sizes = whole, average, sizes

    def scratch(self, out_bytes: int, in_bytes: Sequence[int], joined: bool) -> int:
        """The result after the first dimension."""
        return 3 * out_bytes + 2 * in_bytes[0]

    def vjp_scratch(self, out_bytes: int, in_bytes: Sequence[int], joined: bool) -> int:
        """Forward again, and gradients of the slices."""
        return 4 * out_bytes + 4 * in_bytes[0]

    def bind(self, out_box: Box, in_boxes: Sequence[Box]) -> Local:
        """Mean or maximum over each window."""
        lead = len(out_box) - len(self.sizes[0])
        if all(box == (0, n) for box, n in zip(out_box[lead:], self.sizes[1], strict=True)):
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
            for dim, windows in plan:
                pieces = [x.narrow(dim, start, length) for start, length in windows]
                if average:
                    x = torch.cat([p.mean(dim, keepdim=True) for p in pieces], dim)
                else:
                    x = torch.cat([p.max(dim, keepdim=True).values for p in pieces], dim)
            return x

        return local
