"""Kernels of reductions: lift a region, merge states, finish, and the gradient of a region.

The monoids are `ranger_nn.aggregate`'s; here they meet PyTorch. A state slot holds a tuple of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from typing import Any

import array_api_compat.torch as xp
import torch
from torch import Tensor

from ranger_nn.aggregate.monoid import Extremum, Moments, Monoid, State, Sum, count
from ranger_nn.core.program import Extent
from ranger_nn.core.reach import Box
from ranger_nn.torch.kernels import SMALL_TENSORS, Kernel, Local


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class Reduce(Kernel):
    """A reduction over `axis` of `shape`; `whole` is the untouched call.

    `groups` > 0: moments of groups of channels (dimension 1 is split in `groups`), as group, instance and batch
    normalisation need them; the result is then stacked (mean, variance) in the computing precision, of shape
    (2, samples or 1, groups).
    """

    def __init__(
        self,
        monoid: Monoid,
        shape: Sequence[int],
        axis: Sequence[int],
        keepdim: bool,
        whole: Callable[[Tensor], Tensor] | None,
        groups: int = 0,
        dtype: torch.dtype | None = None,
    ) -> None:
        """`shape`: whole shape of the input; `dtype`: of the result."""
        self.monoid, self.keepdim, self.whole, self.groups, self.dtype = monoid, keepdim, whole, groups, dtype
        self.shape = tuple(shape)
        self.axis = tuple(sorted(axis))
        self.total = count(self._split_shape(self.shape), self.axis)

    def _split_shape(self, shape: Sequence[int]) -> list[int]:
        if not self.groups:
            return list(shape)
        return [shape[0], self.groups, shape[1] // self.groups, *shape[2:]]

    def count(self, box: Box) -> int:
        """Elements behind one entry, in a region."""
        return count(self._split_shape([b - a for a, b in box]), self.axis)

    def bind(self, out_box: Box, in_boxes: Sequence[Box]) -> Local:
        """The whole reduction in one call."""
        if self.whole is not None:
            return self.whole
        return lambda x: self.finish(self.lift(x))

    def lift(self, x: Tensor) -> State:
        """State of one region."""
        if not self.groups:
            return self.monoid.lift(xp, _wide(x), self.axis)
        wide = _wide(x)
        over = tuple(d for d in range(x.dim()) if d != 1 and (d or 0 in self.axis))
        mean = wide.mean(over, keepdim=True)
        squares = (wide - mean).square_().sum(over, keepdim=True)
        return self._gather(mean, squares, x.numel() // mean.numel())

    def _gather(self, mean: Tensor, squares: Tensor, n: int) -> State:
        """Moments of groups from those of their channels (n elements behind each): shape (rows, groups, 1, ...)."""
        rows, channels = mean.shape[:2]
        parts, deviations = (t.reshape(rows, self.groups, channels // self.groups) for t in (mean, squares))
        center = parts.mean(2, keepdim=True)
        total = deviations.sum(2, keepdim=True) + n * (parts - center).square().sum(2, keepdim=True)
        shape = [rows, self.groups] + [1] * (len(self._split_shape(self.shape)) - 2)
        return center.reshape(shape), total.reshape(shape)

    def at(self, box: Box) -> Reduce:
        """The kernel for one region; most do not ask where it lies."""
        return self

    def merge(self, a: State, b: State, n_a: int, n_b: int) -> State:
        """State of two regions."""
        return self.monoid.merge(xp, a, b, n_a, n_b)

    def finish(self, state: State) -> Tensor:
        """The result, in the untouched operator's shape and precision."""
        result = self.monoid.finish(xp, state, self.total)
        if self.groups:
            mean, var = result
            return torch.stack([mean.reshape(mean.shape[:2]), var.reshape(var.shape[:2])])
        if isinstance(self.monoid, Moments):
            result = result[1]
        if not self.keepdim:
            result = result.squeeze(self.axis)
        return result.to(self.dtype) if self.dtype is not None else result

    def scratch(self, at: Extent) -> int:
        """Deviations (and their squares), or the mask of ties; in half precision a copy in single as well."""
        halves = 1 if self.itemsize > 2 else 2
        count = 0 if isinstance(self.monoid, Sum) else 1 if self.groups else 3
        return (count * halves + (halves - 1) * 2) * at.in_bytes[0] + SMALL_TENSORS

    def vjp_scratch(self, at: Extent) -> int:
        """The deviations, or the ties; in half precision copies in single as well."""
        halves = 1 if self.itemsize > 2 else 5
        if self.groups and self.itemsize > 2:
            return SMALL_TENSORS
        return halves * (1 if isinstance(self.monoid, Sum) else 2) * at.in_bytes[0] + SMALL_TENSORS

    def region_vjp(self, x: Tensor, state: State, grad: Tensor) -> Tensor:
        """Gradient of a region from the finished state and the result's gradient."""
        wide = _wide(x)
        if self.groups:
            return self._moments_vjp(wide, state[0], grad).to(x.dtype)
        kept = [1 if d in self.axis else wide.shape[d] for d in range(wide.dim())]
        if isinstance(self.monoid, Moments):
            out = (wide - state[0]) * (grad.reshape(kept) * (2 / (self.total - self.monoid.correction)))
        elif isinstance(self.monoid, Extremum):
            hit = self.monoid.sign * wide == state[0]
            out = hit * (grad.reshape(kept) / state[1])
        else:
            mean = isinstance(self.monoid, Sum) and self.monoid.mean
            out = (grad.to(wide.dtype).reshape(kept) / (self.total if mean else 1)).expand(wide.shape).contiguous()
        return out.to(x.dtype)

    def _moments_vjp(self, x: Tensor, mean: Tensor, grad: Tensor) -> Tensor:
        rows, channels = mean.shape[0], x.shape[1]

        def each(t: Tensor) -> Tensor:
            spread = t.reshape(rows, self.groups, 1).expand(rows, self.groups, channels // self.groups)
            return spread.reshape([rows, channels] + [1] * (x.dim() - 2))

        slope = each(grad[1] * (2 / self.total))
        return torch.addcmul(each(grad[0] / self.total) - each(mean) * slope, x, slope)

    def bind_vjp(self, out_box: Box, in_boxes: Sequence[Box], wanted: Sequence[bool]) -> Local:
        """Gradient where the reduction ran in one piece."""
        if self.whole is not None:
            return super().bind_vjp(out_box, in_boxes, wanted)

        def vjp(x: Tensor, grad: Tensor) -> list[Any]:
            return [self.region_vjp(x, self.lift(x), grad)]

        return vjp


class FirstExtremum(Reduce):
    """Maximum (sign 1) or minimum whose gradient goes to the first element that attains it, as pooling and `max(dim)` have it.

    The state is (extremum, where): `where` counts elements over the reduced axes, in order, of the whole.
    """

    def __init__(self, sign: int, shape: Sequence[int], axis: Sequence[int], keepdim: bool, dtype: torch.dtype) -> None:
        """As `Reduce`; the region is all, until `at` says otherwise."""
        super().__init__(Extremum(sign), shape, axis, keepdim, None, dtype=dtype)
        self.sign = sign
        self.box: Box = tuple((0, n) for n in self.shape)

    def at(self, box: Box) -> FirstExtremum:
        """The kernel for the region `box`."""
        found = copy(self)
        found.box = box
        return found

    def _kept(self, x: Tensor) -> list[int]:
        return [1 if d in self.axis else n for d, n in enumerate(x.shape)]

    def _rows(self, x: Tensor) -> Tensor:
        """The reduced axes joined, last."""
        return x.movedim(self.axis, tuple(range(-len(self.axis), 0))).flatten(-len(self.axis))

    def lift(self, x: Tensor) -> State:
        """Extremum of a region, and the first place of the whole at which it stands."""
        top, at = (self._rows(x) if self.sign > 0 else -self._rows(x)).max(-1)
        place = torch.zeros_like(at)
        for d, step in zip(reversed(self.axis), self._steps(self.shape), strict=True):
            lo, hi = self.box[d]
            place += (at % (hi - lo) + lo) * step
            at = at // (hi - lo)
        return top.reshape(self._kept(x)), place.reshape(self._kept(x))

    def _steps(self, shape: Sequence[int]) -> list[int]:
        """Elements from one index to the next of each reduced axis, the last one first."""
        steps = [1]
        for d in reversed(self.axis[1:]):
            steps.append(steps[-1] * shape[d])
        return steps

    def merge(self, a: State, b: State, n_a: int, n_b: int) -> State:
        """The larger one, of equal ones the first; NaN wins."""
        later = (b[0] > a[0]) | ((b[0] == a[0]) & (b[1] < a[1])) | (b[0].isnan() & ~a[0].isnan())
        return torch.where(later, b[0], a[0]), torch.where(later, b[1], a[1])

    def region_vjp(self, x: Tensor, state: State, grad: Tensor) -> Tensor:
        """The gradient, where the extremum stands in this region."""
        place, local = state[1], torch.zeros_like(state[1])
        inside = torch.ones_like(place, dtype=torch.bool)
        spans = [self.box[d][1] - self.box[d][0] if d in self.axis else 1 for d in range(len(self.shape))]
        for d, step in zip(reversed(self.axis), self._steps(spans), strict=True):
            lo, hi = self.box[d]
            own = place % self.shape[d] - lo
            inside &= (own >= 0) & (own < hi - lo)
            local += own * step
            place = place // self.shape[d]
        out = torch.zeros_like(x, memory_format=torch.contiguous_format)
        order = out.movedim(self.axis, tuple(range(-len(self.axis), 0)))
        rows = torch.zeros_like(order).flatten(-len(self.axis))
        share = grad.reshape(inside.shape).to(x.dtype) * inside
        flat = self._rows(share), self._rows(local.where(inside, 0))
        order.copy_(rows.scatter_(-1, flat[1], flat[0]).view(order.shape))
        return out

    def vjp_scratch(self, at: Extent) -> int:
        """The region's gradient once more, with the reduced axes last."""
        return 2 * at.in_bytes[0] + SMALL_TENSORS


class NormScale(Kernel):
    """(scale, shift) of each channel, so that a normalisation is x * scale + shift: inputs stats, [weight], [bias].

    Made once from the moments of the whole; the result has shape (2, samples or 1, channels).
    """

    def __init__(self, groups: int, channels: int, eps: float, weight: bool, bias: bool) -> None:
        """`groups` of channels share their moments."""
        self.groups, self.channels, self.eps, self.weight, self.bias = groups, channels, eps, weight, bias

    def bind(self, out_box: Box, in_boxes: Sequence[Box]) -> Local:
        """scale = weight / sqrt(var + eps), shift = bias - mean * scale."""
        groups, channels, eps, weight, bias = self.groups, self.channels, self.eps, self.weight, self.bias

        def local(stats: Tensor, *affine: Tensor) -> Tensor:
            rows = stats.shape[1]
            wide = stats.unsqueeze(-1).expand(2, rows, groups, channels // groups).reshape(2, rows, channels)
            scale = torch.rsqrt(wide[1] + eps)
            if weight:
                scale = scale * affine[0]
            shift = -wide[0] * scale
            if bias:
                shift = shift + affine[-1]
            return torch.stack([scale, shift])

        return local


class NormApply(Kernel):
    """x * scale + shift, one of each for a channel: inputs x and what `NormScale` gives."""

    sums = True
    shift_invariant = True
    layout = "keeps"

    def scratch(self, at: Extent) -> int:
        """In half precision copies in single."""
        return SMALL_TENSORS if self.itemsize > 2 else 4 * at.out_bytes + SMALL_TENSORS

    def bind(self, out_box: Box, in_boxes: Sequence[Box]) -> Local:
        """One multiply-add."""

        def local(x: Tensor, affine: Tensor) -> Tensor:
            scale, shift = affine.view([*affine.shape, *[1] * (x.dim() - 2)]).unbind(0)
            return torch.addcmul(shift, x.to(scale.dtype), scale).to(x.dtype)

        return local


class RunningStatistics(Kernel):
    """Normalisation's side effect, once per forward: inputs stats, running mean, running variance."""

    def __init__(self, momentum: float, n: int) -> None:
        """`n`: elements behind one channel (running variance is the unbiased one)."""
        self.momentum, self.n = momentum, n

    def bind(self, out_box: Box, in_boxes: Sequence[Box]) -> Local:
        """Update in place, give back the statistics."""

        def local(stats: Tensor, mean: Tensor, var: Tensor) -> Tensor:
            with torch.no_grad():
                self._move(stats, mean, var)
            return torch.zeros(1)

        return local

    def moved(self, stats: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """The statistics after this forward, as new tensors."""
        mean, var = mean.clone(), var.clone()
        self._move(stats, mean, var)
        return mean, var

    def _move(self, stats: Tensor, mean: Tensor, var: Tensor) -> None:
        """`stats` has a row for each sample whose moments stand alone (instance norm): their mean counts."""
        unbiased = stats[1].mean(0) * (self.n / (self.n - 1) if self.n > 1 else 1.0)
        mean.mul_(1 - self.momentum).add_(stats[0].mean(0).to(mean.dtype), alpha=self.momentum)
        var.mul_(1 - self.momentum).add_(unbiased.to(var.dtype), alpha=self.momentum)
