"""`verify=True`: plans of the same kind against the untouched network, on small inputs and in many regions.

A small input has one region by itself, and one region is the untouched network. So the check runs by regions that it
chooses: a slide and tiles in a few uneven parts along every axis, the user's own sizes where they are smaller, and, where
memory was stated, a tight budget, for which the planner uses all that it knows. Both sides are twins of the model in its
own mode, with buffers of their own and dropout off. Enter at `verify_small`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ranger_nn.bounds.axes import find_axes
from ranger_nn.core.graph import Graph
from ranger_nn.errors import BudgetError, VerificationError
from ranger_nn.planning.along import input_size
from ranger_nn.planning.search import Options, make_plan
from ranger_nn.torch.identity import autocast_dtype
from ranger_nn.torch.twin import Twin

LIMIT = 96
"""Elements along a long dimension: enough for several regions of a network that halves its maps a few times."""
PARTS = (5, 3)
"""Regions along the first axis and along the others: they divide no power of two, so that no border is aligned."""
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
"""Of the largest value; in half precision HALF."""
HALF = 0.05
PLACES = {torch.float64: 0.0, torch.float32: 1e-3}
"""Share of an integer output that may differ, by the precision it is computed in: near ties of an argmax. In half HALF."""
GRADIENT = 100
"""Times the tolerance that gradients may differ, in the norm: sums over all pixels, and maxima that move."""
LEAST = 1e-30
"""What a value of nothing but zeros is divided by."""
NOISE = 1e-2
"""Of the largest gradient: one that is zero in exact arithmetic (a bias in front of a norm) is rounding, and held to this."""


Found = list[tuple[str, Tensor]]


def verify_small(regional: Any, leaves: list[Any], spec: Any, grad: bool, limit: int = LIMIT) -> None:
    """Compare outputs and buffers, and with `grad` gradients, on random inputs shrunk to `limit` along long dimensions.

    Where the untouched network refuses these sizes, its own are taken.

    Raises:
        VerificationError: a difference, or the check cannot be made.
    """
    model, name = regional.module, type(regional.module).__name__
    with torch.random.fork_rng(sorted({x.device.index for x in leaves if isinstance(x, Tensor) and x.is_cuda})):
        try:
            args, kwargs = pytree.tree_unflatten(_shrunk(leaves, limit), spec)
            with torch.no_grad():
                still(model)(*args, **kwargs)
        except Exception:  # whatever a network says of a size that it does not take
            args, kwargs = pytree.tree_unflatten(_shrunk(leaves, None), spec)
        try:
            norms_only = _draws(still(model), args, kwargs)
            twin = still(model, norms_only)
            with OrderedGradients() if grad else nullcontext():  # under any mode, layers leave their fast path
                want = _values(twin, twin, args, kwargs, grad)
            for options in _trials(still(model, norms_only), args, kwargs, regional._options, grad):
                twin = still(model, norms_only)  # a network may note sizes that it has seen (Swin its windows)
                got = _values(type(regional)(twin, options, False), twin, args, kwargs, grad)
                _compare(name, options, want, got, _precision(model, leaves))
        except VerificationError:
            raise
        except Exception as error:
            raise VerificationError(f"could not verify on inputs shrunk to {limit}: {error}") from error


def still(model: nn.Module, norms_only: bool = False) -> nn.Module:
    """A twin with buffers of its own and dropout off; `norms_only`: in training mode are only norms that are so in `model`."""
    twin = Twin(model)
    own: dict[int, Tensor] = {}
    for m in twin.modules():
        for name, b in m._buffers.items():
            if b is not None:
                m._buffers[name] = made = own.get(id(b), b.detach().clone().requires_grad_(b.requires_grad))
                own[id(b)] = own[id(made)] = made
        if isinstance(m, _DropoutNd) or (norms_only and not isinstance(m, _NormBase)):
            m.training = False
        elif isinstance(m, (nn.RNNBase, nn.MultiheadAttention)):
            m.dropout = 0.0
    return twin.module


def _draws(model: nn.Module, args: Any, kwargs: Any) -> bool:
    """Whether a call draws random numbers, other than dropout that is off."""
    devices = {x.device for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.is_cuda}

    def states() -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in devices)]

    before = states()
    with torch.no_grad():
        model(*args, **kwargs)
    return not all(map(torch.equal, before, states()))


class OrderedGradients(TorchFunctionMode):
    """Gradients reach batch norms in the order of memory of their outputs.

    PyTorch's own backward of a batch norm in training is wrong on the CPU where one image lies in the usual order and its
    gradient channels-last (`bn(x).flatten(2).transpose(1, 2)`): it takes both to lie alike.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As without."""
        y = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") == "batch_norm" and y.requires_grad:
            strides = y.stride()
            y.register_hook(lambda g: torch.empty_strided(g.shape, strides, dtype=g.dtype, device=g.device).copy_(g))
        return y


def _precision(model: nn.Module, leaves: list[Any]) -> torch.dtype:
    """The coarsest that it computes in; float64 where there are integers only."""
    tensors = [*model.parameters(), *(x for x in leaves if isinstance(x, Tensor))]
    found = {x.real.dtype for x in tensors if x.is_complex()} | {x.dtype for x in tensors if x.is_floating_point()}
    found |= {d for d in {autocast_dtype(x.device) for x in tensors} if d is not None}
    return max(found, key=lambda d: torch.finfo(d).eps, default=torch.float64)


def _shrunk(leaves: Sequence[Any], limit: int | None) -> list[Any]:
    return [
        torch.rand(
            [min(n, limit or n) if d >= 2 else n for d, n in enumerate(x.shape)], dtype=x.dtype, device=x.device
        ).requires_grad_(x.requires_grad)
        if isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())
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


def _values(run: nn.Module, owner: nn.Module, args: Any, kwargs: Any, grad: bool) -> Found:
    """Outputs, buffers, and the gradients of a sum over outputs with fixed weights, by name."""
    torch.manual_seed(0)
    with torch.set_grad_enabled(grad):
        outputs = [y for y in pytree.tree_leaves(run(*args, **kwargs)) if isinstance(y, Tensor)]
    found = [(f"output {k}", y.detach()) for k, y in enumerate(outputs)]
    found += [(f"buffer {k}", b.detach().clone()) for k, b in owner.named_buffers()]
    pulled = [y for y in outputs if y.requires_grad]
    if not pulled:
        return found
    given = {f"input {k}": x for k, x in enumerate(pytree.tree_leaves((args, kwargs))) if isinstance(x, Tensor)}
    leaves = {k: x for k, x in (given | dict(owner.named_parameters())).items() if x.requires_grad}
    weights = [torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype, device=y.device).reshape(y.shape) for y in pulled]
    grads = torch.autograd.grad(pulled, list(leaves.values()), weights, allow_unused=True)
    return found + [(f"gradient of {k}", g) for k, g in zip(leaves, grads, strict=True) if g is not None]


def _compare(name: str, options: Options, want: Found, got: Found, precision: torch.dtype) -> None:
    for (what, a), (also, b) in zip(want, got, strict=True):
        kind = what.partition(" ")[0]
        if what == also and a.shape == b.shape and a.dtype == b.dtype:
            said = _difference(kind, a, b, precision, [x for n, x in want if n.startswith(kind)])
        else:
            said = f"is {tuple(b.shape)} {b.dtype}, in the untouched network {tuple(a.shape)} {a.dtype}"
        if said:
            how = (
                f"regions={options.regions}, schedule={options.schedule!r}"
                if options.regions
                else f"memory={options.allowed}"
            )
            raise VerificationError(
                f"{name}: {what} by regions ({how}) {said}. Do not use the result: run the untouched network, and please "
                "report this model."
            )


def _difference(kind: str, a: Tensor, b: Tensor, precision: torch.dtype, alike: list[Tensor]) -> str:
    """In words, or nothing; `alike`: all of the kind, in the untouched network."""
    if not (a.is_floating_point() or a.is_complex()):
        share, allowed = float((a != b).double().mean()) if a.numel() else 0.0, PLACES.get(precision, HALF)
        differs = f"differs from the untouched network in {share:.1%} of its elements (allowed {allowed:.1%})"
        return differs if share > allowed else ""
    a, b = _real(a), _real(b)
    if not all(torch.equal(f(a), f(b)) for f in (torch.isnan, torch.isposinf, torch.isneginf)):
        return "is infinite or no number in other places than in the untouched network"
    allowed = max(TOLERANCE.get(d, HALF) for d in (a.dtype, precision))
    a, b = (x.nan_to_num(0.0, 0.0, 0.0) for x in (a, b))
    if kind == "gradient":
        allowed *= GRADIENT
        apart = float((a - b).norm()) / max(_size(a), NOISE * max(map(_size, alike)), LEAST)
    else:
        largest = max((_largest(x) for x in alike), default=0.0) if kind == "buffer" else 0.0
        apart = _largest(a - b) / max(_largest(a), NOISE * largest, LEAST)
    differs = f"differs from the untouched network by {apart:.2e} of its largest value (allowed {allowed:.0e})"
    return "" if apart <= allowed else differs


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def _largest(x: Tensor) -> float:
    finite = _real(x).double().nan_to_num(0.0, 0.0, 0.0)
    return float(finite.abs().max()) if x.numel() else 0.0


def _size(x: Tensor) -> float:
    return float(_real(x).double().nan_to_num(0.0, 0.0, 0.0).norm())
