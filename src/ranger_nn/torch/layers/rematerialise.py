"""The loop over groups of regions under a stated memory: run each without keeping it, compute it again in backward.

    forward    works 0, 1, ...    only results are kept (Chen et al. 2016, sublinear memory)
    backward   for each work: its forward once more with gradients on, then its backward; gradients of the input and
               of all that local networks read add up in place

Attention pooling over the tiles of one large image trains this way in two passes, exactly: the scores and the join are
ordinary autograd over the kept results.

Works come in lists: those of one list are one call of the local network without memory, and give what that call gives:
`passes.py`. How many regions a work holds follows from what one of them takes, measured: `budget`. Enter at
`rematerialised`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ranger_nn.errors import BudgetError, MeasureError, PartitionError
from ranger_nn.planning.budget import format_bytes
from ranger_nn.torch.layers.passes import Passes, Work
from ranger_nn.torch.layers.state import Random, State
from ranger_nn.torch.measure import Usage, measure

AT_ONCE = 64 << 20
"""Bytes of regions that run together at most: more leave the cache and take longer (attention pooling of 64 tiles: 0.66
of the time of all at once with 60 MB of tiles in a group, 0.89 with 90 MB)."""


@dataclass(frozen=True)
class Budget:
    """What one region takes: bytes at work, and bytes kept for it until backward (its result, random states)."""

    region: int
    kept: int


def key_of(x: Tensor, modules: Sequence[nn.Module]) -> tuple[Any, ...]:
    """All that the bytes of a region depend on, besides its shape."""
    device, state = x.device, State(modules)
    cast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    gradients = torch.is_grad_enabled(), x.requires_grad, tuple(p.requires_grad for p in state.parameters())
    return (tuple(x.shape), x.stride(), x.dtype, device, cast, gradients, tuple(m.training for m in state.modules))


def budget(work: Work, x: Tensor, modules: Sequence[nn.Module], shared: bool) -> Budget:
    """Run one region, with its backward where gradients are on, and count; all state stays as it is.

    Args:
        work: one region.
        x: the input.
        modules: what runs on it.
        shared: may several works be one call, so that batch norm takes more passes.
    """
    _initialise(work, x, modules)
    try:
        return _measured(work, x, State(modules), shared, measure)
    except MeasureError:
        _measured(work, x, State(modules), shared, _unmeasured)  # a layer within measures its own regions, once
    try:
        return _measured(work, x, State(modules), shared, measure)
    except MeasureError as busy:
        raise MeasureError(
            f"memory= measures one region when a shape is first seen, and cannot inside another measurement: call "
            f"the layer once before. {busy}"
        ) from busy


def _measured(
    work: Work, x: Tensor, state: State, shared: bool, counter: Callable[[], AbstractContextManager[Usage]]
) -> Budget:
    before, random = state.read(), Random(x.device, state.generators())
    with random.unmoved():
        try:
            with counter() as used:
                passes = Passes(x.detach().requires_grad_(x.requires_grad), state, random)
                (y,) = passes.forward([work], shared)
                if passes.differentiable:
                    passes.backward([torch.ones_like(y)], None)
            passes.check_put_aside(work, before)
        finally:
            state.write(before)
    # of what is kept there is a gradient too
    return Budget(used.peak, y.nbytes * (2 if passes.grad else 1) + passes.remembered())


def _unmeasured() -> AbstractContextManager[Usage]:
    return nullcontext(Usage(False, False))


def at_once(
    allowed: int, one: Budget, several: Callable[[int], Budget], regions: int, kept: int, x: Tensor, place: str
) -> int:
    """How many of a group of regions run together.

    Args:
        allowed: bytes.
        one: a region.
        several: so many regions at once, measured: they may take more than each alone (kernels choose other layouts).
        regions: how many there are.
        kept: bytes kept for all regions.
        x: the input.
        place: the region's name, for the error.

    Raises:
        BudgetError: what is kept and one region are more than is allowed.
    """
    kept += x.nbytes if torch.is_grad_enabled() and x.requires_grad else 0
    if kept + one.region > allowed:
        raise BudgetError(
            f"the results of all regions and one region at work must fit into memory: allowed {format_bytes(allowed)}, "
            f"{place} needs {format_bytes(one.region)}, all results {format_bytes(kept)}; allow "
            f"{format_bytes(kept + one.region)}, or cut into smaller regions",
            allowed=allowed,
            least=kept + one.region,
            binding=place,
        )
    left = min(allowed - kept, AT_ONCE)
    count = max(1, min(left // max(one.region, 1), regions))
    while count > 1 and (taken := several(count).region) > allowed - kept:
        count = max(1, min(count - 1, count * left // taken))
    return count


def _initialise(work: Work, x: Tensor, modules: Sequence[nn.Module]) -> None:
    """Lazy modules get their parameters from one region, in evaluation, where nothing else changes."""
    state = State(modules)
    if not any(nn.parameter.is_lazy(t) for t in (*state.parameters(), *state.buffers())):
        return
    flags = [m.training for m in state.modules]
    try:
        for m in state.modules:
            m.training = False
        with torch.no_grad():
            work.run(work.take(x.detach()))
    finally:
        for m, flag in zip(state.modules, flags):
            m.training = flag


def rematerialised(
    lists: Sequence[Sequence[Work]], x: Tensor, modules: Sequence[nn.Module], shared: bool
) -> list[Tensor]:
    """Results of all works on x, whose activations live only while their work runs.

    Args:
        lists: works; those of one list are one call without memory.
        x: the input.
        modules: what runs on regions; its state afterwards, and after backward, is that of one call for each list.
        shared: False where works of a list never touch one another (a network for each region).

    Backward gives the gradients of x and of all tensors that the local networks read and that need one.

    Raises:
        PartitionError: a local network whose call cannot be divided, or cannot be repeated.
    """
    state = State(modules)
    passes = Passes(x, state, Random(x.device, state.generators()))
    results = [y for works in lists for y in passes.forward(works, shared and len(works) > 1)]
    if not passes.differentiable:
        return results
    return list(_Loop.apply(passes, results, x, *passes.leaves))


class _Loop(torch.autograd.Function):
    """The graph's node of a loop that has run."""

    @staticmethod
    def forward(ctx: Any, passes: Passes, results: list[Tensor], x: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
        """The results."""
        ctx.passes = passes
        ctx.save_for_backward(x, *leaves)  # refuses what is written before backward
        ctx.mark_non_differentiable(*[y for y in results if not (y.is_floating_point() or y.is_complex())])
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """Each work once more, with its gradients."""
        if torch.is_grad_enabled():
            raise PartitionError(
                "create_graph=True: a layer with memory= computes its regions again in backward and keeps no graph of "
                "it, so that gradients of gradients would be missing; leave memory out"
            )
        x = ctx.saved_tensors[0]
        whole = torch.zeros_like(x) if ctx.needs_input_grad[2] else None
        return None, None, whole, *ctx.passes.backward(list(grads), whole)
