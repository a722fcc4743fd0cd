"""What every framework's `prepare` does: open the source, and plan with what reading and writing leave of the memory.

What is read ahead and what waits to be written takes memory too, and how much depends on the plan's regions: the plan is
made with what they leave, a few times at most. Enter at `opened`, `fitted` and `first_fitting`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from ranger_nn.core.program import WRITE
from ranger_nn.errors import BudgetError, InputError
from ranger_nn.execute.files.feed import AHEAD
from ranger_nn.execute.files.handle import loaded_boxes, written_bytes
from ranger_nn.execute.files.order import Order, volume
from ranger_nn.execute.files.prepared import Lowered
from ranger_nn.io.pixels import Pixels
from ranger_nn.io.protocol import Source, nbytes
from ranger_nn.io.reader import Reader
from ranger_nn.io.sources import open_source
from ranger_nn.planning.budget import format_bytes, parse_memory

ROUNDS = 4
READING_SHARE = 2
"""What the input's store decodes at once may take half of the memory."""

Plan = TypeVar("Plan", bound=Lowered)
Make = Callable[[int | None], Lowered]
"""Plans for so many bytes; None: as many as it likes. Raises BudgetError where nothing fits."""


@dataclass(frozen=True)
class Opened:
    """A source that is open, and how it is taken.

    `shape`: of the model's input, channels where `order` has them; `allowed`: bytes, None without a limit.
    """

    source: Source
    reader: Reader
    pixels: Pixels
    order: Order
    shape: tuple[int, ...]
    allowed: int | None
    axes: str | None

    @property
    def hint(self) -> str:
        """Where the axes of an array were guessed: how it was taken, and how to say it."""
        if self.axes is not None or not getattr(self.source, "guessed", False):
            return ""
        spatial = self.order.spatial(self.shape)
        letters, sizes = "NC" + "ZYX"[-len(spatial) :], (1, self.order.channels(self.shape), *spatial)
        seen = ", ".join(f"{a} {n}" for a, n in zip(letters, sizes, strict=True))
        return (
            f" {self.source.name} was taken as {seen}; if that is wrong, name its axes: of a volume axes='ZYX' or 'CZYX' "
            "(--axes)."
        )


@contextmanager
def opened(
    given: Any,
    memory: int | str | None,
    order: Order,
    *,
    pixels: Pixels | None,
    axes: str | None,
    level: int,
    skip_bad: bool,
) -> Iterator[Opened]:
    """The source, which stays open unless what is done inside fails. Arguments and errors as for `run`."""
    allowed = parse_memory(memory)
    limit = None if allowed is None else allowed // READING_SHARE
    source = open_source(given, axes, level, limit)
    try:
        reader = Reader(source, limit, skip_bad)
        pixels = pixels or (Pixels(scale=1.0) if source.batched else Pixels())
        _check_depth(source, pixels)
        shape = order.shape(pixels.channels(source.shape[0], source.name), source.shape[1:])
        yield Opened(source, reader, pixels, order, shape, allowed, axes)
    except BaseException:
        source.close()
        raise


def _check_depth(source: Source, pixels: Pixels) -> None:
    depth = getattr(source, "depth", None)  # a user's own source may not tell
    if depth and pixels.scale is None:
        raise InputError(
            f"{source.name} has {depth} bits in {source.dtype}, so that its largest value is {2**depth - 1}, not that of its "
            f"type: say the scale, Pixels(scale=1 / {2**depth - 1}) (--scale {1 / (2**depth - 1):.8g}), or scale=1 for the "
            "numbers as they are."
        )


def fitted(make: Make, where: Opened, name: str) -> tuple[Lowered, int]:
    """(plan, bytes of reading and writing) that fit together; `name`: of the network.

    Raises:
        BudgetError: they do not.
    """
    reader, allowed = where.reader, where.allowed
    in_flight = reader.held
    if allowed is None:
        lowered = make(None)
        return lowered, reader.held + _in_flight(lowered, where)
    for _ in range(ROUNDS):
        if in_flight >= allowed:
            break
        try:
            lowered = make(allowed - in_flight)
        except BudgetError as error:
            raise _too_small(make, where, name, allowed, error) from None
        needed = reader.held + _in_flight(lowered, where)
        if lowered.plan.projected + needed <= allowed:
            return lowered, needed
        in_flight = max(needed, in_flight + 1)
    raise BudgetError(
        f"{name} on {reader.source.name}: reading ahead and writing take {format_bytes(in_flight)} ({in_flight} bytes) of "
        f"the {format_bytes(allowed)} ({allowed} bytes) allowed, and no plan was found for the rest. Allow "
        f"{2 * in_flight + allowed} bytes, or give regions= with fewer rows.",
        allowed=allowed,
        least=2 * in_flight + allowed,
    )


def first_fitting(plans: Iterable[tuple[Plan, str]], where: Opened, name: str) -> tuple[Plan, int]:
    """(plan, bytes of reading and writing): the first of ever smaller plans, each with the node that binds it, that fits.

    Raises:
        BudgetError: none does.
    """
    allowed, best = where.allowed, None
    for lowered, binding in plans:
        beside = where.reader.held + _in_flight(lowered, where)
        if allowed is None or lowered.plan.projected + beside <= allowed:
            return lowered, beside
        if best is None or lowered.plan.projected + beside < sum(best[:2]):
            best = lowered.plan.projected, beside, binding
    assert best is not None
    raise _does_not_fit(where, name, allowed or 0, *best)


def _too_small(make: Make, where: Opened, name: str, allowed: int, error: BudgetError) -> BudgetError:
    """The error in terms of what the user allowed: the plan's least, and reading and writing twice (sizes of rows vary)."""
    beside = 2 * (where.reader.held + _in_flight(make(error.least), where))
    return _does_not_fit(where, name, allowed, error.least or 0, beside, error.binding)


def _does_not_fit(where: Opened, name: str, allowed: int, plan: int, beside: int, binding: str | None) -> BudgetError:
    """`plan`, `beside`: bytes of the smallest plan, and of its reading and writing."""
    return BudgetError(
        f"{name} on {where.source.name} does not fit in {format_bytes(allowed)} ({allowed} bytes): the least that a "
        f"plan needs for this input is {format_bytes(plan)}, bound by {binding}, and reading and writing "
        f"take {format_bytes(beside)} beside it. Allow {plan + beside} bytes, or use a smaller input.",
        allowed=allowed,
        least=plan + beside,
        binding=binding,
    )


def _in_flight(lowered: Lowered, where: Opened) -> int:
    """Bytes of regions that are read ahead (as pixels and as tensor) or wait to be written."""
    graph, program, source = lowered.graph, lowered.program, where.source
    (v,) = graph.inputs
    value = graph.values[v]
    boxes = loaded_boxes(program.instructions, program.external[v], value.shape)
    taken = max((volume(b) * value.itemsize for b in boxes), default=0)
    raw = max((nbytes(where.order.spatial(b), source.shape[0], source.dtype.itemsize) for b in boxes), default=0)
    written = max((written_bytes(i.reads) for i in program.instructions if i.op == WRITE), default=0)
    return (AHEAD + 1) * taken + raw + (AHEAD + 2) * written
