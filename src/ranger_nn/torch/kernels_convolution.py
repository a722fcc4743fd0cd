"""Kernels of convolutions, plain and transposed: the call on a region, its gradients, and what both take.

Where PyTorch would unfold a small call oneDNN is called in its place: less memory, and several times faster on slabs of
volumes (`workspace.py` has the rule). Its gradients then are the other convolution, and a matrix product for each place
of the window. Enter at `Convolution` and `TransposedConvolution`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ranger_nn.core.program import Extent
from ranger_nn.core.reach import Box, Reach
from ranger_nn.torch.kernels import Kernel, Local, lengths
from ranger_nn.torch.kernels_window import Ints, borders, padded_bytes, split_padding
from ranger_nn.torch.layout import channels_last, dense
from ranger_nn.torch.workspace import Convolved


class Convolving(Kernel):
    """What both convolutions share: sizes of a call, the copies made for it, and a bias's gradient."""

    layout = "makes"

    stride: Ints
    dilation: Ints
    groups: int
    bias: bool

    channels: tuple[int, int] = (16, 16)
    """Channels of the whole input and output."""

    window: Ints = ()
    """Sizes of the kernel."""

    computes: torch.dtype = torch.float32
    """The type that is convolved in: autocast's where it is on, whatever the input's."""

    on_cpu = True
    """Elsewhere PyTorch chooses."""

    plain = False
    """Whether the weights are in their usual order, not channels-last."""

    def _cast(self, at: Extent) -> tuple[int, int]:
        """Bytes of input and weights in autocast's type; 0 of those that are of it: an input often is, weights rarely."""
        wide = self.computes.itemsize
        x, *others = (0 if own == wide else n * wide // own for n, own in zip(at.in_bytes, self.itemsizes, strict=True))
        return x, sum(others)

    def _copied(self, at: Extent) -> int:
        """Bytes of the input made channels-last, or made contiguous where its region is not."""
        return 0 if self.channels_last and self.reads_channels_last and dense(at.reads[0]) else at.in_bytes[0]

    def _copied_gradient(self, at: Extent) -> int:
        """The same of the output's gradient, which comes last among what backward reads."""
        return 0 if self.channels_last and dense(at.reads[-1]) and not self.given else at.out_bytes

    def _called(self, out_box: Box, in_box: Box) -> Convolved:
        """The call for a region, in the order of channels that takes less."""
        called = self._sizes(out_box, in_box)
        plain = replace(called, channels_last=False)
        small = self.channels_last and self.on_cpu and called.weights > called.x + called.y
        return plain if small and 2 * (called.x + called.y) + plain.forward() < called.forward() else called

    def _called_back(self, out_box: Box, in_box: Box) -> Convolved:
        """The same for backward: channels-last, oneDNN makes a block of each channel's weights where it has no kernel."""
        called = self._called(out_box, in_box)
        known = set(called.kernel) == {3} and called.dtype == torch.float32 and max(called.dilation) == 1
        known &= min(called.outer) > 2
        return called if known or not called.depthwise else replace(called, channels_last=False)

    def _sizes(self, out_box: Box, in_box: Box) -> Convolved:
        """Sizes of the call for a region."""
        raise NotImplementedError

    def _orders(self, called: Convolved) -> tuple[Local, Local]:
        """How the call's arguments are to be ordered, and its result: large weights on a small map are not reordered."""
        if called.channels_last == self.channels_last:
            order = channels_last if self.channels_last else _as_it_is
            return order, _as_it_is
        return torch.Tensor.contiguous, channels_last

    def _turned(self, called: Convolved) -> int:
        """Bytes of arguments and result ordered so."""
        return 0 if called.channels_last == self.channels_last else called.x + called.y

    def _generic(self, at: Extent, called: Convolved) -> int:
        """Under autocast backward is autograd's: casts, forward again, and gradients in the type convolved in."""
        return 2 * sum(self._cast(at)) + at.out_bytes + called.forward() + 2 * at.in_bytes[0]

    def _directly(self, called: Convolved) -> bool:
        """Whether oneDNN is called in PyTorch's place."""
        return self.on_cpu and set(self.itemsizes) == {self.computes.itemsize} and called.direct

    @staticmethod
    def _weight_gradient(found: Tensor | None) -> Tensor | None:
        """In the order of the weights: autograd would copy it into that when all of backward is in memory."""
        return None if found is None else found.contiguous()

    @staticmethod
    def _bias_gradient(grad: Tensor) -> Tensor:
        """PyTorch sums in a cascade; oneDNN's running sum loses three digits over a million pixels."""
        return grad.sum([0, *range(2, grad.dim())])


class Convolution(Convolving):
    """Convolution in 1, 2 or 3 dimensions; backward by `convolution_backward`, without running forward again."""

    shift_invariant = True

    def __init__(
        self, stride: Ints, padding: Ints, dilation: Ints, groups: int, reaches: Sequence[Reach], bias: bool
    ) -> None:
        """Integers as in `torch.nn.functional.conv*d`, one for each windowed dimension."""
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.reaches, self.bias = reaches, bias

    def _sizes(self, out_box: Box, in_box: Box) -> Convolved:
        own, _ = self._geometry(out_box, in_box)
        lead = len(out_box) - len(self.reaches)
        needs = (r.needs(*o) for r, o in zip(self.reaches, out_box[lead:], strict=True))
        inner = tuple(hi - lo - 2 * p for (lo, hi), p in zip(needs, own, strict=True))
        batch, *outer = lengths((out_box[0], *out_box[lead:]))
        return Convolved(
            batch, self.channels, inner, tuple(outer), self.window, self.stride, tuple(own), self.dilation, self.groups,
            dtype=self.computes, channels_last=self.channels_last,
            plain=self.plain,
        )  # fmt: skip

    def _padded(self, at: Extent) -> int:
        """Bytes of the input with its border filled on the spot; 0 where the operator pads by itself."""
        _, extra = self._geometry(at.out_box, at.reads[0].box)
        return padded_bytes(at, extra)

    def scratch(self, at: Extent) -> int:
        """The border filled, what is copied or cast, and what the convolution takes itself."""
        copied = (
            self._copied(at) if self.channels_last or (len(at.reads[0].parts) == 1 and at.reads[0].parts[0][1]) else 0
        )
        called = self._called(at.out_box, at.reads[0].box)
        return self._padded(at) + copied + self._turned(called) + sum(self._cast(at)) + called.forward()

    def vjp_scratch(self, at: Extent) -> int:
        """Copies of the input and of the output's gradient where they are not in order, and what backward takes."""
        called = self._called_back(at.out_box, at.reads[0].box)
        if not at.wanted[1]:  # the input is not read: PyTorch copies what stands in for it, and takes its order
            called = replace(called, channels_last=False)
        copied = self._copied(at) if at.reads[0].parts else called.x
        border = 2 * self._padded(at) + copied + self._copied_gradient(at) + 2 * self._turned(called)
        if sum(self._cast(at)):
            border += self._generic(at, called)
        return border + called.backward(at.wanted)

    def _geometry(self, out_box: Box, in_box: Box) -> tuple[list[int], list[int]]:
        lead = len(out_box) - len(self.reaches)
        return split_padding(borders(out_box, in_box, self.reaches, lead), self.padding)

    def bind(self, out_box: Box, in_boxes: Sequence[Box]) -> Local:
        """F.pad where the border is uneven, then the convolution."""
        own, extra = self._geometry(out_box, in_boxes[0])
        stride, dilation, groups = list(self.stride), list(self.dilation), self.groups
        conv = (torch.conv1d, torch.conv2d, torch.conv3d)[len(stride) - 1]
        called = self._called(out_box, in_boxes[0])
        order, back = self._orders(called)
        direct = self._directly(called)

        def local(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            if extra:
                x = F.pad(x, extra)
            if direct:
                return back(torch.ops.aten.mkldnn_convolution(order(x), weight, bias, own, stride, dilation, groups))
            return back(conv(order(x), weight, bias, stride, own, dilation, groups))

        return local

    def bind_vjp(self, out_box: Box, in_boxes: Sequence[Box], wanted: Sequence[bool]) -> Local:
        """Gradients of input, weight and bias from the input and the output's gradient."""
        own, extra = self._geometry(out_box, in_boxes[0])
        cuts = [-n for n in extra]
        stride, dilation, groups, bias = list(self.stride), list(self.dilation), self.groups, self.bias
        generic = super().bind_vjp(out_box, in_boxes, wanted)
        reads_input = wanted[1]
        called = self._called_back(out_box, in_boxes[0])
        order, back = self._orders(called)
        pull = pull_directly(called) if self._directly(called) else torch.ops.aten.convolution_backward
        zeros, mask = [0] * len(stride), [wanted[0], wanted[1], False]

        def vjp(*args: Any) -> list[Any]:
            *xs, grad = args
            if torch.is_autocast_enabled(grad.device.type):
                return generic(*args)
            x, weight = xs[0], xs[1]
            if extra:
                x = F.pad(x, extra)
            if reads_input:
                x = order(x)
            gx, gw, _ = pull(order(grad), x, weight, None, stride, own, dilation, False, zeros, groups, mask)
            if wanted[0]:
                gx = back(F.pad(gx, cuts) if extra else gx)
            gw = self._weight_gradient(gw)
            return [gx, gw, self._bias_gradient(grad) if wanted[2] else None] if bias else [gx, gw]

        return vjp


def _as_it_is(x: Tensor) -> Tensor:
    return x


def transpose_directly(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    extra: list[int],
    groups: int,
    dilation: list[int],
) -> Tensor:
    """oneDNN's transposed convolution, with the arguments of `torch.conv_transpose*d`."""
    return torch.ops.mkldnn._convolution_transpose_pointwise(
        x, weight, bias, padding, extra, stride, dilation, groups, "none", [], ""
    )


def pull_directly(called: Convolved) -> Local:
    """Gradients by oneDNN, with the arguments of `convolution_backward`: the input's is the other convolution."""
    extra = list(called.rest)

    def pull(
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        _: None,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        transposed: bool,
        __: list[int],
        groups: int,
        mask: Sequence[bool],
    ) -> tuple[Tensor | None, Tensor | None, None]:
        gx = gw = None
        if mask[0] and transposed:
            gx = torch.ops.aten.mkldnn_convolution(grad, weight, None, padding, stride, dilation, groups)
        elif mask[0]:
            gx = transpose_directly(grad, weight, None, stride, padding, extra, groups, dilation)
        if mask[1]:
            gw = weight_gradient(*((grad, x) if transposed else (x, grad)), called.kernel, stride, padding, dilation)
        return gx, gw, None

    return pull


CHUNK = 1024
"""Rows of a thin product summed at a time: with a single channel the library's running sum loses two digits."""


def _product(rows: Tensor, columns: Tensor, out: Tensor) -> None:
    """rows.T @ columns, in chunks where one of them is thin."""
    count = len(rows) // CHUNK if min(out.shape) < 8 else 0
    if not count:
        torch.mm(rows.t(), columns, out=out)
        return
    head = count * CHUNK
    torch.sum(rows[:head].view(count, CHUNK, -1).mT @ columns[:head].view(count, CHUNK, -1), 0, out=out)
    out.addmm_(rows[head:].t(), columns[head:])


def weight_gradient(
    x: Tensor, grad: Tensor, kernel: Ints, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """Gradient of a convolution's weights: a matrix product for each place of the window, nothing unfolded."""
    found = x.new_zeros(prod(kernel), grad.shape[1], x.shape[1])
    for out, place in zip(found, product(*map(range, kernel)), strict=True):
        at, by = x, grad
        for i, (k, s, p, d) in enumerate(zip(place, stride, padding, dilation, strict=True)):
            lo = max(0, -((d * k - p) // s))
            hi = min(grad.shape[2 + i], (x.shape[2 + i] - 1 + p - d * k) // s + 1)
            by = by.narrow(2 + i, lo, max(0, hi - lo))
            start = min(max(0, lo * s - p + d * k), x.shape[2 + i])
            at = at.narrow(2 + i, start, max(0, min((hi - lo - 1) * s + 1, x.shape[2 + i] - start)))
            at = at[(slice(None),) * (2 + i) + (slice(None, None, s),)]
        rows, columns = (t.movedim(1, -1).reshape(-1, t.shape[1]) for t in (by, at))
        _product(rows, columns, out)
        del rows, columns, at, by  # or the next place's would be made beside them
    return found.view(*kernel, grad.shape[1], x.shape[1]).movedim((-2, -1), (0, 1)).contiguous()


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
        self.dilation, self.groups, self.window, self.sizes, self.bias = dilation, groups, kernel, sizes, bias

    def _sizes(self, out_box: Box, in_box: Box) -> Convolved:
        padding, extra, fills, _ = self._geometry(out_box, in_box)
        lead = len(out_box) - len(self.stride)
        inner = [hi - lo for lo, hi in in_box[lead:]]
        for dim, count in fills:
            inner[dim - lead] += count
        outer = tuple(
            (n - 1) * s - 2 * p + d * (k - 1) + 1 + e
            for n, s, p, d, k, e in zip(inner, self.stride, padding, self.dilation, self.window, extra, strict=True)
        )
        batch = lengths(out_box[:1])[0]
        return Convolved(
            batch, self.channels, tuple(inner), outer, self.window, self.stride, tuple(padding), self.dilation,
            self.groups, True, tuple(extra), self.computes, self.channels_last, self.plain,
        )  # fmt: skip

    def scratch(self, at: Extent) -> int:
        """Copies of the input, the output before it is cropped, and what the convolution takes itself."""
        in_box = at.reads[0].box
        _, _, fills, crops = self._geometry(at.out_box, in_box)
        called = self._called(at.out_box, in_box)
        spread = (called.y if crops else 0) + (called.x if fills else 0)
        return spread + self._copied(at) + self._turned(called) + sum(self._cast(at)) + called.forward()

    def vjp_scratch(self, at: Extent) -> int:
        """The gradient padded to what was cropped, copies of input and gradient, and what backward takes."""
        in_box = at.reads[0].box
        _, _, fills, crops = self._geometry(at.out_box, in_box)
        called = self._called(at.out_box, in_box)
        spread = self._copied_gradient(at) + (called.y * (2 if self.given else 1) if crops else 0)
        spread += called.y if any(called.extra) else 0
        if sum(self._cast(at)) or fills:
            spread += self._generic(at, called)
        return spread + 2 * self._turned(called) + self._copied(at) + called.backward(at.wanted)

    def _geometry(
        self, out_box: Box, in_box: Box
    ) -> tuple[list[int], list[int], list[tuple[int, int]], list[tuple[int, int, int, int]]]:
        """(padding, output padding, zeros to add to an empty input, crops (dim, start, length, of length))."""
        lead = len(out_box) - len(self.stride)
        padding, extra, crops, fills = [], [], [], []
        for i, (s, p, op, d, k) in enumerate(
            zip(self.stride, self.padding, self.output_padding, self.dilation, self.window, strict=True)
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
        conv: Local = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)[len(stride) - 1]
        rank = len(out_box)
        called = self._called(out_box, in_boxes[0])
        order, back = self._orders(called)
        if self._directly(called):
            conv = transpose_directly

        def local(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            for dim, count in fills:
                x = F.pad(x, [0, 0] * (rank - 1 - dim) + [0, count])
            y = conv(order(x), weight, bias, stride, padding, extra, groups, dilation)
            for dim, start, length, _ in crops:
                y = y.narrow(dim, start, length)
            return back(y.clone() if crops else y)

        return local

    def bind_vjp(self, out_box: Box, in_boxes: Sequence[Box], wanted: Sequence[bool]) -> Local:
        """Gradients of input, weight and bias; the gradient is zero where the output was cropped."""
        padding, extra, fills, crops = self._geometry(out_box, in_boxes[0])
        stride, dilation, groups, bias = list(self.stride), list(self.dilation), self.groups, self.bias
        mask = [wanted[0], wanted[1], False]
        # Rows added past what the padding took off are reached by no window, and oneDNN may write past its end there.
        beyond = [max(0, more - p) for more, p in zip(extra, padding, strict=True)]
        reached = [more - none for more, none in zip(extra, beyond, strict=True)]
        pads = [0] * (2 * len(out_box))
        for dim, start, length, total in crops:
            place = 2 * (len(out_box) - 1 - dim)
            pads[place : place + 2] = [start, total - start - length]
        generic = super().bind_vjp(out_box, in_boxes, wanted)
        called = self._called(out_box, in_boxes[0])
        order, back = self._orders(called)
        pull = pull_directly(called) if self._directly(called) else torch.ops.aten.convolution_backward

        def vjp(*args: Any) -> list[Any]:
            *xs, grad = args
            if fills or torch.is_autocast_enabled(grad.device.type):
                return generic(*args)
            padded = F.pad(grad, pads) if crops else grad
            for i, more in enumerate(beyond):
                padded = padded.narrow(2 + i, 0, padded.shape[2 + i] - more)
            gx, gw, _ = pull(
                order(padded), order(xs[0]), xs[1], None, stride, padding, dilation, True, reached, groups, mask
            )
            gx = back(gx) if wanted[0] else gx
            gw = self._weight_gradient(gw)
            return [gx, gw, self._bias_gradient(grad) if wanted[2] else None] if bias else [gx, gw]

        return vjp
