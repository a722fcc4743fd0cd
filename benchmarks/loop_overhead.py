"""What the loop over regions adds to the kernels' own time, with regions of 256 pixels.

The same program runs twice in turns: by the loop, and with a clock around every kernel. The difference between the
loop's time and the sum of the kernels' is what Python costs (a clock costs about 0.1 microseconds, and is counted
as loop). Joining the rows that a slide kept with the new ones is a copy, and stands apart.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

import ranger_nn
from benchmarks.basicunet_inference import network
from benchmarks.common import Options, options
from ranger_nn.execute.machine import run

REGION = 256


def clocked(function: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    """The kernel, its seconds added up."""

    def call(*args: Any) -> Any:
        start = time.perf_counter()
        result = function(*args)
        spent[0] += time.perf_counter() - start
        return result

    return call


def shares_of(chosen: Options, schedule: str) -> tuple[float, float]:
    """What the loop and what the joins of kept rows add to the kernels' time: medians of several runs."""
    side = chosen.side(1024)
    x = chosen.draw(1, 3, side, side)
    small = ranger_nn.regionalize(network(chosen), regions=(REGION, REGION), schedule=schedule)
    shares: list[tuple[float, float]] = []
    with torch.no_grad():
        ready, inputs = small._prepare((x,), {})
        tensors = small._gather(ready, inputs)
        spent, joined = [0.0], [0.0]
        engine: Any = SimpleNamespace(narrow=ready.engine.narrow, join=clocked(ready.engine.join, joined))
        steps = [(clocked(f, spent), *rest) for f, *rest in ready.forward]
        for _ in range(chosen.repeats + 1):
            slots: list[Any] = [None] * ready.planned.forward.slots
            for slot, tensor in zip(ready.planned.forward.external.values(), tensors, strict=True):
                slots[slot] = tensor.detach()
            spent[0] = joined[0] = 0.0
            start = time.perf_counter()
            run(steps, slots, engine)  # type: ignore[arg-type]
            taken = time.perf_counter() - start
            shares.append(((taken - joined[0]) / spent[0] - 1, joined[0] / spent[0]))
    loops, joins = zip(*shares[1:], strict=True)
    return statistics.median(loops), statistics.median(joins)


def main() -> None:
    """Both schedules."""
    chosen = options()
    for schedule in ("slide", "tile"):
        loop, joins = shares_of(chosen, schedule)
        mark = "" if loop <= 0.05 else " MISSED"
        print(
            f"BasicUNet, regions of {REGION}, {schedule}: the loop adds {loop:.1%} (<= 5.0%){mark}, joins {joins:.1%}"
        )


if __name__ == "__main__":
    main()
