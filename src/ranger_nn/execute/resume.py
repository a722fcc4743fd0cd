"""Go on with a program in the middle: which instructions must run again so that the rest finds what it reads.

At the end of a region some slots are alive: windows of rows yet to be read, states of reductions, finished reductions.
States cannot be had without all regions before, so they are kept on disk (`kept`). Windows are computed again: from the
slots that the rest of the program reads, backwards to inputs, stored values and kept slots.

    instructions   ....x..xx.xxx | rest          x: read by what is alive, directly or not: the halo, not the area

What runs again are the very same instructions on the very same regions, so the numbers are the same to the bit.
Where steps of a rolled plan are instructions, each makes all windows from those of the step before; but none depends on more than so
many of them (`Program.settles`), which run again from windows of zeros.
Values between sweeps are on disk (`Schedule.disk`), so writing them is not repeated. Enter at `replay`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from ranger_nn.core.program import ALLOC, FINISH, LIFT, MERGE, RUN, STEP, WRITE, Instruction, Program

STATES = (LIFT, MERGE, FINISH)


@dataclass(frozen=True)
class Boundary:
    """The end of a region: `at` is the first instruction after it; `states` the slots alive that must be kept."""

    region: int
    at: int
    states: tuple[int, ...]


def boundaries(program: Program, lasting: Collection[int]) -> list[Boundary]:
    """The end of every region, in order.

    Args:
        program: a forward program whose stored values are on disk.
        lasting: nodes whose results are kept like states: they run once on whole values.
    """
    found: list[Boundary] = []
    states: dict[int, None] = {}
    region = None
    for n, i in enumerate(program.instructions):
        if region is not None and i.region != region:
            found.append(Boundary(region, n, tuple(states)))
        region = i.region
        if i.op in STATES or (i.op == RUN and i.node in lasting):
            states.update(dict.fromkeys(i.outs))
        for slot in i.frees:
            states.pop(slot, None)
    if region is not None:
        found.append(Boundary(region, len(program.instructions), tuple(states)))
    return found


def replay(program: Program, boundary: Boundary) -> list[Instruction]:
    """The instructions before a boundary that must run again, in order, with frees of their own."""
    before, after = program.instructions[: boundary.at], program.instructions[boundary.at :]
    made = {slot for i in before for slot in i.outs}
    kept = set(boundary.states)
    live = {slot for i in after for slot in _read(i)} & made
    live |= {slot for slot in program.results.values() if slot in made}
    needed = live - kept
    chosen: list[Instruction] = []
    steps = dict(program.settles)
    for i in reversed(before):
        if i.op == STEP and needed & set(i.outs):
            if not steps[i.sweep]:  # windows of zeros do as well from here on
                continue
            steps[i.sweep] -= 1
        if i.op == WRITE or not needed & set(i.outs):
            if i.op == ALLOC:
                chosen.append(replace(i, frees=[]))
            continue
        needed -= set(i.outs)
        needed |= _read(i) & made - kept
        chosen.append(replace(i, frees=[]))
    chosen.reverse()
    _free(chosen, live | kept)
    return chosen


def _read(i: Instruction) -> set[int]:
    return {slot for read in i.reads for slot, _ in read.parts}


def _free(chosen: list[Instruction], live: Collection[int]) -> None:
    """Drop each slot after its last use among the chosen, unless the rest reads it."""
    last: dict[int, int] = {}
    for n, i in enumerate(chosen):
        last.update(dict.fromkeys((*i.outs, *_read(i)), n))
    made = {slot for i in chosen for slot in i.outs}
    for slot, n in last.items():
        if slot in made and slot not in live and chosen[n].op != ALLOC:
            chosen[n].frees.append(slot)
