"""A plan for an image in a file: the program of `regionalize` for a network whose input and stored values live on disk.

What is read ahead and what waits to be written takes memory too, and how much depends on the plan's regions: the plan is
made with what they leave, a few times at most. Enter at `prepare`.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ranger_nn.core.graph import Graph
from ranger_nn.core.program import ALLOC, RUN, WRITE, Program
from ranger_nn.errors import BudgetError, CaptureError, InputError
from ranger_nn.io.naming import labels
from ranger_nn.io.pixels import Pixels
from ranger_nn.io.protocol import Source, nbytes
from ranger_nn.io.reader import Reader
from ranger_nn.io.sources import open_source
from ranger_nn.planning.budget import format_bytes, parse_memory
from ranger_nn.planning.report import Plan
from ranger_nn.planning.search import Options, Planned, make_plan
from ranger_nn.torch.capture import Captured, capture
from ranger_nn.torch.expected import expected_seconds
from ranger_nn.torch.files import AHEAD, loaded_boxes, written_boxes
from ranger_nn.torch.module import Memory, Regional, example_inputs

MOST_STEPS = 256
ROUNDS = 4
READING_SHARE = 2
"""What the input's store decodes at once may take half of the memory."""


@dataclass
class Prepared:
    """A plan for a source, and what it is made of. `projected` (bytes) counts reading and writing too."""

    model: nn.Module
    source: Source
    reader: Reader
    pixels: Pixels
    captured: Captured
    planned: Planned
    device: torch.device
    allowed: int | None
    in_flight: int

    @property
    def graph(self) -> Graph:
        """The network, as it was planned."""
        return self.planned.graph

    @property
    def program(self) -> Program:
        """What is run."""
        return self.planned.forward

    @property
    def plan(self) -> Plan:
        """The plan of the program."""
        return self.planned.plan

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
        return expected_seconds(self.graph, self.program, self.externals(), self.device)

    def pictures(self) -> list[int]:
        """Outputs that are written region by region."""
        made = {i.value for i in self.program.instructions if i.op == ALLOC}
        return [v for v in dict.fromkeys(self.graph.outputs) if v in made]

    def lasting(self) -> set[int]:
        """Nodes whose results cannot be had again from a halo: they run on whole values, or hand on a state."""
        values, nodes = self.graph.values, self.graph.nodes
        return {
            i.node
            for i in self.program.instructions
            if i.op == RUN
            and (nodes[i.node].rule.ordered is not None or i.out_box == tuple((0, n) for n in values[i.value].shape))
        }

    def externals(self) -> list[Tensor | None]:
        """Parameters and constants in the program's order; None for the input."""
        found: list[Tensor | None] = []
        for kind, where in self.captured.sources.values():
            if kind == "input":
                found.append(None)
            elif kind == "state":
                owner, _, name = where.removeprefix("model.").rpartition(".")
                found.append(getattr(self.model.get_submodule(owner), name).detach().to(self.device))
            else:
                found.append(where.to(self.device))
        return found

    def labels(self) -> dict[int, str]:
        """Parts of the names of outputs: keys of the dictionary that the model gives, or numbers; see `io.naming`."""
        tree = self.captured.rebuild([_Slot(v) for v in self.captured.output_values])
        keys: dict[int, list[object]] = {}
        for path, leaf in pytree.tree_flatten_with_path(tree)[0]:
            if isinstance(leaf, _Slot):
                keys.setdefault(
                    leaf.value, [getattr(k, "key", getattr(k, "idx", getattr(k, "name", str(k)))) for k in path]
                )
        outputs = dict.fromkeys(self.graph.outputs)
        return dict(zip(outputs, labels([keys.get(v, [n]) for n, v in enumerate(outputs)]), strict=True))

    def notes(self) -> list[str]:
        """What the input's header says and is not acted upon."""
        found = list(getattr(self.source, "notes", list)())
        return [n for n in found if self.pixels.nodata is None or "stands for no data" not in n]

    def identity(self) -> dict[str, Any]:
        """What tells this model, input and plan from others: plain data."""
        weights = hashlib.sha256()
        for t in self.externals():
            if t is not None:
                weights.update(f"{t.dtype} {tuple(t.shape)}".encode())
                weights.update(t.contiguous().flatten().view(torch.uint8).cpu().numpy().data)
        nodes = "\n".join(f"{n.op} {n.inputs} {n.outputs} {n.rule}" for n in self.graph.nodes)
        values = "\n".join(f"{v.shape} {v.dtype} {v.kind} {v.layout}" for v in self.graph.values)
        steps = "\n".join(f"{i.op} {i.node} {i.outs} {i.out_box} {i.region}" for i in self.program.instructions)
        return {
            "model": {
                "operators": _hash(f"{nodes}\n{self.captured.text}\n{values}"),
                "weights": weights.hexdigest(),
            },
            "input": self.source.identity() | {"pixels": str(self.pixels)},
            "plan": {"memory": self.allowed, "steps": _hash(steps)},
            "versions": _versions(self.device),
        }


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _versions(device: torch.device) -> dict[str, Any]:
    """What else may change the last bits of a number."""
    cuda = device.type == "cuda"
    kind = device.type
    return {
        "Ranger": importlib.import_module("ranger_nn").__version__,
        "PyTorch": torch.__version__,
        "NumPy": np.__version__,
        "processor": torch.cuda.get_device_name(device) if cuda else torch.backends.cpu.get_cpu_capability(),
        "precision": torch.get_float32_matmul_precision(),
        "oneDNN": torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled,
        "cuDNN": [torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark] if cuda else [],
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "autocast": str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else "off",
    }


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
    """The plan of a run; nothing is computed. Arguments and errors as for `run`."""
    model = model.module if isinstance(model, Regional) else model
    if not isinstance(model, nn.Module):
        raise InputError(f"run takes a torch.nn.Module, got {type(model).__name__}")
    allowed = parse_memory(memory)
    limit = None if allowed is None else allowed // READING_SHARE
    opened = open_source(source, axes, level, limit)
    try:
        reader = Reader(opened, limit, skip_bad)
        pixels = pixels or (Pixels(scale=1.0) if opened.batched else Pixels())
        _check_depth(opened, pixels)
        channels = pixels.channels(opened.shape[0], opened.name)
        shape = (1, channels, *opened.shape[1:])
        copied = _Copied(model)
        with torch.no_grad():
            captured = _named(_captured(copied, shape, opened, axes), model)
        chosen = replace(Options.checked(allowed, regions, schedule), disk=True, most_steps=MOST_STEPS)
        planned, in_flight = _planned(captured.graph, reader, chosen)
        made = Prepared(model, opened, reader, pixels, captured, planned, torch.device(device), allowed, in_flight)
        _check_pictures(made, _hint(opened, shape, axes))
        return made
    except BaseException:
        opened.close()
        raise


