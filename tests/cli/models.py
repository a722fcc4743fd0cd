"""Small models that the tests of the command line name as `tests.cli.models:NAME`."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Smooth(nn.Module):
    """Same size out as in, three channels, values in 0..1."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.second(torch.relu(self.first(x))))


class TwoOutputs(nn.Module):
    """Two pictures of different depth from two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=1)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"deep": self.conv(x), "plain": x + y}


class FiveChannels(nn.Module):
    """An output that PNG cannot hold."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


smooth_already_made = Smooth()
not_callable = 7


def gives_a_number() -> int:
    return 7


def fails() -> nn.Module:
    raise RuntimeError("weights are missing\nsecond line")


class Namespace:
    """A factory found by a dotted name."""

    smooth = Smooth
