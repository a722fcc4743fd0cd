"""The loop over groups of regions under a stated memory: run each without keeping it, compute it again in backward.

    forward    group 0, group 1, ...    only results are kept (Chen et al. 2016, sublinear memory)
    backward   for each group: its forward once more with gradients on, then its backward; gradients of the input and
               of the parameters add up in place

Attention pooling over the tiles of one large image trains this way in two passes, exactly: the scores and the join are
ordinary autograd over the kept results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ranger_nn.errors import BudgetError, MeasureError
from ranger_nn.planning.budget import format_bytes
from ranger_nn.torch.measure import measure

AT_ONCE = 64 << 20
"""Bytes of regions that run together at most: more leave the cache and take longer (attention pooling of 64 tiles: 0.66
of the time of all at once with 60 MB of tiles in a group, 0.89 with 90 MB)."""


class Work(Protocol):
    """Some regions: how to take them from the input, run them, and give back their gradient."""

    def take(self, x: Tensor) -> Tensor:
        """The regions' own copy."""
        ...

    def run(self, taken: Tensor) -> Tensor:
        """The local network on them."""
        ...

    def give(self, whole: Tensor, grad: Tensor, x: Tensor) -> None:
        """Add the gradient of what was taken to that of the whole input x, in place."""
        ...


@dataclass(frozen=True)
class Budget:
    """How many regions run at once: bytes of one region, measured, against what is allowed."""

    allowed: int
    region: int
    regions: int


def budget(
    allowed: int,
    work: Work,
    x: Tensor,
    parameters: Sequence[Tensor],
    buffers: Sequence[Tensor],
    regions: int,
    place: str,
) -> Budget:
    """Run one region, with its backward where gradients are on, and count.

    Args:
        allowed: bytes.
        work: one region.
        x: the input.
        parameters, buffers: of the local network; running statistics stay as they are.
        regions: how many results are kept.
        place: the region's name, for the error.

    Raises:
        BudgetError: kept results and one region are more than is allowed.
    """
    grad = torch.is_grad_enabled()
    with _unchanged(buffers):
        used, result = _count(work, x, [p for p in parameters if p.requires_grad] if grad else [])
    kept = regions * result * (2 if grad else 1) + (x.nbytes if grad and x.requires_grad else 0)
    if kept + used > allowed:
        raise BudgetError(
            f"the results of all regions and one region at work must fit into memory: allowed {format_bytes(allowed)}, "
            f"{place} needs {format_bytes(used)}, {regions} results {format_bytes(kept)}; allow "
            f"{format_bytes(kept + used)}, or cut into smaller regions",
            allowed=allowed,
            least=kept + used,
            binding=place,
        )
    return Budget(allowed, used, max(1, min(allowed - kept, AT_ONCE) // max(used, 1)))


def _count(work: Work, x: Tensor, wanted: list[Tensor]) -> tuple[int, int]:
    """(peak bytes of a region, bytes of its result)."""
    with torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
        try:
            with measure() as used:
                taken = work.take(x.detach()).requires_grad_(x.requires_grad and torch.is_grad_enabled())
                y = work.run(taken)
                leaves = [*wanted, *([taken] if taken.requires_grad else [])]
                if y.requires_grad:
                    torch.autograd.grad(y.sum(), leaves, allow_unused=True)
        except MeasureError as busy:
            raise MeasureError(
                f"memory= measures one region when a shape is first seen, and cannot inside another measurement: call "
                f"the layer once before. {busy}"
            ) from busy
    return used.peak, y.nbytes


@contextmanager
def _unchanged(buffers: Sequence[Tensor]) -> Iterator[None]:
    """Buffers as before: what is run once more must not count twice."""
    before = [b.clone() for b in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for b, old in zip(buffers, before):
                b.copy_(old)


def rematerialised(
    works: Sequence[Work], x: Tensor, parameters: Sequence[Tensor], buffers: Sequence[Tensor]
) -> list[Tensor]:
    """Results of `works` on x, whose activations live only while their work runs.

    Backward gives the gradients of x and of those `parameters` that need one, and leaves `buffers` (running statistics)
    as forward left them.
    """
    wanted = [p for p in parameters if p.requires_grad]
    if not torch.is_grad_enabled() or not (x.requires_grad or wanted):
        return [work.run(work.take(x)) for work in works]
    return list(_Loop.apply(works, buffers, x, *wanted))


class _Loop(torch.autograd.Function):
    """Forward without a graph, backward work by work."""

    @staticmethod
    def forward(
        ctx: Any, works: Sequence[Work], buffers: Sequence[Tensor], x: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        """Results only."""
        ctx.works, ctx.buffers, ctx.again = works, buffers, _autocast(x.device.type)
        ctx.save_for_backward(x, *parameters)
        ctx.states = []
        results = []
        for work in works:
            ctx.states.append(_random_state(x))
            results.append(work.run(work.take(x)))
        return tuple(results)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """Each work once more, with its gradients."""
        x, *parameters = ctx.saved_tensors
        whole = torch.zeros_like(x) if ctx.needs_input_grad[2] else None
        sums = [torch.zeros_like(p) for p in parameters]
        devices = [x.device] if x.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), _unchanged(ctx.buffers):
            for work, state, grad in zip(ctx.works, ctx.states, grads):
                _set_random_state(x, state)
                taken = work.take(x.detach()).requires_grad_(whole is not None)
                with torch.enable_grad(), ctx.again():
                    y = work.run(taken)
                if not y.requires_grad:
                    continue
                leaves = [*parameters, *([taken] if whole is not None else [])]
                found = torch.autograd.grad(y, leaves, grad, allow_unused=True)
                for total, part in zip(sums, found):
                    if part is not None:
                        total += part
                if whole is not None and found[-1] is not None:
                    work.give(whole, found[-1], x)
                del y, taken, found
        return None, None, whole, *sums


def _autocast(device: str) -> Callable[[], AbstractContextManager[Any]]:
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return lambda: torch.autocast(device, dtype, enabled)


def _random_state(x: Tensor) -> Tensor:
    return torch.cuda.get_rng_state(x.device) if x.device.type == "cuda" else torch.get_rng_state()


def _set_random_state(x: Tensor, state: Tensor) -> None:
    if x.device.type == "cuda":
        torch.cuda.set_rng_state(state, x.device)
    else:
        torch.set_rng_state(state)
