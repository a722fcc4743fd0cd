"""MONAI's BasicUNet with batch norm in eval mode: inference by sliding regions, of a square image and of a wide one."""

from __future__ import annotations

import torch
from monai.networks.nets import BasicUNet

from benchmarks.common import Case, Options, main


def network(chosen: Options) -> torch.nn.Module:
    """The U-Net with its default features, and batch norm."""
    torch.manual_seed(0)
    return chosen.place(BasicUNet(spatial_dims=2, in_channels=3, out_channels=2, norm="batch")).eval()


def cases(chosen: Options) -> list[Case]:
    """A tenth of the memory, no recomputation, no slower."""
    side = chosen.side(2048)
    return [
        Case(
            f"BasicUNet 1x3x{rows}x{columns}, inference, slide",
            network(chosen),
            chosen.draw(1, 3, rows, columns),
            share=1 / 10,
            schedule="slide",
            macs_target=0.01,
            time_target=1.0,
        )
        for rows, columns in ((side, side), (side // 4, side * 4))
    ]


if __name__ == "__main__":
    main(cases)
