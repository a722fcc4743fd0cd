"""A second opinion on a plan, for tests: its programs are run on fingerprints, and what they hold is counted again.

A fingerprint stands for an element: a number of 64 bits that says from which elements, at which places of which windows,
through which operators it came. Operators follow their region rules (`core/graph.py`) and nothing else; the instructions are
read by a loop of its own, which shares no code with what wrote them. The programs are right where they leave the
fingerprints that the graph leaves when each node is run once, whole:

    forward    an output element is a hash of the window that each input's links name, and of its place
    reduction  a sum of hashes over what it reduces: a region left out or met twice changes it
    backward   the transpose of the same sums, times a hash of what backward reads: gradients add up modulo 2**64

Dimensions that no instruction cuts are one element long, so that a plan for a large image is small here. On the way every
box that a node is given is held to what its links ask for, no more and no less, every slot to being alive, and the bytes that
each instruction says to be live to those that are counted here. Enter at `check`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np

from ranger_nn.core import program as P
from ranger_nn.core.graph import Graph, Node
from ranger_nn.core.program import Extent, Instruction, Program, Read
from ranger_nn.core.reach import Border, Box, Interval, Link
from ranger_nn.errors import PlanError

Array = np.ndarray[Any, np.dtype[np.uint64]]
Bits = np.uint64
PLACE = Bits(0x9E3779B97F4A7C15)
"""An odd number without a pattern (2**64 over the golden ratio): places and names are multiples of it."""


class Unsupported(Exception):
    """A form of operator that fingerprints do not follow yet; the message names it."""


def mixed(x: Array) -> Array:
    """Bits spread over all 64 (the finaliser of SplitMix64: Steele, Lea and Flood, OOPSLA 2014)."""
    x = (x ^ (x >> Bits(30))) * Bits(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> Bits(27))) * Bits(0x94D049BB133111EB)
    return x ^ (x >> Bits(31))


@lru_cache(1 << 12)
def named(*what: int) -> Bits:
    """A number for a few small integers."""
    x = np.zeros(1, Bits)
    for n in what:
        x = mixed(x + np.full(1, n + 1, Bits) * PLACE)
    return Bits(x[0])


@lru_cache(1 << 12)
def weights(count: int, start: int = 0) -> Array:
    """Odd numbers, one for each place."""
    return mixed((np.arange(start, start + count).astype(Bits) + Bits(7)) * PLACE) | Bits(1)


@lru_cache(1 << 14)
def window(link: Link, out: Interval, box: Interval, size: int, round_: bool) -> tuple[Array, Array]:
    """For outputs [out) and inputs [box): how much of each input is in each output, and how much of what is outside.

    Raises PlanError where the box is not what the link asks for. `round_`: rows are numbered on beyond both ends.
    """
    rows = np.arange(*out)
    reach = link.reach
    first = (rows * reach.num + reach.first) // reach.den
    last = (rows * reach.num + reach.last) // reach.den
    steps = np.arange(int((last - first).max(initial=0)) + 1)
    places = first[:, None] + steps
    inside, real = places <= last[:, None], places
    outside = np.zeros_like(inside)
    if not round_:
        if link.border is Border.REPLICATE:
            real = np.clip(places, 0, size - 1)
        elif link.border is Border.CIRCULAR:
            real = places % max(1, size)
        elif link.border is Border.REFLECT:
            real = np.where(places < 0, -places, places)
            real = np.where(real >= size, 2 * size - 2 - real, real)
        else:
            outside = inside & ((places < 0) | (places >= size))
            inside = inside & ~outside
    lo, hi = (int(real[inside].min()), int(real[inside].max()) + 1) if inside.any() else (box[0], box[0])
    whole = out[0] <= 0 and box == (0, size)
    if box[0] > lo or box[1] < hi or ((lo, hi) != box and not whole):
        raise PlanError(f"outputs {out} ask for [{lo}, {hi}) of {size} and are given {box}")
    factors = np.broadcast_to(weights(len(steps)), places.shape)
    found = np.zeros((len(rows), box[1] - box[0]), Bits)
    at = np.broadcast_to(np.arange(len(rows))[:, None], places.shape)
    np.add.at(found, (at[inside], real[inside] - box[0]), factors[inside])
    return found, (factors * outside).sum(1, dtype=Bits)


def _along(x: Array, matrix: Array, dim: int) -> Array:
    """Matrix times x along a dimension."""
    return np.moveaxis(np.tensordot(matrix, x, (1, dim)), 0, dim)


@dataclass
class Held:
    """What a slot holds: fingerprints, of which value, their bytes and the storage that they lie in."""

    prints: Array
    value: int
    storage: int
    count: int = 0


class Prints:
    """Operators of one graph on fingerprints; `programs` say which dimensions are cut."""

    def __init__(
        self, graph: Graph, programs: Sequence[Program], periods: Mapping[int, tuple[int, int]] | None = None
    ) -> None:
        """`periods`: of values on an axis that goes round, dimension and rows after which it repeats."""
        self.graph, self.periods = graph, dict(periods or {})
        self.live = self._live(programs)

    def _live(self, programs: Sequence[Program]) -> set[tuple[int, int]]:
        values = self.graph.values
        live = {(v.index, d) for v in values for d, n in enumerate(v.shape) if n == 0}

        def seen(v: int, box: Box) -> None:
            live.update((v, d) for d, (b, n) in enumerate(zip(box, values[v].shape)) if b != (0, n))

        for i in (i for p in programs for i in p.instructions):
            if i.node >= 0:
                node = self.graph.nodes[i.node]
                for v, read in zip(node.inputs, i.reads):
                    seen(v, read.box)
                if i.op in (P.RUN, P.VJP):
                    seen(node.outputs[0], i.out_box)
            elif i.value >= 0:
                seen(i.value, i.out_box)
                seen(i.value, tuple((0, n) for n in i.shape))
                live.update((i.value, d) for r in i.reads for _, cuts in r.parts for d, _, _ in cuts)
        pairs = [
            ((v, d), (node.outputs[0], link.out_dim))
            for node in self.graph.nodes
            for v, row in zip(node.inputs, node.rule.links, strict=True)
            for d, link in enumerate(row)
            if link is not None
        ]
        grown = True
        while grown:
            found = [b if a in live else a for a, b in pairs if (a in live) != (b in live)]
            live.update(found)
            grown = bool(found)
        return live

    def full(self, v: int) -> Box:
        """All of a value."""
        return tuple((0, n) for n in self.graph.values[v].shape)

    def shape(self, v: int, box: Box) -> tuple[int, ...]:
        """Of the fingerprints of a region."""
        return tuple(hi - lo if (v, d) in self.live else 1 for d, (lo, hi) in enumerate(box))

    def places(self, v: int, box: Box, but: Sequence[int] = ()) -> Array:
        """A number for each place of a region, whatever it is along the dimensions `but`."""
        total = np.zeros(self.shape(v, box), Bits)
        for d, (lo, hi) in enumerate(box):
            if (v, d) in self.live and d not in but:
                rows = np.arange(lo, hi)
                if v in self.periods and self.periods[v][0] == d:
                    rows = rows % self.periods[v][1]
                one = mixed((rows.astype(Bits) + Bits(3)) * PLACE) * named(1, d)
                total += one.reshape([-1 if k == d else 1 for k in range(len(box))])
        return total

    def given(self, v: int) -> Array:
        """Of an input, a parameter or a constant."""
        return mixed(self.places(v, self.full(v)) + named(2, v))

    def gradient(self, v: int) -> Array:
        """Of an output."""
        return mixed(self.places(v, self.full(v)) + named(3, v))

    def _round(self, v: int, d: int) -> bool:
        return v in self.periods and self.periods[v][0] == d

    def _window(self, node: Node, i: int, d: int, out: Box, box: Box, region: bool) -> tuple[Array, Array]:
        link, v = node.rule.links[i][d], node.inputs[i]
        assert link is not None
        try:
            size = self.graph.values[v].shape[d]
            return window(link, out[link.out_dim], box[d], size, region and self._round(v, d))
        except PlanError as error:
            raise PlanError(f"{self.graph.name}: {node.name}, input {i}, dimension {d}: {error}") from None

    def gather(self, node: Node, i: int, x: Array, box: Box, out: Box, region: bool = True) -> Array:
        """What each element of a region of the output reads of input i; dimensions are those of the output."""
        v, row = node.inputs[i], node.rule.links[i]
        for d, link in enumerate(row):
            if link is None and (v, d) in self.live:
                if box[d] != (0, self.graph.values[v].shape[d]):
                    raise PlanError(f"{self.graph.name}: {node.name} reads all of dimension {d} and is given {box[d]}")
                w = weights(x.shape[d]).reshape([-1 if k == d else 1 for k in range(x.ndim)])
                x = (x * w).sum(d, keepdims=True, dtype=Bits)
            elif link is not None and (v, d) in self.live:
                matrix, beyond = self._window(node, i, d, out, box, region)
                rows = beyond.reshape([-1 if k == d else 1 for k in range(x.ndim)])
                x = _along(x, matrix, d) + rows * named(4, d)
        return self._laid(node, i, x, len(out))

    def _laid(self, node: Node, i: int, x: Array, rank: int) -> Array:
        """Dimensions of an input moved to those of the output that they are linked to."""
        to = [link.out_dim if link is not None else -1 for link in node.rule.links[i]]
        linked = [t for t in to if t >= 0]
        if len(set(linked)) != len(linked):
            raise Unsupported(f"{node.op}: a diagonal")
        order = [d for d, t in enumerate(to) if t < 0] + sorted(
            (d for d, t in enumerate(to) if t >= 0), key=to.__getitem__
        )
        x = x.transpose(order).reshape([x.shape[d] for d in order if to[d] >= 0])
        shape = [1] * rank
        for n, t in zip(x.shape, sorted(linked), strict=True):
            shape[t] = n
        return x.reshape(shape)

    def scatter(self, node: Node, i: int, g: Array, box: Box, out: Box, region: bool = True) -> Array:
        """The transpose of `gather`: what comes back to a region of input i."""
        v, row = node.inputs[i], node.rule.links[i]
        to = [link.out_dim if link is not None else -1 for link in row]
        others = tuple(d for d in range(g.ndim) if d not in to)
        g = g.sum(others, keepdims=True, dtype=Bits) if others else g
        linked = sorted(t for t in to if t >= 0)
        g = g.transpose([*linked, *others]).reshape([g.shape[t] for t in linked])
        places = sorted((d for d, t in enumerate(to) if t >= 0), key=to.__getitem__)
        order = [places.index(d) for d in sorted(places)]
        g = g.transpose(order)
        shape = [1] * len(row)
        for d, n in zip(sorted(places), g.shape, strict=True):
            shape[d] = n
        g = g.reshape(shape)
        for d, link in enumerate(row):
            if (v, d) not in self.live:
                continue
            if link is None:
                g = g * weights(box[d][1] - box[d][0]).reshape([-1 if k == d else 1 for k in range(g.ndim)])
            else:
                g = _along(g, self._window(node, i, d, out, box, region)[0].T, d)
        return g

    # ---- operators ------------------------------------------------------------------------------------------

    def run(
        self, k: int, xs: Sequence[Array | None], boxes: Sequence[Box], out: Box, region: bool = True
    ) -> list[Array]:
        """Fingerprints of a region of node k's output, and of all of its other outputs."""
        node = self.graph.nodes[k]
        inputs = list(zip(xs, boxes))[: len(node.inputs)]
        total: Array = np.zeros((1,) * len(out), Bits)
        for i, (x, box) in enumerate(inputs):
            if i == 0 and node.rule.reduces:
                total = total + self._finished(node, self.lift(k, x, box), len(out)) * named(5, i)
            else:
                filled = np.zeros(self.shape(node.inputs[i], box), Bits) if x is None else x
                total = total + self.gather(node, i, filled, box, out, region) * named(5, i)
        first, *others = node.outputs
        if node.rule.ordered is not None:
            return self._ordered(k, total, xs[len(node.inputs) :], out)
        full = [(first, out), *((v, self.full(v)) for v in others)]
        return [mixed(total + named(6, k, j) + self.places(v, b)) for j, (v, b) in enumerate(full)]

    def _ordered(self, k: int, steps: Array, states: Sequence[Array | None], out: Box) -> list[Array]:
        """Each step a hash of the one before; the states behind the last one say where it ended."""
        node = self.graph.nodes[k]
        dim, v = node.rule.ordered, node.outputs[0]
        assert dim is not None
        shape = self.shape(v, out)
        steps = np.moveaxis(np.broadcast_to(steps, shape), dim, 0)
        if steps[:1].size > 1:
            raise Unsupported(f"{node.op}: an ordered operator that is cut along two axes")
        state = named(7, k) if not states or states[0] is None else Bits(states[0].reshape(-1)[0]) - named(8, 0)
        found = np.empty_like(steps)
        for t in range(len(steps)):
            found[t] = mixed(steps[t] + Bits(state) * PLACE + named(9, k))
            state = found[t].reshape(-1)[0]
        ends = [np.full(self.shape(u, self.full(u)), Bits(state) + named(8, j)) for j, u in enumerate(node.states)]
        if any(e.size != 1 for e in ends):
            raise Unsupported(f"{node.op}: a state that is cut")
        return [np.moveaxis(found, 0, dim), *ends]

    def lift(self, k: int | Node, x: Array | None, box: Box) -> Array:
        """State of a region: a sum over what is reduced. Linked dimensions stay."""
        node = self.graph.nodes[k] if isinstance(k, int) else k
        v = node.inputs[0]
        given = np.zeros(self.shape(v, box), Bits) if x is None else x
        linked = [d for d, link in enumerate(node.rule.links[0]) if link is not None]
        terms = mixed(given * PLACE + self.places(v, box, linked))
        over = tuple(d for d in range(terms.ndim) if d not in linked)
        return terms.sum(over, keepdims=True, dtype=Bits)

    def _finished(self, node: Node, state: Array, rank: int) -> Array:
        return self._laid(node, 0, state, rank)

    def finish(self, k: int, state: Array) -> Array:
        """The result of all regions."""
        node = self.graph.nodes[k]
        v = node.outputs[0]
        total = self._finished(node, state, len(self.graph.values[v].shape)) * named(5, 0)
        return mixed(total + named(6, k, 0) + self.places(v, self.full(v)))

    def pull(
        self,
        k: int,
        xs: Sequence[Array | None],
        boxes: Sequence[Box],
        kept: Sequence[Array],
        grads: Sequence[Array | None],
        out: Box,
        wanted: Sequence[bool],
        region: bool = True,
    ) -> list[Array]:
        """Gradients of the wanted inputs' regions."""
        node = self.graph.nodes[k]
        if node.rule.reduces and len(node.inputs) == 1:
            read = xs[0] if 0 in node.vjp_reads else None
            state = self.lift(k, read, boxes[0]) if read is not None else None
            assert grads[0] is not None
            return [self.reduce_pull(k, read, boxes[0], state, grads[0])]
        factor: Array = np.zeros((1,) * len(out), Bits)
        for i in node.vjp_reads:
            given = xs[i]
            filled = np.zeros(self.shape(node.inputs[i], boxes[i]), Bits) if given is None else given
            factor = factor + self.gather(node, i, filled, boxes[i], out, region) * named(10, i)
        for j, x in enumerate(kept):
            factor = factor + (x.reshape(-1) * weights(x.size)).sum(dtype=Bits) * named(11, j)
        total: Array = np.zeros((1,) * len(out), Bits)
        for j, (v, g) in enumerate(zip(node.outputs, grads)):
            if g is not None:
                box = out if j == 0 else self.full(v)
                part = mixed(factor + named(12, k, j) + self.places(v, box)) * g
                alone = part.sum(dtype=Bits).reshape((1,) * len(out)) if len(node.outputs) > 1 else part
                total = total + alone
        if len(node.outputs) > 1 and any(link is not None for row in node.rule.links for link in row):
            raise Unsupported(f"{node.op}: several outputs that are cut")
        return [
            np.broadcast_to(
                self.scatter(node, i, total * named(13, i), boxes[i], out, region), self.shape(v, boxes[i])
            ).copy()
            for i, (v, w) in enumerate(zip(node.inputs, wanted, strict=True))
            if w
        ]

    def reduce_pull(self, k: int, x: Array | None, box: Box, state: Array | None, grad: Array) -> Array:
        """Gradient of a region of what is reduced."""
        node = self.graph.nodes[k]
        v, row = node.inputs[0], node.rule.links[0]
        factor = self.places(v, box) + named(14, k)
        if x is not None and state is not None:
            factor = factor + x * named(15) + state * named(16)
        places = [link.out_dim if link is not None else -1 for link in row]
        others = tuple(d for d in range(grad.ndim) if d not in places)
        g = grad.sum(others, keepdims=True, dtype=Bits) if others else grad
        linked = sorted((d for d, t in enumerate(places) if t >= 0), key=places.__getitem__)
        g = g.reshape([grad.shape[places[d]] for d in linked]).transpose([linked.index(d) for d in sorted(linked)])
        shape = [1] * len(row)
        for d, n in zip(sorted(linked), g.shape, strict=True):
            shape[d] = n
        return mixed(factor) * g.reshape(shape)


