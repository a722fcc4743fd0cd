"""A plan for an image in a file: the steps of a Keras model's plan, one by one, with what lies between sweeps in files.

Regions are rows of the input, as many as the memory allows: the plan with the longest steps that fit. Enter at `prepare`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import keras
from keras import KerasTensor, ops, tree

from ranger_nn.core.graph import Graph
from ranger_nn.errors import InputError, RangerError
from ranger_nn.execute.files.order import Order
from ranger_nn.execute.files.prepare import Opened, first_fitting, opened
from ranger_nn.execute.files.prepared import Lowered, Prepared, check_pictures
from ranger_nn.execute.files.steps import written_out
from ranger_nn.execute.files.steps_bytes import counted
from ranger_nn.io.naming import labels
from ranger_nn.io.pixels import Pixels
from ranger_nn.keras.capture import Captured
from ranger_nn.keras.files import KerasFiles
from ranger_nn.keras.model import Memory, captured_for, input_dtype, untouched
from ranger_nn.planning.rolled_search import Rolled, make_rolled
from ranger_nn.planning.search import STEP_BYTES, Options, with_margin


def prepare(
    model: Any,
    source: Any,
    memory: Memory = None,
    *,
    pixels: Pixels | None = None,
    axes: str | None = None,
    level: int = 0,
    regions: Sequence[int] | None = None,
    schedule: str | None = None,
    skip_bad: bool = False,
    device: str = "cpu",
) -> Prepared:
    """The plan of a run; nothing is computed. Arguments and errors as for `ranger_nn.run`.

    Raises:
        InputError: a model of several inputs, or one that assigns Variables, adds losses or gives masks in inference; a
            `device`, which is Keras's to choose.
    """
    model = untouched(model)
    if str(device) != "cpu":
        raise InputError(f"device={device!r}: a Keras model runs where Keras puts it; leave device out")
    order = Order(keras.config.image_data_format() == "channels_last")
    with opened(source, memory, order, pixels=pixels, axes=axes, level=level, skip_bad=skip_bad) as where:
        captured = _captured(model, where)
        options = Options.checked(where.allowed, regions, schedule)
        lowered, in_flight = first_fitting(_shorter(captured, options), where, model.name)
        framework = KerasFiles(model, captured, lowered.rolled, order.last)
        names = _labels(captured, lowered.graph)
        made = Prepared(framework, where.source, where.reader, where.pixels, lowered, names, where.allowed, in_flight)
        check_pictures(made, where.hint)
        return made


class _Copied(keras.Model):
    """`model` between copies: rows of the input are read from the file once, outputs have no other reader."""

    def __init__(self, model: Any) -> None:
        super().__init__(name=model.name)
        self.model = model

    def call(self, x: Any) -> Any:
        """model(x)."""
        return tree.map_structure(_copied, self.model(_copied(x), training=False))


def _copied(x: Any) -> Any:
    return ops.logical_or(x, x) if keras.backend.standardize_dtype(x.dtype) == "bool" else ops.multiply(x, 1)


def _captured(model: Any, where: Opened) -> Captured:
    inputs = tree.flatten(getattr(model, "inputs", None) or [None])
    if len(inputs) != 1:
        raise InputError(f"{model.name} takes {len(inputs)} inputs, and a run from file to file has one")
    try:
        found = captured_for(_Copied(model), KerasTensor(where.shape, dtype=input_dtype(model)), False)
    except RangerError as error:
        raise type(error)(f"{error}{where.hint}") from error
    said = {"assigns Variables": found.updates, "adds losses": found.losses, "gives masks": any(found.masks)}
    for what, some in said.items():
        if some:
            raise InputError(
                f"{model.name} {what} in inference, which a run from file to file does not do: use predict"
            )
    return found


def _labels(captured: Captured, graph: Graph) -> dict[int, str]:
    """Of each output the key of the dictionary that the model gives, or a number."""
    keys: dict[int, list[object]] = {}
    for path, v in tree.flatten_with_path(captured.pack(captured.outputs)):
        keys.setdefault(v, list(path))
    outputs = dict.fromkeys(graph.outputs)
    return dict(zip(outputs, labels([keys.get(v, [n]) for n, v in enumerate(outputs)]), strict=True))


@dataclass(frozen=True)
class _Stepped(Lowered):
    """And the rolled plan of which the program is written out."""

    rolled: Rolled


def _shorter(captured: Captured, options: Options) -> Iterator[tuple[_Stepped, str]]:
    """Plans, and the node that binds each: rows of a step are halved; where the user says how many, there is one plan."""
    if options.regions is not None:
        yield _with(captured, options, options.regions)
        return
    rows = _first_rows(captured.graph)
    while True:
        yield _with(captured, options, (rows,))
        if rows == 1:
            return
        rows = -(-rows // 2)


def _with(captured: Captured, options: Options, regions: tuple[int, ...]) -> tuple[_Stepped, str]:
    rolled = make_rolled(captured.graph, replace(options, allowed=None, regions=regions), False)
    program = written_out(rolled, captured.sources)
    peak, binding = counted(program, rolled)
    node = rolled.graph.nodes[binding]
    plan = replace(rolled.plan, allowed=options.allowed, projected=with_margin(peak))
    name = f"{node.name} ({node.where})" if node.where else node.name
    return _Stepped(rolled.graph, program, plan, rolled), name


def _first_rows(graph: Graph) -> int:
    """Rows of the input with which a step makes as much of the largest value as stays in the last-level cache."""
    (v,) = graph.inputs
    dim = 1 if graph.values[v].layout else 2
    rows = graph.values[v].shape[min(dim, len(graph.values[v].shape) - 1)]
    largest = max((graph.values[u].nbytes for n in graph.nodes for u in n.outputs), default=1)
    return max(1, min(rows, rows * STEP_BYTES // max(1, largest)))
