"""MONAI's BasicUNet with batch norm in eval mode: forward and backward.

In float32 the two sides' gradients differ by more than Ranger rounds: both are therefore held against float64 too,
on half the side.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import ranger_nn
from benchmarks.basicunet_inference import network
from benchmarks.common import Case, Options, compare, difference, gradients, options, show, training


def cases(chosen: Options) -> list[Case]:
    """A fifth of the memory; the forward is recomputed in the backward."""
    side = chosen.side(1024)
    x = chosen.draw(1, 3, side, side)
    name = f"BasicUNet 1x3x{side}x{side}, forward + backward"
    return [Case(name, network(chosen), x, share=1 / 5, train=True, time_target=1.6)]


def found(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """The gradients of one step."""
    training(model, x)()
    return gradients(model)


def against_float64(model: nn.Module, chosen: Options) -> str:
    """How far each side's gradients are from those of float64."""
    side = chosen.side(1024) // 2
    x = chosen.draw(1, 3, side, side)
    exact = found(copy.deepcopy(model).double(), x.double())
    untouched, ours = found(model, x), found(ranger_nn.regionalize(model), x)
    return (
        f"gradients against float64, 1x3x{side}x{side}: untouched off by {difference(untouched, exact):.1e}, "
        f"ours by {difference(ours, exact):.1e}, of the largest of each tensor"
    )


def main() -> None:
    """The row, and both sides against float64 below it."""
    chosen = options()
    for case in cases(chosen):
        show([compare(case, chosen)])
        if chosen.dtype == torch.float32:
            print(against_float64(case.model, chosen))


if __name__ == "__main__":
    main()
