"""Follow a plan's programs, instruction by instruction, on what their slots hold: enter at `check`.

The programs are right where every node is run on the regions that its links ask for, no more and no less, put together from
rows that are there and are those rows; where every reduction has met every row once; where the gradient that a node pulls
back is all that its readers gave; and where no more bytes are held than is said. `core/graph.py`'s links and
`core/program.py`'s instructions are all that is read; nothing is shared with what wrote them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ranger_nn.checking.asked import asked
from ranger_nn.checking.gradients import Gradients
from ranger_nn.checking.numbers import Numbers
from ranger_nn.checking.slots import BUFFER, GRADIENT, STATE, VALUE, Held, Slots, narrowed, volume
from ranger_nn.core import program as P
from ranger_nn.core.graph import Graph, Node
from ranger_nn.core.program import Extent, Instruction, Program, Read
from ranger_nn.core.reach import Box, Interval
from ranger_nn.errors import PlanError


@dataclass(frozen=True)
class Checked:
    """What a check did: instructions followed, reads held to what was asked for, results compared, bytes counted at the peak."""

    instructions: int
    reads: int
    results: int
    peak: int

    def __str__(self) -> str:
        return (
            f"{self.instructions} instructions followed, {self.reads} regions held to what their operator asks for, "
            f"{self.results} results complete, at most {self.peak} bytes held"
        )


def check(
    graph: Graph,
    forward: Program,
    backward: Program | None = None,
    periods: Mapping[int, tuple[int, int]] | None = None,
    on_disk: bool = False,
) -> Checked:
    """Follow the programs of a plan. `periods`: of values on an axis that goes round, dimension and rows after which it
    repeats; `on_disk`: values between sweeps lie in files.

    Raises:
        PlanError: a region is not what its operator asks for, a row is missing, met twice or another one, a slot is read or
            freed that holds nothing, a gradient is not complete, or more bytes are held than is said.
    """
    with np.errstate(over="ignore"):  # sums and products are meant modulo 2**64
        return _Check(graph, forward, backward, periods or {}, on_disk).run()


class _Check:
    """Slots, and what happens to them."""

    def __init__(
        self,
        graph: Graph,
        forward: Program,
        backward: Program | None,
        periods: Mapping[int, tuple[int, int]],
        on_disk: bool,
    ) -> None:
        self.graph, self.forward, self.backward, self.on_disk = graph, forward, backward, on_disk
        self.gradients = Gradients(graph, [p for p in (forward, backward) if p is not None], periods)
        self.slots = Slots(graph)
        self.owner = {v: node for node in graph.nodes for v in node.states}
        self.reads = self.results = 0
        self.do: dict[str, Callable[[Instruction], None]] = {
            P.RUN: self._run, P.VJP: self._pull, P.LIFT: self._lift, P.MERGE: self._merge, P.FINISH: self._finish,
            P.REDUCE_VJP: self._pull_reduction, P.ALLOC: self._alloc, P.ZEROS: self._zeros, P.TRIM: self._copy,
            P.WRITE: self._write, P.ADD: self._add,
        }  # fmt: skip

    def run(self) -> Checked:
        """Both programs, and what they leave."""
        self._follow(self.forward)
        for v in self.graph.outputs:
            if self.graph.values[v].kind == "computed":
                self._output(v)
        count, peak = len(self.forward.instructions), self.forward.peak
        if self.backward is not None:
            given = {v: self.gradients.given(v) for v in self.backward.grads}
            self.expected = self.gradients.expect(given)
            for v, slot in self.backward.grads.items():
                self.slots.hold(slot, Held(GRADIENT, v, numbers=given[v]), 0)
            self._follow(self.backward)
            self._compare(self.backward)
            count, peak = count + len(self.backward.instructions), max(peak, self.backward.peak)
        return Checked(count, self.reads, self.results, peak)

    def _wrong(self, what: str) -> PlanError:
        return PlanError(f"{self.graph.name}: {what}. This is a defect in Ranger: please report the network.")

    def _name(self, v: int) -> str:
        return self.graph.values[v].name

    # ---- instructions -------------------------------------------------------------------------------------------

    def _follow(self, program: Program) -> None:
        slots, most, where = self.slots, -1, None
        for v, slot in program.external.items():
            if slot not in slots.held:
                slots.hold(slot, Held(VALUE, v, self.gradients.full(v)), 0)
        for n, i in enumerate(program.instructions):
            try:
                self.do[i.op](i)
                held = slots.live + slots.joined(i.reads)
                if i.live > most:
                    most, where = i.live, i
                    held += self._workspace(i)
                if held > i.live:
                    raise PlanError(f"it is said to hold {i.live} bytes, and {held} are counted")
                for slot in i.frees:
                    slots.free(slot)
            except (PlanError, ValueError, IndexError) as error:  # the latter: numbers whose shapes do not go together
                name = self.graph.nodes[i.node].name if i.node >= 0 else self._name(i.value)
                raise self._wrong(f"instruction {n} ({i.op} of {name}, sweep {i.sweep}): {error}") from None
        if where is not None and most > program.peak:
            raise self._wrong(f"the peak is said to be {program.peak} bytes, and an instruction holds {most}")

    def _workspace(self, i: Instruction) -> int:
        """What the back end's kernel says that the call takes beside its inputs and results."""
        if i.op not in (P.RUN, P.VJP) or len(self.graph.nodes[i.node].outputs) > 1:
            return 0
        node = self.graph.nodes[i.node]
        boxes = [(v, r.box) for v, r in zip(node.inputs, i.reads)]
        out = self.slots.nbytes(node.outputs[0], i.out_box)
        if i.op == P.RUN:
            return int(node.kernel.scratch(Extent(i.out_box, out, tuple(r.nbytes for r in i.reads), i.reads)))
        sizes = tuple(self.slots.nbytes(v, box) for v, box in boxes)
        return int(node.kernel.vjp_scratch(Extent(i.out_box, out, sizes, i.reads, i.wanted)))

    # ---- reading ------------------------------------------------------------------------------------------------

    def _value(self, read: Read, v: int, behind: int | None = None) -> None:
        """The region of a value that a read stands for is there, and in its place; `behind`: of a state, after how many
        steps.
        """
        if not read.parts:
            if volume(read.box) and self.graph.values[v].itemsize:
                raise PlanError(f"nothing of {self._name(v)} is read where {read.box} is asked for")
            return
        self.reads += 1
        at, many = read.box[read.dim][0] if read.box else 0, len(read.parts) > 1
        for slot, cuts in read.parts:
            held = self.slots[slot]
            if held.value != v or held.kind not in (VALUE, BUFFER):
                raise PlanError(
                    f"slot {slot} is read for {self._name(v)} and holds {held.kind} of {self._name(held.value)}"
                )
            box = narrowed(held.box, cuts, slot)
            want = read.box
            if many:
                side = (at, at + box[read.dim][1] - box[read.dim][0])
                want, at = (*want[: read.dim], side, *want[read.dim + 1 :]), side[1]
            if box != want and not self._same(v, box, want):
                raise PlanError(f"region {want} of {self._name(v)} is asked for, and {box} is read")
            if held.kind == BUFFER and not self._part(held, cuts).all():
                raise PlanError(f"region {box} of {self._name(v)} is read before all of it was written")
            if v in self.owner and held.upto != (self._steps(v) if behind is None else behind):
                raise PlanError(f"the state {self._name(v)} is read behind step {held.upto}")
        if many and at != read.box[read.dim][1]:
            raise PlanError(f"region {read.box} of {self._name(v)} is asked for, and its parts end at {at}")

    def _same(self, v: int, box: Box, want: Box) -> bool:
        """Whether two regions hold the same rows of a value that goes round."""
        dim = self.gradients.periods.get(v, (-1, 0))[0]
        shift = [(a[0] - b[0], a[1] - b[1]) for a, b in zip(box, want, strict=True)]
        return all(
            a == b and (a == 0 or (d == dim and a % self.gradients.period(v, d) == 0)) for d, (a, b) in enumerate(shift)
        )

    def _steps(self, v: int) -> int:
        node = self.owner[v]
        return self.graph.values[node.outputs[0]].shape[node.rule.ordered or 0]

    def _size(self, v: int, dim: int) -> int:
        return self.graph.values[v].shape[dim]

    def _part(self, held: Held, cuts: Sequence[tuple[int, int, int]]) -> Numbers:
        """View of what a slot holds of numbers."""
        x = held.numbers
        assert x is not None
        for dim, start, length in cuts:
            if (held.value, dim) not in self.gradients.cut and (start, length) == (0, self._size(held.value, dim)):
                continue  # all rows, for which one number stands
            if start < 0 or length < 0 or start + length > x.shape[dim]:
                raise PlanError(f"[{start}, {start + length}) of {x.shape[dim]} rows is read")
            x = x[(slice(None),) * dim + (slice(start, start + length),)]
        return x

    def _numbers(self, read: Read, v: int) -> Numbers:
        """What a read gives of a gradient."""
        found = []
        for slot, cuts in read.parts:
            held = self.slots[slot]
            if held.kind != GRADIENT or held.value != v:
                raise PlanError(f"slot {slot} is read for the gradient of {self._name(v)} and holds {held.kind}")
            found.append(self._part(held, cuts))
        return found[0] if len(found) == 1 else np.concatenate(found, read.dim)

    def _asked(self, i: Instruction, node: Node) -> None:
        """The region that a node makes is one of its output, and every box that it is given is what its rule asks for."""
        v = node.outputs[0]
        for d, ((lo, hi), size) in enumerate(zip(i.out_box, self.graph.values[v].shape, strict=True)):
            if (lo < 0 or hi > size) and not self.gradients.period(v, d):
                raise PlanError(f"rows [{lo}, {hi}) of {size} are made along dimension {d}")
        for p, (v, row, read) in enumerate(zip(node.inputs, node.rule.links, i.reads)):
            shape = self.graph.values[v].shape
            if len(read.box) != len(shape):
                raise PlanError(f"input {p} has {len(shape)} dimensions and is given {read.box}")
            for d, (link, size) in enumerate(zip(row, shape, strict=True)):
                if read.box[d] == (0, size) and (link is None or i.out_box[link.out_dim][0] <= 0):
                    continue  # all of it: of an operator that runs whole
                want: Interval = (0, size)
                if link is not None:
                    want = asked(link, i.out_box[link.out_dim], size, self.gradients.period(v, d) > 0)
                if read.box[d] != want and not (want[0] == want[1] and read.box[d][0] == read.box[d][1]):
                    raise PlanError(
                        f"input {p}, dimension {d}: rows {want} of {size} are asked for, {read.box[d]} are given"
                    )

    # ---- forward ------------------------------------------------------------------------------------------------

    def _run(self, i: Instruction) -> None:
        node = self.graph.nodes[i.node]
        self._asked(i, node)
        for v, read in zip(node.inputs, i.reads):
            self._value(read, v)
        upto = 0
        if node.rule.ordered is not None:
            start, upto = i.out_box[node.rule.ordered]
            states = i.reads[len(node.inputs) :]
            if start and len(states) != len(node.states):
                raise PlanError(
                    f"step {start} needs {len(node.states)} states of the steps before, and is given {len(states)}"
                )
            for v, read in zip(node.states, states):
                self._value(read, v, start)
        for j, (slot, v) in enumerate(zip(i.outs, node.outputs, strict=True)):
            box = i.out_box if j == 0 else self.gradients.full(v)
            size = 0 if node.kernel.chunk and v in self.graph.outputs else self.slots.nbytes(v, box)
            self.slots.hold(slot, Held(VALUE, v, box, upto=upto), size, self._view(i, node) if j == 0 else None)

    @staticmethod
    def _view(i: Instruction, node: Node) -> int | None:
        """The slot of whose storage the result is a view."""
        source = i.reads[node.alias].parts if node.alias is not None else ()
        if len(source) != 1:
            return None
        found = node.kernel.copies(i.out_box, [r.box for r in i.reads])
        return None if (node.may_copy if found is None else found) else source[0][0]

    def _alloc(self, i: Instruction) -> None:
        box = tuple((0, n) for n in i.shape)
        elsewhere = self.on_disk or i.value in self.graph.outputs
        size = 0 if elsewhere else self.slots.nbytes(i.value, box)
        self.slots.hold(i.outs[0], Held(BUFFER, i.value, box, self.gradients.zeros(i.value, box)), size)

    def _write(self, i: Instruction) -> None:
        (target, cuts), *others = i.reads[0].parts
        held = self.slots[target]
        if held.kind != BUFFER or others or narrowed(held.box, cuts, target) != i.out_box:
            raise PlanError(f"region {i.out_box} is written into {held.kind}, elsewhere")
        if i.reads[1].box != i.out_box:
            raise PlanError(f"region {i.reads[1].box} is written to {i.out_box}")
        self._value(i.reads[1], i.value)
        part = self._part(held, cuts)
        if part.any():
            raise PlanError(f"region {i.out_box} is written twice")
        part[...] = 1

    def _copy(self, i: Instruction) -> None:
        (read,) = i.reads
        first = self.slots[read.parts[0][0]]
        if first.kind == GRADIENT:
            numbers = self._numbers(read, i.value).copy()
            self.slots.hold(i.outs[0], Held(GRADIENT, i.value, numbers=numbers), read.nbytes)
            return
        if len(read.parts) != 1 or first.kind != VALUE or first.value != i.value:
            raise PlanError(f"{first.kind} of {self._name(first.value)} is copied for {self._name(i.value)}")
        box = narrowed(first.box, read.parts[0][1], read.parts[0][0])
        self.slots.hold(i.outs[0], Held(VALUE, i.value, box), self.slots.nbytes(i.value, box))

    # ---- reductions ---------------------------------------------------------------------------------------------

    def _state(self, read: Read, k: int) -> Held:
        held = self.slots[read.parts[0][0]]
        if held.kind != STATE or held.value != self.graph.nodes[k].outputs[0]:
            raise PlanError(f"a state is read, and the slot holds {held.kind} of {self._name(held.value)}")
        return held

    def _lift(self, i: Instruction) -> None:
        node = self.graph.nodes[i.node]
        v, out, box = node.inputs[0], node.outputs[0], i.reads[0].box
        self._value(i.reads[0], v)
        for d, (link, size) in enumerate(zip(node.rule.links[0], self.graph.values[v].shape, strict=True)):
            if (link is not None or d in node.rule.indivisible) and box[d] != (0, size):
                raise PlanError(f"dimension {d} is reduced in parts, and is not reduced")
        held = Held(STATE, out, total=self.gradients.lifted(i.node, box), upto=node.kernel.count(box))
        self.slots.hold(i.outs[0], held, self.graph.values[out].nbytes)

    def _merge(self, i: Instruction) -> None:
        a, b = (self._state(r, i.node) for r in i.reads)
        if i.count != (a.upto, b.upto):
            raise PlanError(f"states of {a.upto} and {b.upto} elements are joined as {i.count}")
        held = Held(STATE, a.value, total=(a.total + b.total) % (1 << 64), upto=a.upto + b.upto)
        self.slots.hold(i.outs[0], held, self.graph.values[a.value].nbytes)

    def _complete(self, read: Read, k: int) -> None:
        if self._state(read, k).total != self.gradients.lifted(k, self.gradients.full(self.graph.nodes[k].inputs[0])):
            raise PlanError("the state has not met every row once")

    def _finish(self, i: Instruction) -> None:
        self._complete(i.reads[0], i.node)
        v = self.graph.nodes[i.node].outputs[0]
        self.slots.hold(i.outs[0], Held(VALUE, v, self.gradients.full(v)), self.graph.values[v].nbytes)

    # ---- backward -----------------------------------------------------------------------------------------------

    def _zeros(self, i: Instruction) -> None:
        box = tuple((0, n) for n in i.shape)
        self.slots.hold(
            i.outs[0],
            Held(GRADIENT, i.value, numbers=self.gradients.zeros(i.value, box)),
            self.slots.nbytes(i.value, box),
        )

    def _add(self, i: Instruction) -> None:
        target, source = self._numbers(i.reads[0], i.value), self._numbers(i.reads[1], i.value)
        if target.shape != source.shape or len(i.reads[0].parts) != 1:
            raise PlanError(f"{source.shape} rows are added to {target.shape}")
        target += source

    def _pull(self, i: Instruction) -> None:
        node = self.graph.nodes[i.node]
        self._asked(i, node)
        n, kept = len(node.inputs), [node.outputs[p] for p in node.vjp_outputs]
        for p, (v, read) in enumerate(zip(node.inputs, i.reads)):
            if p in node.vjp_reads:
                self._value(read, v)
        for v, read in zip(kept, i.reads[n:]):
            self._value(read, v)
        grads = [
            self._numbers(r, v) if r.parts else None
            for v, r in zip(node.outputs, i.reads[n + len(kept) :], strict=True)
        ]
        for j, (v, g) in enumerate(zip(node.outputs, grads)):
            box = i.out_box if j == 0 else self.gradients.full(v)
            if g is not None and g.shape != self.gradients.shape(v, box):
                raise PlanError(f"the gradient of region {box} of {self._name(v)} is read as {g.shape} rows")
        asked_for = [p for p, w in enumerate(i.wanted) if w]
        for slot, p in zip(i.outs, asked_for, strict=True):
            self._give(slot, i.node, p, grads, i.reads[p].box, i.out_box)

    def _give(self, slot: int, k: int, p: int, grads: Sequence[Numbers | None], box: Box, out: Box) -> None:
        v = self.graph.nodes[k].inputs[p]
        numbers = self.gradients.given_back(k, p, grads, box, out)
        self.slots.hold(slot, Held(GRADIENT, v, numbers=numbers), self.slots.nbytes(v, box))

    def _pull_reduction(self, i: Instruction) -> None:
        node = self.graph.nodes[i.node]
        out = node.outputs[0]
        if 0 in node.vjp_reads:
            self._value(i.reads[0], node.inputs[0])
        self._complete(i.reads[1], i.node)
        grads = [self._numbers(i.reads[2], out)]
        self._give(i.outs[0], i.node, 0, grads, i.reads[0].box, self.gradients.full(out))

    # ---- results ------------------------------------------------------------------------------------------------

    def _output(self, v: int) -> None:
        if v not in self.forward.results:
            raise self._wrong(f"the output {self._name(v)} is not computed")
        try:
            self._value(Read(((self.forward.results[v], ()),), 0, 0, self.gradients.full(v)), v)
        except PlanError as error:
            raise self._wrong(f"the output {self._name(v)}: {error}") from None
        self.results += 1

    def _compare(self, program: Program) -> None:
        for v, slot in program.results.items():
            want = self.expected.get(v)
            want = self.gradients.zeros(v, self.gradients.full(v)) if want is None else want
            found = self._numbers(Read(((slot, ()),)), v)
            if found.shape != want.shape or not np.array_equal(found, want):
                raise self._wrong(f"the gradient of {self._name(v)} is not the sum of what its readers give")
            self.results += 1
        missing = [v for v in self.expected if self.graph.values[v].kind != "computed" and v not in program.results]
        if missing:
            raise self._wrong(f"no gradient of {self._name(missing[0])} is left")
