"""Forward and backward of works that are run one after the other, and once more: `Passes`.

Works of one list are one call of the local network without memory. So each begins with the state (`state.py`) with which
that call begins, batch norm takes its statistics from all of them (`norms.py`), and what they leave behind must be the
same. In backward each begins as it did in forward, with the same random numbers, and must give the same result. What
requires a gradient is found in the graph of each result: parameters, and tensors that are registered nowhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ranger_nn.errors import PartitionError, VerificationError
from ranger_nn.torch.layers.norms import Enough, Inside, Norms, Stats, Sums, sums
from ranger_nn.torch.layers.state import Random, Snapshot, State, same

WAY_OUT = "allow the memory that all regions take at once, or leave memory out"


class Work(Protocol):
    """Some regions: how to take them from the input, run them, and give back their gradient."""

    def take(self, x: Tensor) -> Tensor:
        """The regions' own copy."""
        ...

    def run(self, taken: Tensor) -> Tensor:
        """The local network on them."""
        ...

    def give(self, whole: Tensor, grad: Tensor, x: Tensor) -> None:
        """Add the gradient of what was taken to that of the whole input x, in place."""
        ...


@dataclass
class Done:
    """Works that have run, and what running them again takes.

    Attributes:
        works: one after the other.
        split: are they one call without memory.
        starts: for each work the state before it.
        randoms: for each work where the generators stood.
        prints: for each work two numbers that its result must give again; None: it needs no gradient.
        stats: of the batch norms of a call that is split.
    """

    works: Sequence[Work]
    split: bool
    starts: list[Snapshot] = field(default_factory=list)
    randoms: list[list[Any]] = field(default_factory=list)
    prints: list[Tensor | None] = field(default_factory=list)
    stats: list[Stats] = field(default_factory=list)