class Machine:
    """Runs programs on fingerprints, and counts what they hold."""

    def __init__(self, prints: Prints) -> None:
        """Nothing is held yet."""
        self.prints, self.graph = prints, prints.graph
        self.slots: dict[int, Held] = {}
        self.sizes: dict[int, int] = {}
        self.users: dict[int, int] = {}
        self.live = 0
        self.next = 0

    # ---- storages -------------------------------------------------------------------------------------------

    def hold(self, slot: int, prints: Array, v: int, nbytes: int, of: int | None = None, count: int = 0) -> None:
        """Put fingerprints into a slot: a storage of its own, or that of slot `of`."""
        if slot in self.slots:
            raise PlanError(f"{self.graph.name}: slot {slot} is written while it holds something")
        if of is None:
            storage, self.next = self.next, self.next + 1
            self.sizes[storage] = nbytes
            self.live += nbytes
        else:
            storage = self.slots[of].storage
        self.users[storage] = self.users.get(storage, 0) + 1
        self.slots[slot] = Held(prints, v, storage, count)

    def free(self, slot: int) -> None:
        """Nothing is in the slot any more."""
        if slot not in self.slots:
            raise PlanError(f"{self.graph.name}: slot {slot} is freed and holds nothing")
        storage = self.slots.pop(slot).storage
        self.users[storage] -= 1
        if not self.users[storage]:
            del self.users[storage]
            self.live -= self.sizes.pop(storage)

    def nbytes(self, v: int, box: Box) -> int:
        """Of a region; what the caller owns is not counted."""
        value = self.graph.values[v]
        return 0 if v in self.graph.outputs else prod(hi - lo for lo, hi in box) * value.itemsize

    # ---- reading --------------------------------------------------------------------------------------------

    def parts(self, read: Read) -> list[Array]:
        """Views of what a read is put together from."""
        found = []
        for slot, cuts in read.parts:
            if slot not in self.slots:
                raise PlanError(f"{self.graph.name}: slot {slot} is read and holds nothing")
            x = self.slots[slot].prints
            for dim, start, length in cuts:
                if start < 0 or length < 0 or start + length > x.shape[dim]:
                    raise PlanError(
                        f"{self.graph.name}: [{start}, {start + length}) of {x.shape[dim]} is read of slot {slot}"
                    )
                x = x[(slice(None),) * dim + (slice(start, start + length),)]
            found.append(x)
        return found

    def read(self, read: Read, v: int) -> Array | None:
        """The region of a value, or None where nothing is read."""
        parts = self.parts(read)
        if not parts:
            return None
        x = parts[0] if len(parts) == 1 else np.concatenate(parts, read.dim)
        if read.box and x.shape != self.prints.shape(v, read.box):
            raise PlanError(f"{self.graph.name}: region {read.box} of {self.graph.values[v].name} is read as {x.shape}")
        return x

    # ---- running --------------------------------------------------------------------------------------------

    def run(self, program: Program, grads: Mapping[int, Array] | None = None) -> None:
        """All instructions. `grads`: of outputs."""
        for v, slot in program.external.items():
            if slot not in self.slots:
                self.hold(slot, self.prints.given(v), v, 0)
        for v, slot in program.grads.items():
            self.hold(slot, (grads or {})[v], v, 0)
        most = 0
        for n, i in enumerate(program.instructions):
            joined = sum(r.nbytes for r in i.reads if len(r.parts) > 1)
            try:
                for slot, prints, v, size, of, count in list(self._results(i)):
                    self.hold(slot, prints, v, size, of, count)
            except (PlanError, ValueError, IndexError) as error:  # shapes that do not go together
                raise PlanError(f"{error} (instruction {n}, {i.op} of sweep {i.sweep})") from None
            held = self.live + joined + self._workspace(i)
            if held > i.live:
                raise PlanError(
                    f"{self.graph.name}: instruction {n} ({i.op}) is said to hold {i.live} bytes, and {held} are counted"
                )
            most = max(most, i.live)
            for slot in i.frees:
                self.free(slot)
        if most > program.peak:
            raise PlanError(
                f"{self.graph.name}: the peak is said to be {program.peak} bytes, and an instruction holds {most}"
            )

    def _results(self, i: Instruction) -> Iterator[tuple[int, Array, int, int, int | None, int]]:
        if i.op in (P.RUN, P.VJP):
            yield from self._run(i) if i.op == P.RUN else self._pull(i)
        elif i.op in (P.LIFT, P.MERGE, P.FINISH, P.REDUCE_VJP):
            yield from self._reduce(i)
        elif i.op in (P.ALLOC, P.ZEROS):
            box = tuple((0, n) for n in i.shape)
            empty = np.full(self.prints.shape(i.value, box), Bits(0) if i.op == P.ZEROS else named(17), Bits)
            yield i.outs[0], empty, i.value, 0 if i.op == P.ALLOC else self.nbytes(i.value, box), None, 0
        elif i.op == P.TRIM:
            (x,) = self.parts(i.reads[0]) if len(i.reads[0].parts) == 1 else [self.read(i.reads[0], i.value)]
            assert x is not None
            yield i.outs[0], x.copy(), i.value, i.reads[0].nbytes, None, 0
        elif i.op in (P.WRITE, P.ADD):
            (target,), sources = self.parts(i.reads[0]), self.parts(i.reads[1])
            source = sources[0] if len(sources) == 1 else np.concatenate(sources, i.reads[1].dim)
            if target.shape != source.shape:
                raise PlanError(f"{self.graph.name}: {source.shape} is put into {target.shape}")
            target[...] = source if i.op == P.WRITE else target + source
        else:
            raise Unsupported(f"instruction {i.op}")

    def _run(self, i: Instruction) -> Iterator[tuple[int, Array, int, int, int | None, int]]:
        node = self.graph.nodes[i.node]
        states = node.states
        read = [self.read(r, v) for r, v in zip(i.reads, (*node.inputs, *states))]
        boxes = [r.box for r in i.reads]
        found = self.prints.run(i.node, read, boxes, i.out_box)
        source = i.reads[node.alias].parts if node.alias is not None else ()
        view = source[0][0] if len(source) == 1 and not self._copies(node, i.out_box, boxes) else None
        for j, (slot, prints, v) in enumerate(zip(i.outs, found, node.outputs, strict=True)):
            box = i.out_box if j == 0 else self.prints.full(v)
            size = prod(hi - lo for lo, hi in box) * self.graph.values[v].itemsize
            size = 0 if node.kernel.chunk and v in self.graph.outputs else size
            yield slot, prints, v, size, view if j == 0 else None, 0

    @staticmethod
    def _copies(node: Node, out: Box, boxes: Sequence[Box]) -> bool:
        found = node.kernel.copies(out, boxes)
        return bool(node.may_copy if found is None else found)

    def _pull(self, i: Instruction) -> Iterator[tuple[int, Array, int, int, int | None, int]]:
        node = self.graph.nodes[i.node]
        kept = [node.outputs[p] for p in node.vjp_outputs]
        of = [*node.inputs, *kept, *node.outputs]
        read = [self.read(r, v) for r, v in zip(i.reads, of)]
        n, m = len(node.inputs), len(node.inputs) + len(kept)
        whole = [x for x in read[n:m] if x is not None]
        boxes = [r.box for r in i.reads[:n]]
        found = self.prints.pull(i.node, read[:n], boxes, whole, read[m:], i.out_box, i.wanted)
        asked = [(v, b) for v, b, w in zip(node.inputs, boxes, i.wanted, strict=True) if w]
        for slot, prints, (v, box) in zip(i.outs, found, asked, strict=True):
            yield slot, prints, v, prod(hi - lo for lo, hi in box) * self.graph.values[v].itemsize, None, 0

    def _state(self, read: Read) -> Held:
        slot = read.parts[0][0]
        if slot not in self.slots:
            raise PlanError(f"{self.graph.name}: slot {slot} is read and holds nothing")
        return self.slots[slot]

    def _workspace(self, i: Instruction) -> int:
        """What the back end's kernel says that the call takes beside its inputs and results."""
        if i.op not in (P.RUN, P.VJP) or len(self.graph.nodes[i.node].outputs) > 1:
            return 0
        node = self.graph.nodes[i.node]
        out = prod(hi - lo for lo, hi in i.out_box) * self.graph.values[node.outputs[0]].itemsize
        if i.op == P.RUN:
            return int(node.kernel.scratch(Extent(i.out_box, out, tuple(r.nbytes for r in i.reads), i.reads)))
        boxes = [(v, r.box) for v, r in zip(node.inputs, i.reads)]
        sizes = tuple(prod(hi - lo for lo, hi in b) * self.graph.values[v].itemsize for v, b in boxes)
        return int(node.kernel.vjp_scratch(Extent(i.out_box, out, sizes, i.reads, i.wanted)))

    def _reduce(self, i: Instruction) -> Iterator[tuple[int, Array, int, int, int | None, int]]:
        node = self.graph.nodes[i.node]
        v, out = node.inputs[0], node.outputs[0]
        small = self.graph.values[out].nbytes
        if i.op == P.LIFT:
            box = i.reads[0].box
            state = self.prints.lift(i.node, self.read(i.reads[0], v), box)
            yield i.outs[0], state, out, small, None, node.kernel.count(box)
            return
        first = self._state(i.reads[i.op == P.REDUCE_VJP])
        if i.op == P.FINISH:
            yield i.outs[0], self.prints.finish(i.node, first.prints), out, 0, None, 0
        elif i.op == P.MERGE:
            second = self._state(i.reads[1])
            if i.count != (first.count, second.count):
                raise PlanError(
                    f"{self.graph.name}: {node.name} joins states of {first.count} and {second.count} as {i.count}"
                )
            yield i.outs[0], first.prints + second.prints, out, small, None, first.count + second.count
        else:
            x = self.read(i.reads[0], v) if 0 in node.vjp_reads else None
            grad = self.read(i.reads[2], out)
            assert grad is not None
            prints = self.prints.reduce_pull(i.node, x, i.reads[0].box, first.prints, grad)
            yield i.outs[0], prints, v, i.reads[0].nbytes, None, 0


