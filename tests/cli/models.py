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


class Repeated(nn.Module):
    """Gradients that depend on the order of sums, and a branch of the parameters that gets none."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.frozen = nn.Parameter(torch.zeros(2), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.conv(x), training=self.training)


def scripted() -> nn.Module:
    return torch.jit.trace(Smooth(), torch.rand(1, 3, 8, 8))


def data_parallel() -> nn.Module:
    return nn.DataParallel(Smooth())


def distributed() -> nn.Module:
    """As a wrapped module is made, without a process group."""
    made = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(made)
    return made


def regionalized() -> nn.Module:
    import ranger_nn

    return ranger_nn.regionalize(Smooth())


def leaves() -> nn.Module:
    raise SystemExit(0)


def clears_the_screen() -> nn.Module:
    raise ValueError("a\x1b[2Jb")


def needs_an_argument(width: int) -> nn.Module:
    return nn.Conv2d(3, width, 1)
