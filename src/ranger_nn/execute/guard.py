"""The guard: on the first run of a plan every result is held to the shape and dtype of its region.

What a plan says and what a kernel does come from different code. Where they part (a kernel that is given rows which the
region did not ask for, a join of one row too many) the next operator often runs all the same, on wrong numbers. Shapes
depend on the plan alone, so one run is enough. Enter at `guarded`.

    RUN          the node's region, its other outputs whole        VJP, REDUCE_VJP   the regions of the inputs
    WRITE, ADD   the region that is written or added to            FINISH            the whole value
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ranger_nn.core.graph import Graph
from ranger_nn.core.program import ADD, FINISH, REDUCE_VJP, RUN, VJP, WRITE, Instruction
from ranger_nn.core.reach import Box
from ranger_nn.errors import PlanError
from ranger_nn.execute.machine import Step

Form = tuple[tuple[int, ...], str]
"""Shape and dtype of a tensor."""


def lengths(box: Box) -> tuple[int, ...]:
    """Sizes of a region."""
    return tuple(hi - lo for lo, hi in box)


def expected(i: Instruction, graph: Graph) -> list[Form] | None:
    """What the results of an instruction must be, in the order of its slots; None where nothing is said."""
    values = graph.values
    if i.op == FINISH:
        return [(values[i.value].shape, values[i.value].dtype)]
    if i.op not in (RUN, VJP, REDUCE_VJP):
        return None
    node = graph.nodes[i.node]
    if i.op == RUN:
        first, *others = node.outputs
        return [(lengths(i.out_box), values[first].dtype), *((values[v].shape, values[v].dtype) for v in others)]
    wanted = i.wanted if i.op == VJP else (True,)
    pairs = zip(node.inputs, i.reads, wanted)  # the reads go on with what backward reads besides
    return [(lengths(read.box), values[v].dtype) for v, read, w in pairs if w]


def guarded(
    steps: Sequence[Step], instructions: Iterable[Instruction], graph: Graph, form: Callable[[Any], Form]
) -> list[Step]:
    """The steps, each of which raises PlanError where its result is not what the plan says; `form` reads a tensor."""
    return [
        (_checked(function, i, graph, form), reads, outs, frees, region)
        for (function, reads, outs, frees, region), i in zip(steps, instructions, strict=True)
    ]


def _checked(
    function: Callable[..., Any], i: Instruction, graph: Graph, form: Callable[[Any], Form]
) -> Callable[..., Any]:
    if i.op in (WRITE, ADD):
        box = i.reads[0].box

        def joined(target: Any, source: Any) -> Any:
            shape, dtype = form(source)
            if shape != lengths(box):  # copies and sums broadcast
                raise _mismatch(i, graph, (shape, dtype), (lengths(box), dtype))
            return function(target, source)

        return joined
    wanted = expected(i, graph)
    if wanted is None:
        return function
    many = len(i.outs) != 1

    def checked(*args: Any) -> Any:
        result = function(*args)
        for found, want in zip(result if many else [result], wanted, strict=True):
            if form(found) != want:
                raise _mismatch(i, graph, form(found), want)
        return result

    return checked


def _mismatch(i: Instruction, graph: Graph, found: Form, want: Form) -> PlanError:
    k = i.node
    if k < 0:
        k = next((k for k, n in enumerate(graph.nodes) if i.value in n.outputs), -1)
    node = graph.nodes[k] if k >= 0 else None
    name = graph.values[i.value].name if node is None else node.name + (f" ({node.where})" if node.where else "")
    box = i.out_box or i.reads[0].box
    return PlanError(
        f"{graph.name}: {name} gave shape {found[0]}, {found[1]} in step '{i.op}' of region {box}, and the plan asks for "
        f"shape {want[0]}, {want[1]}. Nothing is computed from it. This is a defect in Ranger: please report the network; "
        "without memory=, regions= and schedule= it may run in one region."
    )