def _check_depth(source: Source, pixels: Pixels) -> None:
    depth = getattr(source, "depth", None)  # a user's own source may not tell
    if depth and pixels.scale is None:
        raise InputError(
            f"{source.name} has {depth} bits in {source.dtype}, so that its largest value is {2**depth - 1}, not that of its "
            f"type: say the scale, Pixels(scale=1 / {2**depth - 1}) (--scale {1 / (2**depth - 1):.8g}), or scale=1 for the "
            "numbers as they are."
        )


def _hint(source: Source, shape: tuple[int, ...], axes: str | None) -> str:
    """Where the axes of an array were guessed: how it was taken, and how to say it."""
    if axes is not None or not getattr(source, "guessed", False):
        return ""
    letters = "NC" + "ZYX"[-(len(shape) - 2) :]
    seen = ", ".join(f"{a} {n}" for a, n in zip(letters, shape, strict=True))
    return f" {source.name} was taken as {seen}; if that is wrong, name its axes: of a volume axes='ZYX' or 'CZYX' (--axes)."


def _captured(model: nn.Module, shape: tuple[int, ...], source: Source, axes: str | None) -> Captured:
    try:
        return capture(model, example_inputs(model, shape), grad=False)
    except (InputError, CaptureError) as error:
        hint = _hint(source, shape, axes)
        if not hint:
            raise
        raise type(error)(f"{error}{hint}") from error