class Passes:
    """All works of a call of the layer.

    Attributes:
        grad: are gradients on.
        leaves: what the results depend on and needs a gradient, besides x.
    """

    def __init__(self, x: Tensor, state: State, random: Random) -> None:
        self.x, self.state, self.random = x, state, random
        self.grad = torch.is_grad_enabled()
        self.leaves: list[Tensor] = []
        self._done: list[Done] = []
        self._autocast = _autocast(x.device.type)
        self._drawn: list[Any] | None = None
        self._last: Snapshot | None = None

    @property
    def differentiable(self) -> bool:
        """Is there a backward."""
        return any(p is not None for d in self._done for p in d.prints)

    def remembered(self) -> int:
        """Bytes that works hold until backward, besides x and the state."""
        states = {id(s): s for d in self._done for r in d.randoms for s in r if isinstance(s, Tensor)}
        return sum(t.nbytes for t in states.values()) + sum(
            p.nbytes for d in self._done for p in d.prints if p is not None
        )

    # ------------------------------------------------------------------------------------- forward

    def forward(self, works: Sequence[Work], split: bool) -> list[Tensor]:
        """Results; `split`: the works are one call without memory."""
        done = Done(works, split)
        with Inside():
            results = self._call(done) if split else [self._alone(done, work) for work in works]
        if self.grad:
            self._done.append(done)
        return results

    def _alone(self, done: Done, work: Work) -> Tensor:
        """One work that is a call."""
        before = self.state.read() if self._last is None else self._last
        done.starts.append(before)
        done.randoms.append(self._draw())
        y = self._noted(done, self._run(work))
        self._last = self._after(before)
        return y

    def _call(self, done: Done) -> list[Tensor]:
        """Several works that are one call."""
        before = self.state.read() if self._last is None else self._last
        done.starts = [before] * len(done.works)
        calls, results = self._pass(done, before)
        for number in range(calls):
            if number:
                self._pass(done, before, stop=True)
        if not calls and len(done.works) > 1:
            self.state.check_seen()
        if calls:
            del results
            _, results = self._pass(done, before, last=calls)
        return results

    def _pass(self, done: Done, before: Snapshot, stop: bool = False, last: int = 0) -> tuple[int, list[Tensor]]:
        """Each work once: norms that have no statistics yet take those of the work, and the first of them is noted.

        Args:
            done: the works.
            before: the state in which each begins.
            stop: leave the network at the first norm without statistics.
            last: so many norms there must be, all with statistics.

        Returns:
            Number of norms, results.
        """
        found: list[Stats] = []
        results: list[Tensor] = []
        first: Snapshot | None = None
        met: set[int] = set()
        fresh, done.prints = not done.randoms, []
        for k, work in enumerate(done.works):
            self.state.write(before)
            if fresh:
                done.randoms.append(self._draw())
            else:
                self.random.go(done.randoms[k])
            norms = Norms(done.stats, stop)
            with suppress(Enough):
                results.append(self._noted(done, self._run(work, norms)))
            met.add(len(done.stats) + 1 if norms.stopped else norms.calls)
            found += norms.found[:1]
            if not norms.calls or last:
                now = self._after(before)
                self._check_same(first, now, len(done.works))
                first = first or now
        if len(met) > 1 or len(found) != (0 if last or met == {0} else len(done.works)) or (last and met != {last}):
            raise PartitionError(
                f"memory= runs the regions in {len(done.works)} calls, and the local network has not the same batch norms "
                f"in each ({sorted(met)} of them), so that they cannot be those of one call; {WAY_OUT}"
            )
        if found:
            done.stats.append(Stats.merge(found))
        self._last = first
        return met.pop(), results

    def _run(self, work: Work, norms: Norms | None = None) -> Tensor:
        """One work, with a graph where gradients are on."""
        torch.clear_autocast_cache()  # of weights' casts, which belong to another work's graph
        self._since = _sequence() if self.grad else 0
        taken = work.take(self.x.detach()).detach()
        self._taken = taken.requires_grad_() if self.grad and self.x.requires_grad else taken
        with nullcontext() if norms is None else norms:
            return work.run(self._taken)

    def _noted(self, done: Done, y: Tensor) -> Tensor:
        """The result without its graph, after what it reads has been noted."""
        if self.grad:
            done.prints.append(_print(y) if y.requires_grad else None)
        if self.grad and y.requires_grad:
            known = {id(t) for t in (*self.leaves, self._taken)}
            self.leaves += [t for t in _leaves(y, self._since) if id(t) not in known]
        return y.detach()

    def _draw(self) -> list[Any]:
        """Where the generators stand; kept once where nothing is drawn."""
        self._drawn = self.random.now(self._drawn)
        return self._drawn

    def _after(self, before: Snapshot) -> Snapshot:
        """The state after a work; `before` itself where nothing changed."""
        now = self.state.read()
        self.state.check_written(before, now)
        return before if self.state.equal(before, now) else now

    def _check_same(self, first: Snapshot | None, now: Snapshot, works: int) -> None:
        differs = None if first is None else self.state.differs(first, now)
        if differs:
            raise PartitionError(
                f"memory= runs the regions in {works} calls, and the local network changes {differs} differently in "
                f"each: without memory it is made once, from all of them; {WAY_OUT}"
            )

    def check_put_aside(self, work: Work, before: Snapshot) -> None:
        """Refuse tensors with a gradient that the network keeps for a loss: the loop has no graph of them.

        What does not depend on the region, such as a normalised weight, is the same for a region of zeros.
        """
        aside = self.state.put_aside(before, self.state.read()) if self.grad else {}
        if not aside:
            return
        self.state.write(before)
        with Inside(), self.random.unmoved():
            work.run(torch.zeros_like(work.take(self.x.detach())))
        again = self.state.put_aside(before, self.state.read())
        for key, value in aside.items():
            if key not in again or not same(value, again[key]):
                raise PartitionError(
                    f"memory= keeps no graph of the local network, whose forward puts aside {self.state.name(key)}, "
                    "which has a gradient and would lose it: make it part of the result, or leave memory out"
                )

    # ------------------------------------------------------------------------------------ backward

    def backward(self, grads: list[Tensor], whole: Tensor | None) -> list[Tensor | None]:
        """Gradients of the leaves; that of x is added to `whole`."""
        now, flags = self.state.read(), [t.requires_grad for t in self.leaves]
        totals: list[Tensor | None] = [None] * len(self.leaves)
        with self.random.unmoved(), torch.enable_grad(), Inside(), self._autocast(), _without_hooks(self.leaves):
            try:
                wrong = [w for done in self._done for w in self._pull(done, grads, whole, totals)]
            finally:
                self.state.write(now)
                for leaf, flag in zip(self.leaves, flags):
                    leaf.requires_grad_(flag)
        if any(bool(w) for w in wrong):
            raise VerificationError(
                "memory= computes each region again in backward, and the local network gave other numbers than in "
                "forward: it was changed in between, or draws from a random generator that is neither torch's, "
                "Python's, NumPy's nor an attribute of its modules; leave it as it is until backward, or leave memory out"
            )
        return totals

    def _pull(self, done: Done, grads: list[Tensor], whole: Tensor | None, totals: list[Tensor | None]) -> list[Tensor]:
        """One call. Returns for each work whether its result was another."""
        own = [grads.pop(0) for _ in done.works]
        known: dict[int, Sums] = {}
        for number in reversed([k for k, stats in enumerate(done.stats) if stats.needs]):
            known[number] = self._sums(done, own, number, known)
        wrong = []
        for k, (before, grad) in enumerate(zip(done.prints, own)):
            if before is not None:
                y = self._once_more(done, k, Norms(done.stats, sums=known) if done.split else None)
                wrong.append(_wrong(before, _print(y), y.dtype))
                self._gradients(done.works[k], y, grad, whole, totals)
                del y
        return wrong

    def _sums(self, done: Done, grads: Sequence[Tensor], number: int, known: dict[int, Sums]) -> Sums:
        """What the gradient of a norm needs, summed over all works."""
        none = torch.zeros_like(done.stats[number].mean)
        plain, times = none, none
        for k, grad in enumerate(grads):
            norms = Norms(done.stats, sums=known, watched=number)
            y = self._once_more(done, k, norms)
            found = None
            if norms.seen is not None and y.requires_grad:
                (found,) = torch.autograd.grad(y, norms.seen[1], grad, allow_unused=True)
            if norms.seen is not None and found is not None:
                a, b = sums(norms.seen, done.stats[number], found)
                plain, times = plain + a, times + b
            del y, norms, found  # what lies before the norm is in their graph, and would stay while the next work runs
        return plain, times

    def _once_more(self, done: Done, k: int, norms: Norms | None) -> Tensor:
        """A work as it was in forward."""
        self.state.write(done.starts[k])
        self.random.go(done.randoms[k])
        for leaf in self.leaves:
            leaf.requires_grad_()
        return self._run(done.works[k], norms)

    def _gradients(
        self, work: Work, y: Tensor, grad: Tensor, whole: Tensor | None, totals: list[Tensor | None]
    ) -> None:
        """Add those of one work."""
        wanted = [*self.leaves, *([self._taken] if self._taken.requires_grad else [])]
        found = torch.autograd.grad(y, wanted, grad, allow_unused=True)
        for i, (leaf, part) in enumerate(zip(self.leaves, found)):
            totals[i] = _added(totals[i], part, leaf)
        if whole is not None and self._taken.requires_grad and found[-1] is not None:
            work.give(whole, found[-1], self.x)


