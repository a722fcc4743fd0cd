"""The loop over regions: run a program's instructions over a list of slots.

Everything that depends on shapes was decided when the program was made; `bind` turns each instruction into a
closure once, `run` calls them in order. The framework comes in as an `Engine`: how to narrow, join, allocate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from ranger_nn.core.program import Instruction, Read

Step = tuple[Callable[..., Any], tuple[Read, ...], tuple[int, ...], tuple[int, ...], int]


class Engine(Protocol):
    """What the loop asks of a framework: two functions on its tensors, and kernels bound to boxes."""

    def narrow(self, x: Any, dim: int, start: int, length: int) -> Any:
        """View of [start, start + length) along `dim`."""
        ...

    def join(self, parts: Sequence[Any], dim: int) -> Any:
        """Concatenation."""
        ...

    def bind(self, instruction: Instruction) -> Callable[..., Any]:
        """Function of the instruction's reads that gives its result (a tuple where it has several slots)."""
        ...


def bind(instructions: Iterable[Instruction], engine: Engine) -> list[Step]:
    """Closures for instructions."""
    return [(engine.bind(i), i.reads, i.outs, tuple(i.frees), i.region) for i in instructions]


def run(
    steps: Sequence[Step], slots: list[Any], engine: Engine, on_region: Callable[[int], None] | None = None
) -> None:
    """Run in order; results go into `slots`, freed slots become None."""
    narrow, join = engine.narrow, engine.join
    region = -1
    for function, reads, outs, frees, here in steps:
        if on_region is not None and here != region:
            if region >= 0:
                on_region(region)
            region = here
        arguments: list[Any] = []
        for read in reads:
            parts: list[Any] = []
            for slot, cuts in read.parts:
                x = slots[slot]
                for dim, start, length in cuts:
                    x = narrow(x, dim, start, length)
                parts.append(x)
            if len(parts) == 1:
                arguments.append(parts[0])
            else:
                arguments.append(join(parts, read.dim) if parts else None)
        parts, x = [], None
        result = function(*arguments)
        arguments = []
        if len(outs) == 1:
            slots[outs[0]] = result
        elif outs:
            for slot, item in zip(outs, result, strict=True):
                slots[slot] = item
        result = item = None  # what is freed below must not live on in a name
        for slot in frees:
            slots[slot] = None
    if on_region is not None and region >= 0:
        on_region(region)
