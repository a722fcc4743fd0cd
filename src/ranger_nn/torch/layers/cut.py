"""Cutting regions out of a tensor, with a backward that writes each region's gradient once.

Slices recorded by autograd give back a gradient as large as the whole tensor for every region: R regions cost R times
the tensor. Here one tensor of zeros takes them all.
"""

from __future__ import annotations

from typing import Any

import array_api_compat.torch as xp
import torch
from torch import Tensor

from ranger_nn.layers.regional import Group, Layout


def cut(x: Tensor, layout: Layout, group: Group) -> Tensor:
    """The regions of a group, stacked: (regions, batch, ...)."""
    if torch.compiler.is_exporting() or not (x.requires_grad and torch.is_grad_enabled()):
        return layout.gather(xp, x, group)
    return _Cut.apply(x, layout, group)


def add_back(whole: Tensor, grad: Tensor, layout: Layout, group: Group) -> None:
    """Add the gradient of stacked regions in their places; regions may overlap."""
    for k, region in enumerate(group.regions):
        whole[layout.index(region, whole.dim())] += grad[k]


class _Cut(torch.autograd.Function):
    """Gather; backward scatters with addition."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout, group: Group) -> Tensor:
        """Stacked regions."""
        ctx.layout, ctx.group, ctx.shape = layout, group, x.shape
        return layout.gather(xp, x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Each region's gradient in its place."""
        whole = grads[0].new_zeros(ctx.shape)
        add_back(whole, grads[0], ctx.layout, ctx.group)
        return whole, None, None
