"""Bytes that a rolled plan needs step by step, between files: counted from the instructions. Enter at `counted`.

Two things differ from the plan in memory: inputs and results of sweeps live in files, and between two steps the old windows and
the new ones are there at once, since both are values that one call takes and gives.
"""

from __future__ import annotations

from ranger_nn.core.program import BEGIN, FINISH, MERGE, RUN, STEP, TRIM, Instruction, Program
from ranger_nn.planning.rolled import Loop
from ranger_nn.planning.rolled_cost import in_step, row_bytes
from ranger_nn.planning.rolled_search import Rolled


def counted(program: Program, rolled: Rolled) -> tuple[int, int]:
    """(bytes at the peak, the node that binds); parameters are not counted, nor what is being read and written."""
    graph = rolled.graph
    held: dict[int, int] = {}
    worst = (0, -1)
    steps = {at: in_step(graph, loop) for at, loop in enumerate(rolled.loops) if loop is not None}
    for i in program.instructions:
        made = _made(i, rolled)
        during, where = steps[i.sweep] if i.op == STEP else (sum(made) + _beside(i, rolled), i.node)
        worst = max(worst, (sum(held.values()) + during, where))
        held |= zip(i.outs, made, strict=True)
        for slot in i.frees:
            held.pop(slot, None)
    return worst


def _made(i: Instruction, rolled: Rolled) -> list[int]:
    """Bytes of each result; handles of files are none, states of reductions next to none."""
    graph = rolled.graph
    if i.op == RUN:
        return [graph.values[v].nbytes for v in graph.nodes[i.node].outputs]
    if i.op in (TRIM, FINISH):
        return [graph.values[i.value].nbytes]
    loop = rolled.loops[i.sweep]
    if loop is None or i.op not in (BEGIN, STEP):
        return [0] * len(i.outs)
    windows = sum(f.kept * row_bytes(graph, f) for f in loop.flows.values())
    if i.op == BEGIN:
        return [windows]
    rows = [loop.flows[v].rate * row_bytes(graph, loop.flows[v]) for v in loop.sinks]
    return [windows, *rows, *_lifted(rolled, loop)]


def _lifted(rolled: Rolled, loop: Loop) -> list[int]:
    found = []
    for call in loop.calls:
        if call.lifts:
            take, values = call.takes[0], rolled.graph.values
            found.append(take.length * (values[take.value].nbytes // max(1, values[take.value].shape[take.dim])))
    return found


def _beside(i: Instruction, rolled: Rolled) -> int:
    """Workspace of a call, and what it reads from files."""
    graph = rolled.graph
    loaded = sum(r.nbytes for r in i.reads if r.loaded)
    if i.op == RUN:
        node = graph.nodes[i.node]
        out, given = sum(_made(i, rolled)), [graph.values[v].nbytes for v in node.inputs]
        return loaded + int(node.kernel.scratch(out, given))
    loop = rolled.loops[i.sweep]
    if i.op == MERGE and loop is not None:
        calls = [c.node for c in loop.calls if c.lifts]
        return int(graph.nodes[i.node].kernel.scratch(0, [_lifted(rolled, loop)[calls.index(i.node)]]))
    return loaded
