"""`verify=True`: plans of the same kind against the untouched network, on small inputs and in many regions.

A small input has one region by itself, and one region is the untouched network. So the check runs by regions that it
chooses: a slide and tiles in a few uneven parts along every axis, the user's own sizes where they are smaller, and, where
memory was stated, a tight budget, for which the planner uses all that it knows. Enter at `verify_small`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ranger_nn.bounds.axes import find_axes
from ranger_nn.core.graph import Graph
from ranger_nn.errors import BudgetError, VerificationError
from ranger_nn.planning.along import input_size
from ranger_nn.planning.search import Options, make_plan
from ranger_nn.torch.twin import Twin

LIMIT = 96
"""Elements along a long dimension: enough for several regions of a network that halves its maps a few times."""
PARTS = (5, 3)
"""Regions along the first axis and along the others: they divide no power of two, so that no border is aligned."""
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
"""Of the largest value; in half precision HALF."""
HALF = 0.05
GRADIENT = 100
"""Times the tolerance that gradients may differ, in the norm: sums over all pixels, and maxima that move."""
NOISE = 1e-2
"""Of the largest gradient: one that is zero in exact arithmetic (a bias in front of a norm) is rounding, and held to this."""


def verify_small(regional: Any, leaves: list[Any], spec: Any, grad: bool, limit: int = LIMIT) -> None:
    """Compare outputs, and with `grad` gradients, on random inputs shrunk to `limit` along long dimensions.

    Where the untouched network refuses these sizes, its own are taken.

    Raises:
        VerificationError: a difference, or the check cannot be made.
    """

    def fresh() -> nn.Module:  # a network may note sizes that it has seen (Swin its windows)
        return Twin(regional.module).module.eval()

    with torch.random.fork_rng(devices=[]):
        try:
            args, kwargs = pytree.tree_unflatten(_shrunk(leaves, limit), spec)
            with torch.no_grad():
                fresh()(*args, **kwargs)
        except Exception:  # whatever a network says of a size that it does not take
            args, kwargs = pytree.tree_unflatten(_shrunk(leaves, None), spec)
        try:
            model = fresh()
            want = _values(model, model, args, kwargs, grad)
            for options in _trials(fresh(), args, kwargs, regional._options, grad):
                model = fresh()
                got = _values(type(regional)(model, options, False), model, args, kwargs, grad)
                _compare(type(regional.module).__name__, options, want, got)
        except VerificationError:
            raise
        except Exception as error:
            raise VerificationError(f"could not verify on inputs shrunk to {limit}: {error}") from error


def _shrunk(leaves: Sequence[Any], limit: int | None) -> list[Any]:
    return [
        torch.rand(
            [min(n, limit or n) if d >= 2 else n for d, n in enumerate(x.shape)], dtype=x.dtype, device=x.device
        ).requires_grad_(x.requires_grad)
        if isinstance(x, Tensor) and x.is_floating_point()
        else x
        for x in leaves
    ]


def _trials(model: nn.Module, args: Any, kwargs: Any, chosen: Options, grad: bool) -> Iterator[Options]:
    """Options that make several regions along every axis; none where the network has no axis to cut."""
    from ranger_nn.torch.capture import capture

    graph = capture(model, args, kwargs, grad=grad).graph
    sizes = [input_size(graph, axis) for axis in find_axes(graph)]
    if not sizes:
        return
    parts = [max(1, -(-n // PARTS[min(k, 1)])) for k, n in enumerate(sizes)]
    if chosen.regions is not None:
        parts = [*(min(a, b) for a, b in zip(parts, chosen.regions, strict=False)), *parts[len(chosen.regions) :]]
    free = chosen.without_budget()
    if chosen.schedule != "tile":
        yield replace(free, regions=(parts[0], *sizes[1:]), schedule="slide")
        yield replace(free, regions=tuple(parts), schedule="slide")
    if chosen.schedule != "slide":
        yield replace(free, regions=tuple(parts), schedule="tile")
    if chosen.regions is None and chosen.allowed is not None:
        yield replace(chosen, allowed=_tight(graph, free, grad))


def _tight(graph: Graph, free: Options, grad: bool) -> int:
    """Half of what the fastest plan needs, or the least that fits where half is too little."""
    half = make_plan(graph, free, grad).plan.projected // 2
    try:
        make_plan(graph, replace(free, allowed=half), grad)
    except BudgetError as error:
        return error.least or 2 * half
    return half


def _values(run: nn.Module, owner: nn.Module, args: Any, kwargs: Any, grad: bool) -> list[tuple[str, Tensor]]:
    """Outputs, and the gradients of a sum over them with fixed weights, by name."""
    with torch.set_grad_enabled(grad):
        outputs = [y for y in pytree.tree_leaves(run(*args, **kwargs)) if isinstance(y, Tensor)]
    found = [(f"output {k}", y.detach()) for k, y in enumerate(outputs) if y.is_floating_point()]
    pulled = [y for y in outputs if y.requires_grad]
    if not pulled:
        return found
    given = {f"input {k}": x for k, x in enumerate(pytree.tree_leaves((args, kwargs))) if isinstance(x, Tensor)}
    leaves = {k: x for k, x in (given | dict(owner.named_parameters())).items() if x.requires_grad}
    weights = [torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype, device=y.device).reshape(y.shape) for y in pulled]
    grads = torch.autograd.grad(pulled, list(leaves.values()), weights, allow_unused=True)
    return found + [(f"gradient of {k}", g) for k, g in zip(leaves, grads, strict=True) if g is not None]


def _compare(name: str, options: Options, want: list[tuple[str, Tensor]], got: list[tuple[str, Tensor]]) -> None:
    largest = max((float(a.norm()) for what, a in want if what.startswith("gradient")), default=0.0)
    for (what, a), (also, b) in zip(want, got, strict=True):
        allowed = TOLERANCE.get(a.dtype, HALF)
        if what.startswith("output"):
            apart = float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)) if a.numel() else 0.0
        else:
            allowed *= GRADIENT
            apart = float((a - b).norm()) / max(float(a.norm()), NOISE * largest, 1e-30)
        if what != also or a.shape != b.shape or not apart <= allowed:
            how = (
                f"regions={options.regions}, schedule={options.schedule!r}"
                if options.regions
                else f"memory={options.allowed}"
            )
            raise VerificationError(
                f"{name}: {what} by regions ({how}) differs from the untouched network by {apart:.2e} of its largest value "
                f"(allowed {allowed:.0e}). Do not use the result: run the untouched network, and please report this model."
            )
