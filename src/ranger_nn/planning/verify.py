"""Check a program by code that did not make it: every slot read is alive, every output written, the peak re-counted.

Shares nothing with the lowering but the instruction format.
"""

from __future__ import annotations

from ranger_nn.core.graph import COMPUTED, Graph
from ranger_nn.core.program import ALLOC, RUN, WRITE, Program
from ranger_nn.errors import PlanError


def verify_program(program: Program, graph: Graph, before: Program | None = None) -> None:
    """Raise PlanError where an instruction reads a slot that is not alive, or an output is not covered once."""
    alive = set(program.external.values()) | set(program.grads.values())
    if before is not None:
        alive |= _left_by(before)
    written: dict[int, int] = {}
    direct: set[int] = set()
    for n, i in enumerate(program.instructions):
        for read in i.reads:
            for slot, cuts in read.parts:
                if slot not in alive:
                    raise PlanError(f"instruction {n} ({i.op}) reads slot {slot}, which is not alive")
                if any(start < 0 or length < 0 for _, start, length in cuts):
                    raise PlanError(f"instruction {n} ({i.op}) reads outside of slot {slot}: {cuts}")
        alive.update(i.outs)
        for slot in i.frees:
            if slot not in alive:
                raise PlanError(f"instruction {n} ({i.op}) frees slot {slot} twice")
            alive.discard(slot)
        if i.op == WRITE:
            size = 1
            for lo, hi in i.out_box:
                size *= hi - lo
            written[i.value] = written.get(i.value, 0) + size
        elif i.op == RUN and i.node >= 0:
            direct.update(graph.nodes[i.node].outputs)
    allocated = {i.value for i in program.instructions if i.op == ALLOC}
    for v in allocated:
        whole = 1
        for size in graph.values[v].shape:
            whole *= size
        if written.get(v, 0) != whole:
            raise PlanError(f"value {v} has {whole} elements but {written.get(v, 0)} were written")
    if before is None:
        for v in graph.outputs:
            if graph.values[v].kind == COMPUTED and v not in program.results:
                raise PlanError(f"output {v} is not computed")


def _left_by(program: Program) -> set[int]:
    alive = set(program.external.values())
    for i in program.instructions:
        alive.update(i.outs)
        alive.difference_update(i.frees)
    return alive