def whole(prints: Prints) -> dict[int, Array]:
    """Fingerprints of all values, each node run once."""
    graph = prints.graph
    found = {v.index: prints.given(v.index) for v in graph.values if v.kind != "computed"}
    for k, node in enumerate(graph.nodes):
        boxes = [prints.full(v) for v in node.inputs]
        outs = prints.run(k, [found[v] for v in node.inputs], boxes, prints.full(node.outputs[0]), False)
        found.update(zip(node.outputs, outs, strict=True))
    return found


def whole_gradients(prints: Prints, values: Mapping[int, Array], grads: Mapping[int, Array]) -> dict[int, Array]:
    """Gradients of all values, each node pulled back once."""
    graph, found = prints.graph, dict(grads)
    for k in reversed(range(len(graph.nodes))):
        node = graph.nodes[k]
        wanted = [graph.values[v].differentiable for v in node.inputs]
        given = [found.get(v) if graph.values[v].differentiable else None for v in node.outputs]
        if not any(wanted) or all(g is None for g in given):
            continue
        boxes = [prints.full(v) for v in node.inputs]
        xs = [values[v] if p in node.vjp_reads else None for p, v in enumerate(node.inputs)]
        kept = [values[node.outputs[p]] for p in node.vjp_outputs]
        outs = iter(prints.pull(k, xs, boxes, kept, given, prints.full(node.outputs[0]), wanted, False))
        for v, w in zip(node.inputs, wanted, strict=True):
            if w:
                g = next(outs)
                found[v] = found[v] + g if v in found else g
    return found


