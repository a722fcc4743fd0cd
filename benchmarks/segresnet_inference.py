"""MONAI's SegResNet: a group norm before every convolution, so every block ends a sweep."""

from __future__ import annotations

import torch
from monai.networks.nets import SegResNet

from benchmarks.common import Case, Options, main


def cases(chosen: Options) -> list[Case]:
    """Half of the memory for a little time, a quarter for more."""
    torch.manual_seed(0)
    side = chosen.side(2048)
    model = chosen.place(SegResNet(spatial_dims=2, in_channels=3, out_channels=2)).eval()
    x = chosen.draw(1, 3, side, side)
    name = f"SegResNet 1x3x{side}x{side}, inference"
    return [
        Case(name, model, x, share=1 / 2, time_target=1.2),
        Case(f"{name}, tighter", model, x, share=1 / 4, time_target=2.5),
    ]


if __name__ == "__main__":
    main(cases)
