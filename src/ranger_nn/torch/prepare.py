"""A plan for an image in a file: the program of `regionalize` for a network whose input and stored values live on disk.

Enter at `prepare`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ranger_nn.core.graph import Graph
from ranger_nn.errors import CaptureError, InputError
from ranger_nn.execute.files.order import Order
from ranger_nn.execute.files.prepare import Opened, fitted, opened
from ranger_nn.execute.files.prepared import Lowered, Prepared, check_pictures
from ranger_nn.io.naming import labels
from ranger_nn.io.pixels import Pixels
from ranger_nn.planning.search import Options, make_plan
from ranger_nn.torch.capture import Captured, capture
from ranger_nn.torch.files import TorchFiles
from ranger_nn.torch.module import Memory, Regional, example_inputs

MOST_STEPS = 256


def prepare(
    model: nn.Module,
    source: Any,
    memory: Memory = None,
    *,
    pixels: Pixels | None = None,
    axes: str | None = None,
    level: int = 0,
    regions: Sequence[int] | None = None,
    schedule: str | None = None,
    skip_bad: bool = False,
    device: str | torch.device = "cpu",
) -> Prepared:
    """The plan of a run; nothing is computed. Arguments and errors as for `ranger_nn.run`."""
    model = model.module if isinstance(model, Regional) else model
    if not isinstance(model, nn.Module):
        raise InputError(f"run takes a torch.nn.Module, got {type(model).__name__}")
    with opened(source, memory, Order(), pixels=pixels, axes=axes, level=level, skip_bad=skip_bad) as where:
        captured = _captured(model, where)
        chosen = replace(Options.checked(where.allowed, regions, schedule), disk=True, most_steps=MOST_STEPS)

        def make(allowed: int | None) -> Lowered:
            planned = make_plan(captured.graph, replace(chosen, allowed=allowed), False)
            return Lowered(planned.graph, planned.forward, planned.plan)

        lowered, in_flight = fitted(make, where, captured.graph.name)
        framework = TorchFiles(model, captured, lowered.graph, torch.device(device))
        names = _labels(captured, lowered.graph)
        made = Prepared(framework, where.source, where.reader, where.pixels, lowered, names, where.allowed, in_flight)
        check_pictures(made, where.hint)
        return made


def _labels(captured: Captured, graph: Graph) -> dict[int, str]:
    """Of each output the key of the dictionary that the model gives, or a number."""
    tree = captured.rebuild([_Slot(v) for v in captured.output_values])
    keys: dict[int, list[object]] = {}
    for path, leaf in pytree.tree_flatten_with_path(tree)[0]:
        if isinstance(leaf, _Slot):
            keys.setdefault(
                leaf.value, [getattr(k, "key", getattr(k, "idx", getattr(k, "name", str(k)))) for k in path]
            )
    outputs = dict.fromkeys(graph.outputs)
    return dict(zip(outputs, labels([keys.get(v, [n]) for n, v in enumerate(outputs)]), strict=True))


@dataclass(frozen=True)
class _Slot:
    """A value's place among a model's outputs."""

    value: Any


class _Copied(nn.Module):
    """`model` between copies: rows of the input are read from the file once, outputs have no other reader."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training  # archives of torch.export have no `train`
        self.name_in_errors = type(model).__name__

    def forward(self, x: Tensor) -> Any:
        """model(x)."""
        return pytree.tree_map(lambda y: _copied(y) if isinstance(y, Tensor) else y, self.model(_copied(x)))


def _copied(x: Tensor) -> Tensor:
    """The same numbers by an operator of its own: a clone would be no node."""
    return torch.logical_or(x, x) if x.dtype == torch.bool else x * 1


def _named(captured: Captured, model: nn.Module) -> Captured:
    """With the names of `model` and its modules, not of the wrapper."""
    nodes = tuple(replace(n, where=n.where.removeprefix("model").removeprefix(".")) for n in captured.graph.nodes)
    return replace(captured, graph=replace(captured.graph, name=type(model).__name__, nodes=nodes))


def _captured(model: nn.Module, where: Opened) -> Captured:
    copied = _Copied(model)
    try:
        with torch.no_grad():
            return _named(capture(copied, example_inputs(copied, where.shape), grad=False), model)
    except (InputError, CaptureError) as error:
        if not where.hint:
            raise
        raise type(error)(f"{error}{where.hint}") from error