@dataclass(frozen=True)
class Checked:
    """What `check` did: instructions run on fingerprints, results compared, elements in all, bytes counted at the peak."""

    instructions: int
    results: int
    elements: int
    peak: int


def check(
    graph: Graph,
    forward: Program,
    backward: Program | None = None,
    periods: Mapping[int, tuple[int, int]] | None = None,
) -> Checked:
    """Run the programs of a plan on fingerprints. `periods`: see `Prints`.

    Raises:
        PlanError: a result differs from that of the graph, a box is not what is asked for, a slot is read or freed that
            holds nothing, or more bytes are held than is said.
        Unsupported: an operator whose form fingerprints do not follow.
    """
    programs = [forward] if backward is None else [forward, backward]
    prints = Prints(graph, programs, periods)
    wanted, machine, compared, elements = whole(prints), Machine(prints), 0, 0
    machine.run(forward)

    def compare(slot: int, v: int, want: Array, what: str) -> None:
        nonlocal compared, elements
        held = machine.slots.get(slot)
        if held is None or held.prints.shape != want.shape or not np.array_equal(held.prints, want):
            where = "is not there" if held is None else "differs"
            raise PlanError(f"{graph.name}: the {what} {graph.values[v].name} {where} after a run on fingerprints")
        compared, elements = compared + 1, elements + want.size

    for v in graph.outputs:
        if graph.values[v].kind == "computed":
            if v not in forward.results:
                raise PlanError(f"{graph.name}: the output {graph.values[v].name} is not computed")
            compare(forward.results[v], v, wanted[v], "output")
    count = len(forward.instructions)
    if backward is not None:
        given = {v: prints.gradient(v) for v in backward.grads}
        found = whole_gradients(prints, wanted, given)
        machine.run(backward, given)
        count += len(backward.instructions)
        for v, slot in backward.results.items():
            zero = np.zeros(prints.shape(v, prints.full(v)), Bits)
            compare(slot, v, found.get(v, zero), "gradient of")
        missing = [v for v in found if graph.values[v].kind != "computed" and v not in backward.results]
        if missing:
            raise PlanError(f"{graph.name}: no gradient of {graph.values[missing[0]].name}")
    return Checked(count, compared, elements, max(p.peak for p in programs))