def _check_pictures(made: Prepared, hint: str) -> None:
    """What is written region by region is (1, channels, rows, columns) in sizes and in meaning: regions are of rows and columns.

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
        cut = [d for d in range(min(2, len(shape))) if any(b[d] != (0, shape[d]) for b in boxes[v])]
        if len(shape) >= 3 and shape[0] == 1 and not cut:
            continue
        why = f"is cut along axis {cut[0]}" if cut else "has another number of axes, or a batch of more than one"
        raise InputError(
            f"{made.graph.name} gives an output of shape {shape}, which {why}: a result is (1, channels, rows, columns), cut along "
            f"rows and columns. Let the model give that, for example with y.unsqueeze(1) or y.permute(0, 3, 1, 2).{hint}"
        )


def _planned(graph: Graph, reader: Reader, chosen: Options) -> tuple[Planned, int]:
    """(plan, bytes of reading and writing) that fit together.

    Raises:
        BudgetError: they do not.
    """
    in_flight, allowed = reader.held, chosen.allowed
    if allowed is None:
        planned = make_plan(graph, chosen, False)
        return planned, reader.held + _in_flight(graph, planned.forward, reader)
    for _ in range(ROUNDS):
        if in_flight >= allowed:
            break
        try:
            planned = make_plan(graph, replace(chosen, allowed=allowed - in_flight), False)
        except BudgetError as error:
            raise _too_small(graph, reader, chosen, allowed, error) from None
        needed = reader.held + _in_flight(graph, planned.forward, reader)
        if planned.plan.projected + needed <= allowed:
            return planned, needed
        in_flight = max(needed, in_flight + 1)
    raise BudgetError(
        f"{graph.name} on {reader.source.name}: reading ahead and writing take {format_bytes(in_flight)} ({in_flight} bytes) of "
        f"the {format_bytes(allowed)} ({allowed} bytes) allowed, and no plan was found for the rest. Allow "
        f"{2 * in_flight + allowed} bytes, or give regions= with fewer rows.",
        allowed=allowed,
        least=2 * in_flight + allowed,
    )


def _too_small(graph: Graph, reader: Reader, chosen: Options, allowed: int, error: BudgetError) -> BudgetError:
    """The error in terms of what the user allowed: the plan's least, and reading and writing twice (sizes of rows vary)."""
    smallest = make_plan(graph, replace(chosen, allowed=error.least), False)
    beside = 2 * (reader.held + _in_flight(graph, smallest.forward, reader))
    least = (error.least or 0) + beside
    return BudgetError(
        f"{graph.name} on {reader.source.name} does not fit in {format_bytes(allowed)} ({allowed} bytes): the least that a "
        f"plan needs for this input is {format_bytes(error.least or 0)}, bound by {error.binding}, and reading and writing "
        f"take {format_bytes(beside)} beside it. Allow {least} bytes, or use a smaller input.",
        allowed=allowed,
        least=least,
        binding=error.binding,
    )


def _in_flight(graph: Graph, program: Program, reader: Reader) -> int:
    """Bytes of regions that are read ahead (as pixels and as tensor) or wait to be written."""
    (v,) = graph.inputs
    value, source = graph.values[v], reader.source
    boxes = loaded_boxes(program.instructions, program.external[v], value.shape)
    taken = max((nbytes(b[2:], b[1][1] - b[1][0], value.itemsize) for b in boxes), default=0)
    raw = max((nbytes(b[2:], source.shape[0], source.dtype.itemsize) for b in boxes), default=0)
    written = max((r.nbytes for i in program.instructions if i.op == WRITE for r in i.reads[1:]), default=0)
    return (AHEAD + 1) * taken + raw + (AHEAD + 2) * written
