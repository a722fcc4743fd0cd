"""A small U-Net in plain PyTorch: nothing in it knows of regions."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def block(inputs: int, outputs: int) -> nn.Sequential:
    """Two 3 x 3 convolutions, each followed by a ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(outputs, outputs, 3, padding=1),
        nn.ReLU(inplace=True),
    )


class UNet(nn.Module):
    """Three levels with skip connections; gives the picture less the noise that it found."""

    def __init__(self, channels: int = 3, width: int = 16) -> None:
        super().__init__()
        self.level0 = block(channels, width)
        self.level1 = block(width, 2 * width)
        self.level2 = block(2 * width, 2 * width)
        self.pool = nn.MaxPool2d(2, ceil_mode=True)  # sides need not be even: the photograph has 1411
        self.join1 = block(4 * width, width)
        self.join0 = block(2 * width, width)
        self.head = nn.Conv2d(width, channels, 1)
        nn.init.normal_(self.head.weight, std=0.01)  # starts near the identity
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.level0(x)
        middle = self.level1(self.pool(fine))
        coarse = self.level2(self.pool(middle))
        middle = self.join1(torch.cat([up(coarse, middle), middle], dim=1))
        fine = self.join0(torch.cat([up(middle, fine), fine], dim=1))
        return x - self.head(fine)


def up(small: Tensor, like: Tensor) -> Tensor:
    """Twice the size, cut to the size of `like`."""
    large = nn.functional.interpolate(small, scale_factor=2.0, mode="nearest")
    return large[..., : like.shape[-2], : like.shape[-1]]
