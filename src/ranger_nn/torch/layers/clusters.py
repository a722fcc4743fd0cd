"""Centres of K-means regions in PyTorch: routing of samples, bringing them together by region and back, training steps.

What is routed where is `ranger_nn.layers.clusters`'s. On the CPU and not compiled, loads are read and blocks fit them;
compiled, or on a device whose numbers are not read, their number follows from the shapes. Enter at `Clusters`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import array_api_compat.torch as xp
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter, is_lazy

from ranger_nn.errors import InputError
from ranger_nn.layers.clusters import (
    Routes,
    balanced,
    block_count,
    block_size,
    check_mask,
    check_samples,
    filled,
    grouped,
    grouped_now,
    moved,
)
from ranger_nn.layers.routing import balanced_slots, balanced_slots_now, check_capacity
from ranger_nn.partition.kmeans import KMeans


class Clusters(LazyModuleMixin, nn.Module):
    """The centres of a `KMeans`, and the way of samples to them.

    Centres (clusters, features) are a buffer, or with `update="gradient"` a parameter. Until `adapt` they are normal
    random numbers by the partition's seed; with "ema" and "gradient" those to which nothing comes begin anew at samples.
    They keep float32 or better in routing, whatever autocast says.

    Args:
        partition: the regions.
        features: of a sample; None: those of the first input.
    """

    centres: Tensor
    unseen: Tensor
    cls_to_become = None

    def __init__(self, partition: KMeans, features: int | None = None) -> None:
        super().__init__()
        self.partition = partition
        if partition.update == "gradient":
            self.centres = UninitializedParameter()
        else:
            self.register_buffer("centres", UninitializedBuffer())
        self.register_buffer("unseen", torch.zeros(partition.clusters))
        if features is not None:
            self._make(features)

    def _make(self, features: int) -> None:
        generator = torch.Generator().manual_seed(self.partition.seed)
        start = torch.randn(self.partition.clusters, features, generator=generator)
        with torch.no_grad():
            self.centres.materialize(start.shape)  # type: ignore[attr-defined]
            self.centres.copy_(start)

    def initialize_parameters(self, x: Tensor, *_: Any, **__: Any) -> None:
        """Centres for the features of the first input."""
        if is_lazy(self.centres):
            check_samples(self.partition, x.shape, None)
            self._make(x.shape[-1])

    def forward(self, x: Tensor, mask: Tensor | None = None, *, sets: bool = False, separate: bool = False) -> Routes:
        """Where each sample goes.

        Args:
            x: (batch, d) or (batch, N, d).
            mask: (batch,) or (batch, N) bool, True for samples that are there.
            sets: balanced tokens of one region stay apart by sequence.
            separate: unbalanced, one block for each region, however large.

        Raises:
            InputError: another shape; NaN or infinite numbers, on the CPU and not compiled (elsewhere the results of
                such samples are whatever a region's network makes of them; the others' are right, unless balanced).
            PartitionError: balanced, and a capacity too small.
        """
        check_samples(self.partition, x.shape, self.centres.shape[1])
        check_mask(mask, x.shape)
        with _exact(x.device.type):
            exact = torch.promote_types(x.dtype, torch.float32)
            rows = x.detach().reshape(-1, x.shape[-1]).to(exact)
            near = _nearness(rows, self.centres.detach().to(exact), self.partition.balanced)
            if self.partition.balanced:
                return self._balanced(near, x, mask, sets)
            return self._nearest(near, rows, x, mask, separate)

    def _nearest(self, near: Tensor, samples: Tensor, x: Tensor, mask: Tensor | None, separate: bool) -> Routes:
        rows, clusters = near.shape
        there = None if mask is None else mask.reshape(-1)
        if _readable(x):
            scores = near.numpy()
            region = scores.argmax(1)  # of a row with NaN, where the first one is
            values = samples.reshape(-1).numpy()
            if not np.isfinite(np.dot(values, values)):  # rarely; then look at each
                _check_finite(scores[np.arange(rows), region], x, mask)
            return _from_numpy(grouped_now(region, None if there is None else there.numpy(), clusters, separate))
        size = rows if separate else block_size(rows, clusters)
        blocks = None if separate else block_count(rows, clusters, size)
        return grouped(xp, near.argmax(1), there, rows, clusters, size, blocks)

    def _balanced(self, near: Tensor, x: Tensor, mask: Tensor | None, sets: bool) -> Routes:
        clusters = self.partition.clusters
        groups, rows = (x.shape[0], x.shape[1]) if x.dim() == 3 else (1, x.shape[0])
        capacity = self.partition.capacity or -(-rows // clusters)
        check_capacity(rows, clusters, capacity)
        if _readable(x):
            _check_finite(near.numpy().max(1), x, mask)
        near = near.reshape(groups, rows, clusters)
        there = None if mask is None else mask.reshape(groups, rows)
        if there is not None or clusters * capacity != rows:
            near, there = filled(xp, near, there, rows, capacity)
            there = there.expand(groups, -1)
        if _readable(x):
            found = balanced_slots_now(near.numpy(), capacity, None if there is None else there.numpy())
            slots = torch.from_numpy(found)
        else:
            slots = balanced_slots(xp, near, capacity, there)
        return balanced(xp, slots, there, groups, rows, capacity, clusters, sets)

    def follow(self, routes: Routes, taken: Tensor) -> Tensor | None:
        """A training step of the centres on samples by region; with "gradient", where they are drawn to.

        Lloyd's step as a moving average: Roy et al. 2021, section 4.1. Gradient: Bottou & Bengio 1995, K-means as
        descent on the quantisation error; see `drawn`.
        """
        update = self.partition.update
        if update == "none" or not self.training:
            return None
        with torch.no_grad(), _exact(taken.device.type):
            exact = torch.promote_types(taken.dtype, torch.float32)
            blocks = (routes.shape[0], -1)
            used = None if routes.used is None else routes.used.reshape(blocks)
            taken = taken.detach().to(exact).reshape(*blocks, taken.shape[-1])
            decay = self.partition.decay if update == "ema" else 0.0
            centres, unseen = moved(xp, taken, used, routes.owner, self.centres.to(exact), self.unseen, decay)
            self.unseen.copy_(unseen)
            if update == "gradient":
                return centres.to(self.centres.dtype)
            self.centres.copy_(centres)
        return None

    @torch.no_grad()
    def adapt(self, data: Tensor) -> None:
        """Put the centres where K-means finds those of `data` (..., d).

        Raises:
            InputError: NaN or infinite numbers, fewer samples than clusters, another d.
        """
        check_samples(self.partition, data.shape, None if is_lazy(self.centres) else self.centres.shape[1])
        rows = data.detach().reshape(-1, data.shape[-1])
        fitted = self.partition.fit(np.asarray(rows.double().cpu()))
        if is_lazy(self.centres):
            self._make(data.shape[-1])
        self.centres.copy_(torch.as_tensor(fitted))
        self.unseen.zero_()

    def extra_repr(self) -> str:
        """Partition."""
        return str(self.partition)


def taken(x: Tensor, routes: Routes, zeros: bool) -> Tensor:
    """Rows (rows, ...) by region: (*routes.shape, ...); slots without a row of their own hold zeros, or some row."""
    y = _Taken.apply(x, *_ways(routes)) if _grad(x) else x.index_select(0, routes.take)
    return (masked(y, routes.used) if zeros else y).reshape(*routes.shape, *x.shape[1:])


def put(y: Tensor, routes: Routes) -> Tensor:
    """Slots (*routes.shape, ...) back to their rows: (rows, ...); zero for rows that are absent."""
    y = y.flatten(0, len(routes.shape) - 1)
    return _Put.apply(y, *_ways(routes)) if _grad(y) else masked(y.index_select(0, routes.back), routes.there)


def _ways(routes: Routes) -> tuple[Tensor | None, ...]:
    return routes.take, routes.used, routes.back, routes.there


def _grad(x: Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()


class _Taken(torch.autograd.Function):
    """Rows into slots: x[take]. Backward: each row's gradient from its own slot, with no addition."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, take: Tensor, used: Tensor, back: Tensor, there: Tensor) -> Tensor:
        """x[take]."""
        ctx.save_for_backward(take, used, back, there)
        return x.index_select(0, take)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The way back."""
        return _Put.apply(grads[0], *ctx.saved_tensors), None, None, None, None


class _Put(torch.autograd.Function):
    """Slots into rows: y[back]. Backward: each slot's gradient from its own row, zero for slots without one."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, take: Tensor, used: Tensor, back: Tensor, there: Tensor) -> Tensor:
        """y[back]."""
        ctx.save_for_backward(take, used, back, there)
        return masked(y.index_select(0, back), there)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The way there."""
        return masked(_Taken.apply(grads[0], *ctx.saved_tensors), ctx.saved_tensors[1]), None, None, None, None


def masked(y: Tensor, there: Tensor | None) -> Tensor:
    """`y` (n, ...), zero where `there` (n,) is False."""
    return y if there is None else torch.where(there.reshape(-1, *[1] * (y.dim() - 1)), y, 0)


def drawn(y: Tensor, centres: Tensor, towards: Tensor | None) -> Tensor:
    """`y`; backward adds centres - towards to the gradient of `centres`.

    That is the gradient of half the squared distance of each centre to the mean of its samples (the quantisation error
    of each region divided by its load), as if it were a term of the loss with weight 1, whatever the loss; a step of
    SGD at rate r is a moving average with decay 1 - r. Under a `GradScaler` it is not scaled: use "ema" there.
    """
    return y if towards is None or not torch.is_grad_enabled() else _Drawn.apply(y, centres, towards)


class _Drawn(torch.autograd.Function):
    """The identity, with a gradient for the centres."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, centres: Tensor, towards: Tensor) -> Tensor:
        """y."""
        ctx.save_for_backward(centres - towards)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        """The gradient, and that of the quantisation error."""
        return grads[0], ctx.saved_tensors[0], None


