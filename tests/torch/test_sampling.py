"""Samples at places that the network computes: the grid and the result are cut, the sampled image is finished before."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.torch.cut import WAYS, check_cut

MODES = {2: ("bilinear", "nearest", "bicubic"), 3: ("bilinear", "nearest")}
BORDERS = ("zeros", "border", "reflection")
SPACE = {2: (13, 11), 3: (7, 6, 5)}


class Warp(nn.Module):
    """An image sampled in every mode, with every border, where a convolution says: beyond its edges, too."""

    def __init__(self, rank: int, align: bool, modes: tuple[str, ...]) -> None:
        super().__init__()
        conv = {2: nn.Conv2d, 3: nn.Conv3d}[rank]
        self.stem, self.flow, self.head = (conv(a, b, 3, padding=1) for a, b in ((3, 4), (4, rank), (4, 3)))
        self.align, self.modes = align, modes

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        flow = self.flow(x).movedim(1, -1)
        grid = flow.tanh() * 1.4
        each = [F.grid_sample(x, grid, *way, align_corners=self.align) for way in product(self.modes, BORDERS)]
        return self.head(torch.stack(each).sum(0))


@pytest.mark.parametrize(("schedule", "regions"), WAYS)
@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize("rank", [2, 3])
def test_grid_sample(rank: int, align: bool, schedule: str, regions: tuple[int, ...]) -> None:
    """Numbers, and gradients of the image, of the grid and of all that is before them."""
    check_cut(Warp(rank, align, MODES[rank]), (2, 3, *SPACE[rank]), schedule, regions, whole=["grid_sampler"])


@pytest.mark.parametrize(("schedule", "regions"), WAYS)
def test_the_grid_has_another_size(schedule: str, regions: tuple[int, ...]) -> None:
    """Twice as many rows as the image: places between its own."""

    class Finer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flow, self.head = nn.ConvTranspose2d(3, 2, 4, 2, 1), nn.Conv2d(3, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.grid_sample(x, self.flow(x).permute(0, 2, 3, 1), align_corners=False))

    check_cut(Finer(), (2, 3, 13, 11), schedule, regions, whole=["grid_sampler"])
