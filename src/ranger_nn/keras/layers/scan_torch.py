"""The linear scan on Keras's PyTorch back end: the loops of `ranger_nn.layers.scan` in place, and their backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ranger_nn.layers.scan import gradients_in_place, scan_in_place


class _Scan(torch.autograd.Function):
    """Keeps a and h."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, initial: Tensor, chunk: int) -> Tensor:
        """All states."""
        h = scan_in_place(torch, a, b, initial, chunk)
        ctx.save_for_backward(a, h, initial)
        ctx.chunk = chunk
        return h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """The recurrence in reverse."""
        a, h, initial = ctx.saved_tensors
        return (*gradients_in_place(torch, grads[0], a, h, initial, ctx.chunk), None)


def scan(a: Tensor, b: Tensor, initial: Tensor, chunk: int | None) -> Tensor:
    """All states."""
    return _Scan.apply(a, b, initial, chunk or 0)


def pair(re: Tensor, im: Tensor) -> Tensor:
    """A complex array."""
    return torch.complex(re, im)


def parts(z: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary."""
    return z.real, z.imag


def polar(size: Tensor, angle: Tensor) -> Tensor:
    """size * exp(i angle), in the precision of both."""
    return torch.polar(size, angle)
