"""What the loop over regions adds to the kernels' own time, with regions of 256 pixels.

The same program runs twice in turns: by the loop, and with a clock around every kernel. The difference between the
loop's time and the sum of the kernels' is what Python costs (a clock costs about 0.1 microseconds, and is counted
as loop).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
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


def share(chosen: Options, schedule: str) -> float:
    """The loop's own share of the kernels' time: median of interleaved runs."""
    side = chosen.side(1024)
    x = chosen.draw(1, 3, side, side)
    small = ranger_nn.regionalize(network(chosen), regions=(REGION, REGION), schedule=schedule)
    shares = []
    with torch.no_grad():
        ready, inputs = small._prepare((x,), {})
        tensors = small._gather(ready, inputs)
        spent = [0.0]
        steps = [(clocked(f, spent), *rest) for f, *rest in ready.forward]
        for _ in range(chosen.repeats + 1):
            slots: list[Any] = [None] * ready.planned.forward.slots
            for slot, tensor in zip(ready.planned.forward.external.values(), tensors, strict=True):
                slots[slot] = tensor.detach()
            spent[0] = 0.0
            start = time.perf_counter()
            run(steps, slots, ready.engine)  # type: ignore[arg-type]
            shares.append((time.perf_counter() - start) / spent[0] - 1)
    return statistics.median(shares[1:])


def main() -> None:
    """Both schedules."""
    chosen = options()
    for schedule in ("slide", "tile"):
        found = share(chosen, schedule)
        mark = "" if found <= 0.05 else " MISSED"
        print(f"BasicUNet, regions of {REGION}, {schedule}: joins and the loop add {found:.1%} (<= 5.0%){mark}")


if __name__ == "__main__":
    main()