def _added(total: Tensor | None, part: Tensor | None, leaf: Tensor) -> Tensor | None:
    if part is None:
        return total
    if part.layout != torch.strided:
        return part if total is None else total + part
    return (torch.zeros_like(leaf) if total is None else total).add_(part)


def _sequence() -> int:
    """Nodes of the graph that are made from here on have at least this number."""
    return (torch.zeros((), requires_grad=True) * 1).grad_fn._sequence_nr()  # type: ignore[union-attr]


def _leaves(y: Tensor, since: int) -> list[Tensor]:
    """Tensors that `y` is made from and that need a gradient.

    Raises:
        PartitionError: one of them is itself a result, made before the local network ran.
    """
    if y.grad_fn is None:
        return [y]
    found: list[Tensor] = []
    nodes, seen = [y.grad_fn], {y.grad_fn}
    while nodes:
        node = nodes.pop()
        if hasattr(node, "variable"):
            found.append(node.variable)
        elif node._sequence_nr() < since:
            raise PartitionError(
                f"memory= runs the local network again in backward, and it reads a tensor that was made before it ran "
                f"({node.name()}), whose own graph serves only once; make it inside the local network, or leave memory out"
            )
        fresh = {n for n, _ in node.next_functions if n is not None} - seen
        seen |= fresh
        nodes += fresh
    return found


def _print(y: Tensor) -> Tensor:
    """Two numbers that tell results apart: the sum, and that of the absolute values."""
    z = torch.view_as_real(y.detach()) if y.is_complex() else y.detach()
    z = z.float() if z.dtype in (torch.float16, torch.bfloat16) else z
    return torch.stack([z.sum(), z.abs().sum()])


def _wrong(before: Tensor, now: Tensor, dtype: torch.dtype) -> Tensor:
    """Are these prints of other numbers: beyond what rounding in another order explains."""
    eps = torch.finfo(dtype).eps
    within = eps**0.5 if eps < 1e-4 else 4 * eps  # of 16 bits the root would let a tenth pass
    near = (now - before).abs() <= within * before[1].abs()
    return ~(near | (now == before) | ((now != now) & (before != before))).all()


def _autocast(device: str) -> Callable[[], AbstractContextManager[Any]]:
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return lambda: torch.autocast(device, dtype, enabled)


@contextmanager
def _without_hooks(leaves: Sequence[Tensor]) -> Iterator[None]:
    """Hooks on leaves see the sum over all works, once, when the loop's gradient arrives there."""
    hooks = [leaf._backward_hooks for leaf in leaves]
    try:
        for leaf in leaves:
            leaf._backward_hooks = None
        yield
    finally:
        for leaf, own in zip(leaves, hooks):
            leaf._backward_hooks = own
