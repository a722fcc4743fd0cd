"""Overlapping patches: `F.unfold`, `F.fold` and `Tensor.unfold`. Rows and columns of places are joined by a view of their own."""

from __future__ import annotations

from typing import Any

import torch

from ranger_nn.ops import movement, window
from ranger_nn.torch import kernels as K
from ranger_nn.torch import kernels_movement as M
from ranger_nn.torch.kernels_patches import Fold, Patch, Unfold
from ranger_nn.torch.operator import Operator


def _patches(op: Operator) -> list[Patch]:
    names = ("kernel_size", "stride", "dilation", "padding")
    return [Patch(*sides) for sides in zip(*(op.arg(n) for n in names), strict=True)]


def _viewed(op: Operator, x: int, shape: tuple[int, ...]) -> int:
    """A value in another shape."""
    before = op.shape(x)
    like = torch.empty(shape, dtype=op.like.dtype, device="meta")
    found: int = op.lower.emit("view", [x], like, movement.view(before, shape), M.View(before, shape), alias=0)
    return found


def lower_unfold(op: Operator) -> Any:
    """(samples, channels, rows, columns) -> (samples, channels * window, places)."""
    x, patches = op.arg("self"), _patches(op)
    shape = op.shape(x)
    places = [p.places(n) for p, n in zip(patches, shape[-2:], strict=True)]
    like = torch.empty((*op.out[:-1], *places), dtype=op.like.dtype, device="meta")
    rule = window.window(shape, [p.reach for p in patches])
    return _viewed(op, op.lower.emit(op.name, [x], like, rule, Unfold(patches), vjp_reads=()), op.out)


def lower_fold(op: Operator) -> Any:
    """(samples, channels * window, places) -> (samples, channels, rows, columns)."""
    x, patches = op.arg("self"), _patches(op)
    places = [p.places(n) for p, n in zip(patches, op.arg("output_size"), strict=True)]
    apart = _viewed(op, x, (*op.shape(x)[:-1], *places))
    rule = window.window(op.shape(apart), [p.transposed for p in patches])
    return op.emit([apart], rule, Fold(patches), vjp_reads=())


def lower_windows(op: Operator) -> Any:
    """Windows along one dimension, their places in it, and what they hold in a new last one."""
    x = op.arg("self")
    shape = op.shape(x)
    if not shape:
        return None
    dim, size, step = op.dim("dimension", len(shape)), op.arg("size"), op.arg("step")
    alias = 0 if op.name == "unfold" else None
    return op.emit([x], movement.windows(shape, dim, size, step), K.Light(op.call()[0]), alias=alias)
