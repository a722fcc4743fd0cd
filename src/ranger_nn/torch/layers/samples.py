"""Does a local network treat each sample of a batch by itself: otherwise groups of regions are not what one call gives.

Some samples run together, then in two parts, when a shape is first seen. Batch norms take in the parts the statistics
that they had together, and dropout lets everything through; all else must give the same numbers, and leave the same
state behind. Enter at `independent`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ranger_nn.errors import PartitionError
from ranger_nn.torch.layers.norms import Inside, Norms, Stats
from ranger_nn.torch.layers.passes import WAY_OUT, Work
from ranger_nn.torch.layers.state import Random, Snapshot, State

DROPOUTS = frozenset(
    [F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout]
)
TF32 = 2.0**-10  # the step of its numbers near 1: what CUDA takes float32 for in convolutions, unless told otherwise


@dataclass(frozen=True)
class Part:
    """Some samples of a work: `start` to `stop` of its batch, which is axis 1."""

    work: Work
    start: int
    stop: int | None

    def take(self, x: Tensor) -> Tensor:
        """Their own copy."""
        return self.work.take(x)[:, self.start : self.stop].clone()

    def run(self, taken: Tensor) -> Tensor:
        """The local network on them."""
        return self.work.run(taken)

    def give(self, whole: Tensor, grad: Tensor, x: Tensor) -> None:
        """Nothing: parts are only looked at."""


def independent(
    together: Work, parts: Sequence[Work], axis: int, x: Tensor, modules: Sequence[nn.Module], name: str
) -> bool:
    """Run samples together and in parts; all state stays as it is.

    Args:
        together: a work of two samples or more.
        parts: the same samples, as several works.
        axis: along which their results make up that of `together`.
        x: the input.
        modules: what runs on regions.
        name: of the local network, for the error.

    Returns:
        Do the samples differ, so that this says something.

    Raises:
        PartitionError: the local network joins samples, or changes its state by how many there are.
    """
    state = State(modules)
    before, random = state.read(), Random(x.device, state.generators())
    start, step, at = random.now(), _step(x, modules), 0
    try:
        with torch.no_grad(), random.unmoved(), Inside(), _Through():
            whole, stats = _run(together, (), x)
            drawn, after = random.now(start) is not start, state.read()
            if drawn:
                raise PartitionError(
                    f"memory= runs the regions in groups, and the local network {name} draws random numbers besides dropout: "
                    f"each group would draw its own, which are not those of the layer without memory; {WAY_OUT}"
                )
            if not stats:
                state.check_seen()
            for part in parts:  # one at a time, and compared: memory for several results may not be there
                y = _part(part, stats, x, state, (before, after), name)
                own = whole.narrow(axis, at, y.shape[axis])
                at += y.shape[axis]
                if not drawn and _apart(own, y, whole, step):
                    del y
                    state.write(before)
                    raise _refusal(_apart(whole, _run(together, stats, x)[0], whole, step), name)
    finally:
        state.write(before)
    samples = together.take(x.detach()).flatten(0, 1)
    return bool((samples != samples[:1]).any())


def _refusal(again: bool, name: str) -> PartitionError:
    """Of other numbers in parts; `again`: also of the same samples a second time."""
    if again:
        return PartitionError(
            f"memory= runs the local network more than once, and {name} gives other numbers each time: its forward changes "
            "what is neither a buffer nor a number, text or tensor of its modules, or draws from a random generator that is "
            "neither torch's, Python's, NumPy's nor an attribute of its modules; make it one of these, or leave memory out"
        )
    return PartitionError(
        f"memory= runs the regions in groups, as samples of a batch, and the local network {name} joins samples of a "
        "batch: together they give other numbers than each by itself (a mean, softmax or maximum over axis 0, or the "
        f"batch's size). Move that operator out of local, or {WAY_OUT}"
    )


def _run(work: Work, stats: Sequence[Stats], x: Tensor) -> tuple[Tensor, list[Stats]]:
    """Result, and statistics of batch norms that were not given."""
    torch.clear_autocast_cache()  # of weights' casts without a graph
    with Norms(stats) as norms:
        y = work.run(work.take(x.detach()))
    return y, norms.found


def _part(
    part: Work, stats: Sequence[Stats], x: Tensor, state: State, known: tuple[Snapshot, Snapshot], name: str
) -> Tensor:
    """Result of some samples, from the state before, which must leave the state after."""
    state.write(known[0])
    y, _ = _run(part, stats, x)
    differs = state.differs(known[1], state.read())
    if differs:
        raise PartitionError(
            f"memory= runs the regions in several calls, and the local network {name} changes {differs} by which samples "
            f"a call has, or how many: without memory it is made once, from all of them; {WAY_OUT}"
        )
    return y


class _Through(TorchFunctionMode):
    """While it is on, dropout lets everything through."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The input of dropout, all else as it is."""
        kwargs = kwargs or {}
        if func in DROPOUTS:
            return args[0] if args else kwargs["input"]
        return func(*args, **kwargs)


def _step(x: Tensor, modules: Sequence[nn.Module]) -> float:
    """Of the coarsest numbers that the local network computes in."""
    kinds = {t.dtype for m in modules for t in (*m.parameters(), *m.buffers(), x) if t.is_floating_point()}
    if torch.is_autocast_enabled(x.device.type):
        kinds.add(torch.get_autocast_dtype(x.device.type))
    step = max((torch.finfo(kind).eps for kind in kinds), default=0.0)
    exact = x.device.type == "cpu" and torch.get_float32_matmul_precision() == "highest"
    return step if exact or kinds <= {torch.float64} else max(step, TF32)


def _apart(a: Tensor, b: Tensor, whole: Tensor, step: float) -> bool:
    """Other numbers, beyond what rounding in another order explains, of numbers as large as those of `whole`."""
    if a.shape != b.shape:
        return True
    if a.is_complex():
        a, b, whole = (torch.view_as_real(t) for t in (a, b, whole))
    if not a.is_floating_point() or not a.numel():
        return not torch.equal(a, b)
    step = max(step, torch.finfo(a.dtype).eps)
    within = step**0.5 if step < 1e-4 else 16 * step  # of 16 bits the root would let a tenth pass
    gap = (a - b).abs_()
    wrong = ~(gap <= within * _size(whole))
    return bool(wrong.any()) and bool((wrong & (a != b) & ((a == a) | (b == b))).any())


def _size(whole: Tensor) -> Tensor:
    """The largest of the finite numbers."""
    least, most = torch.aminmax(whole)
    size = torch.maximum(-least, most)
    return size if size.isfinite() else whole.nan_to_num(0.0, 0.0, 0.0).abs_().amax()