def _exact(device: str) -> AbstractContextManager[Any]:
    """Without autocast; where there is none, nothing, which costs less."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _readable(x: Tensor) -> bool:
    """Can numbers be read at no cost."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _nearness(rows: Tensor, centres: Tensor, absolute: bool) -> Tensor:
    """`nearness`, with one product that also adds, and relative to the first centre, which is as good as their mean."""
    middle = centres[0]
    rows, centres = rows - middle, centres - middle
    near = torch.addmm((centres * centres).sum(1), rows, centres.T, beta=-0.5)
    return near - (rows * rows).sum(1, keepdim=True) / 2 if absolute else near


def _check_finite(best: np.ndarray, x: Tensor, mask: Tensor | None) -> None:
    """Refuse NaN: a sample with one has no distance, and NaN is what its nearest centre seems to be at."""
    finite = np.isfinite(best)
    if mask is not None:
        finite |= ~mask.reshape(-1).numpy()
    if not finite.all():
        raise InputError(
            f"K-means routes samples with a finite distance to the centres; {np.count_nonzero(~finite)} of {best.size} in "
            f"an input of shape {tuple(x.shape)} hold NaN, infinite or too large numbers. Leave them out, or mask them"
        )


def _from_numpy(routes: Routes) -> Routes:
    """The same routes as tensors."""
    return Routes._make(torch.from_numpy(a) if isinstance(a, np.ndarray) else a for a in routes)
