"""MONAI's BasicUNet with batch norm in eval mode: forward and backward."""

from __future__ import annotations

from benchmarks.basicunet_inference import network
from benchmarks.common import Case, Options, main


def cases(chosen: Options) -> list[Case]:
    """A fifth of the memory; the forward is recomputed in the backward."""
    side = chosen.side(1024)
    x = chosen.draw(1, 3, side, side)
    name = f"BasicUNet 1x3x{side}x{side}, forward + backward"
    return [Case(name, network(chosen), x, share=1 / 5, train=True, time_target=1.6)]


if __name__ == "__main__":
    main(cases)
