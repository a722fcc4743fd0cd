"""A run that is ready to begin: a plan for an image in a file, and all that it is made of. Enter at `Prepared`."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from math import prod
from typing import Any

from ranger_nn.core.graph import Graph
from ranger_nn.core.program import ALLOC, RUN, Instruction, Program
from ranger_nn.errors import InputError
from ranger_nn.execute.files.expected import expected_seconds
from ranger_nn.execute.files.framework import Framework
from ranger_nn.execute.files.handle import written_boxes
from ranger_nn.execute.files.order import Order
from ranger_nn.execute.resume import Boundary, boundaries, replay
from ranger_nn.io.journal import UNKNOWN
from ranger_nn.io.pixels import Pixels
from ranger_nn.io.protocol import Source
from ranger_nn.io.reader import Reader
from ranger_nn.planning.budget import format_bytes
from ranger_nn.planning.report import Plan


@dataclass(frozen=True)
class Lowered:
    """A plan, and the program over files that it was lowered to."""

    graph: Graph
    program: Program
    plan: Plan


@dataclass
class Prepared:
    """A plan for a source, and what it is made of. `projected` (bytes) counts reading and writing too.

    `labels`: parts of the names of outputs; see `io.naming`.
    """

    framework: Framework
    source: Source
    reader: Reader
    pixels: Pixels
    lowered: Lowered
    labels: dict[int, str]
    allowed: int | None
    in_flight: int

    @property
    def model(self) -> Any:
        """The caller's."""
        return self.framework.model

    @property
    def graph(self) -> Graph:
        """The network, as it was planned."""
        return self.lowered.graph

    @property
    def program(self) -> Program:
        """What is run."""
        return self.lowered.program

    @property
    def plan(self) -> Plan:
        """The plan of the program."""
        return self.lowered.plan

    @property
    def order(self) -> Order:
        """Where channels are."""
        return Order(self.framework.channels_last)

    @property
    def projected(self) -> int:
        """Bytes of the program, of reading ahead and of writing."""
        return self.plan.projected + self.in_flight

    def __str__(self) -> str:
        """The plan, and what files add."""
        return f"{self.plan}\nreading and writing {format_bytes(self.in_flight)}, in all {format_bytes(self.projected)}"

    @property
    def source_bytes(self) -> int:
        """Bytes of the input's pixels."""
        return prod(self.source.shape) * self.source.dtype.itemsize

    def expected_seconds(self) -> float:
        """About how long kernels take: timed on a region of each sweep, with made-up values."""
        return expected_seconds(self.graph, self.program, self.framework)

    def pictures(self) -> list[int]:
        """Outputs that are written region by region."""
        made = {i.value for i in self.program.instructions if i.op == ALLOC}
        return [v for v in dict.fromkeys(self.graph.outputs) if v in made]

    def boundaries(self) -> list[Boundary]:
        """The ends of regions, at which a run can go on."""
        return boundaries(self.program, self._lasting())

    def _lasting(self) -> set[int]:
        """Nodes whose results cannot be had again from a halo: they run on whole values, or hand on a state."""
        values, nodes = self.graph.values, self.graph.nodes
        return {
            i.node
            for i in self.program.instructions
            if i.op == RUN
            and (nodes[i.node].rule.ordered is not None or i.out_box == tuple((0, n) for n in values[i.value].shape))
        }

    def rest(self, done: Boundary | None) -> list[Instruction]:
        """All instructions, or behind a boundary what must run again and the rest."""
        if done is None:
            return self.program.instructions
        return [*replay(self.program, done), *self.program.instructions[done.at :]]

    def notes(self) -> list[str]:
        """What the input's header says and is not acted upon."""
        found = list(getattr(self.source, "notes", list)())
        return [n for n in found if self.pixels.nodata is None or "stands for no data" not in n]

    def identity(self) -> dict[str, Any]:
        """What tells this model, input and plan from others: plain data."""
        nodes = "\n".join(f"{n.op} {n.inputs} {n.outputs} {n.rule}" for n in self.graph.nodes)
        values = "\n".join(f"{v.shape} {v.dtype} {v.kind} {v.layout}" for v in self.graph.values)
        steps = "\n".join(f"{i.op} {i.node} {i.outs} {i.out_box} {i.region}" for i in self.program.instructions)
        text = self.framework.written_out()
        return {
            "model": {
                "operators": text if text.startswith(UNKNOWN) else _hash(f"{nodes}\n{text}\n{values}"),
                "weights": self.framework.weights(),
            },
            "input": self.source.identity() | {"pixels": str(self.pixels)},
            "plan": {"memory": self.allowed, "steps": _hash(steps)},
            "versions": self.framework.versions(),
        }


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def check_pictures(made: Prepared, hint: str) -> None:
    """What is written region by region is one picture in sizes and in meaning: regions are of rows and columns.

    Args:
        made: the run.
        hint: how the axes of the input were guessed, for the error.

    Raises:
        InputError: an output is something else.
    """
    boxes = written_boxes(made.program.instructions)
    rank = len(made.graph.values[made.graph.inputs[0]].shape)
    shapes = [made.graph.values[v].shape for v in dict.fromkeys(made.graph.outputs)]
    strange = [s for s in shapes if len(s) == rank and s[0] != 1]
    if hint and strange:
        raise InputError(
            f"{made.graph.name} gives an output of shape {strange[0]}, whose first axis is no batch of one.{hint}"
        )
    for v in made.pictures():
        shape = made.graph.values[v].shape
        cut = [d for d in made.order.others(len(shape)) if any(b[d] != (0, shape[d]) for b in boxes[v])]
        if len(shape) >= 3 and shape[0] == 1 and not cut:
            continue
        why = f"is cut along axis {cut[0]}" if cut else "has another number of axes, or a batch of more than one"
        raise InputError(
            f"{made.graph.name} gives an output of shape {shape}, which {why}: a result is {_WANTED[made.order.last]}{hint}"
        )


_WANTED = {
    False: "(1, channels, rows, columns), cut along rows and columns. Let the model give that, for example with "
    "y.unsqueeze(1) or y.permute(0, 3, 1, 2).",
    True: "(1, rows, columns, channels), cut along rows and columns. Let the model give that, for example with "
    "keras.ops.expand_dims(y, -1).",
}
