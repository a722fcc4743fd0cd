"""One call of a training program, as autograd sees it: backward runs the backward program. Enter at `Run.apply`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ranger_nn.core.graph import CONSTANT
from ranger_nn.errors import GradientError
from ranger_nn.torch.ready import Ready

MOVES = {"update_buffer", "running_statistics"}
"""Operators that move buffers, once for each forward."""


class Run(torch.autograd.Function):
    """A call that can be differentiated once."""

    @staticmethod
    def forward(ctx: Any, progress: Callable[[int], None] | None, ready: Ready, *tensors: Tensor) -> Any:
        """The outputs."""
        graph, device = ready.captured.graph, ready.engine.device
        ctx.rng = _random_state(device) if any(n.random for n in graph.nodes) else None
        ctx.before = {k: tensors[k].clone() for k in _external(ready, {"read_buffer"})}
        ctx.moved = {k: tensors[k] for k in _external(ready, MOVES)}
        slots = ready.execute(tensors, progress)
        ctx.progress, ctx.ready = progress, ready
        # Buffers that forward moves are not among them: backward reads none, and the next call moves them again.
        ctx.save_for_backward(*(t for k, t in enumerate(tensors) if k not in ctx.moved))
        ctx.kept = slots
        results = tuple(ready.output(v, slots) for v in graph.outputs)
        fixed = [r for v, r in zip(graph.outputs, results, strict=True) if not graph.values[v].differentiable]
        ctx.mark_non_differentiable(*fixed)
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        """The gradients of all tensors."""
        ready: Ready = ctx.ready
        saved = iter(ctx.saved_tensors)
        tensors = [ctx.moved[k] if k in ctx.moved else next(saved) for k in range(len(ctx.needs_input_grad) - 2)]
        # Autograd computes with gradients on exactly where create_graph=True asks for a gradient of the gradient.
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*tensors, *grads)):
            raise GradientError(
                f"create_graph=True: {ready.captured.graph.name} runs by regions, and its gradient cannot be differentiated "
                "again: what depends on it would be left out of the sum. Use the untouched module for this loss (.module), "
                "or leave create_graph out."
            )
        kept, ctx.kept = ctx.kept, None
        if kept is None:
            with _replayed(ctx.rng, ready.engine.device):  # a second time: the same random numbers again
                kept = ready.execute(_aside(ready, tensors, ctx.before), ctx.progress)
        found = ready.pull_back(tensors, kept, grads)
        return (None, None, *found)


def _external(ready: Ready, operators: Collection[str]) -> list[int]:
    """Places, among the tensors of a call, of the buffers that these operators take."""
    read = {v for node in ready.planned.graph.nodes if node.op in operators for v in node.inputs}
    values = ready.planned.graph.values
    return [k for k, v in enumerate(ready.captured.sources) if v in read and values[v].kind == CONSTANT]


def _aside(ready: Ready, tensors: Sequence[Tensor], before: Mapping[int, Tensor]) -> list[Tensor]:
    """The tensors with copies of the buffers that forward updates, as they were: a call updates them once."""
    found = list(tensors)
    for k in _external(ready, MOVES):
        found[k] = before.get(k, tensors[k]).clone()
    return found


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Of the processor, and of the device that kernels draw on."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextmanager
def _replayed(state: tuple[Tensor, Tensor | None] | None, device: torch.device) -> Iterator[None]:
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices, enabled=state is not None):
        if state is not None:
            torch.set_rng_state(state[0])
            if state[1] is not None:
                torch.cuda.set_rng_state(state[1], device)
        yield
