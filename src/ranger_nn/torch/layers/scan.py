"""`linear_scan` for PyTorch: one operator of its own for the recurrence, one for its gradients.

Operators of `torch.library` stand in `torch.compile` and `torch.export` graphs as they are (any number of steps, known
or not), and run the loops of `ranger_nn.layers.scan` in place. Backward keeps a and h. Where gradients of gradients are
asked for, backward is written in differentiable operators instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ranger_nn.layers import scan as slices


def linear_scan(a: Tensor, b: Tensor, initial: Tensor | None = None, chunk: int | None = None) -> Tensor:
    """All states of h_t = a_t * h_{t-1} + b_t (elementwise), by slices of time: the numbers of the step loop up to rounding.

    Args:
        a, b: (batch, time, ...), one shape; real or complex. Half precision accumulates in float32.
        initial: (batch, ...) state before the first step; None: zero.
        chunk: steps of a slice; None: chosen. It changes speed and rounding, never the meaning.

    Returns:
        (batch, time, ...) in the wider dtype of a and b. NaN and infinity spread as in the step loop: to later steps.
        Products of decays are taken over slices: decays so far above 1 that a product overflows give NaN there, even
        where the states themselves are zero.

    Raises:
        InputError: shapes that differ, no step.
        PartitionError: chunk below 1.

    Source: Blelloch 1990, Prefix sums and their applications, section 1.4; Martin & Cundy 2018, Parallelizing linear
    recurrent neural nets over sequence length, section 2.
    """
    slices.check_scan(a.shape, b.shape, None if initial is None else initial.shape, chunk)
    dtype = torch.promote_types(a.dtype, b.dtype)
    inner = torch.promote_types(dtype, torch.float32)
    first = b.new_zeros(()).expand(b.shape[0], *b.shape[2:]) if initial is None else initial
    return _scan(a.to(inner), b.to(inner), first.to(inner), chunk or 0).to(dtype)


@torch.library.custom_op("ranger_nn::linear_scan", mutates_args=())
def _scan(a: Tensor, b: Tensor, initial: Tensor, chunk: int) -> Tensor:
    """All states."""
    return slices.scan_in_place(torch, a, b, initial, chunk)


@torch.library.custom_op("ranger_nn::linear_scan_backward", mutates_args=())
def _gradients(grad: Tensor, a: Tensor, h: Tensor, initial: Tensor, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """(da, db, dinitial)."""
    return slices.gradients_in_place(torch, grad, a, h, initial, chunk)


@_scan.register_fake
def _(a: Tensor, b: Tensor, initial: Tensor, chunk: int) -> Tensor:
    return b.new_empty(b.shape)


@_gradients.register_fake
def _(grad: Tensor, a: Tensor, h: Tensor, initial: Tensor, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    return h.new_empty(h.shape), h.new_empty(h.shape), initial.new_empty(initial.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, _, initial, ctx.chunk = inputs
    ctx.save_for_backward(a, output, initial)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    a, h, initial = ctx.saved_tensors
    if torch.is_grad_enabled():
        return (*_differentiable_gradients(grad, a, h, initial, ctx.chunk), None)
    return (*_gradients(grad, a, h, initial, ctx.chunk), None)


def _differentiable_gradients(
    grad: Tensor, a: Tensor, h: Tensor, initial: Tensor, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The reverse recurrence as a recurrence over flipped steps."""
    later = torch.cat([torch.zeros_like(a[:, :1]), a[:, 1:].conj().flip(1)], 1)
    g = _scan(later, grad.flip(1), torch.zeros_like(initial), chunk).flip(1)
    before = torch.cat([initial[:, None], h[:, :-1]], 1)
    return g * before.conj(), g, a[:, 0].conj() * g[:, 0]


_scan.register_autograd(_backward, setup_context=_save)
