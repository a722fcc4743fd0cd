"""Lp norms over what is cut: sums of powers, or extrema, of the regions. Norms over neighbouring channels, which are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ranger_nn
from tests.nets import between
from tests.nets.norms import GlobalResponseNorm
from tests.support import compare, random_inputs
from tests.torch.cut import WAYS, check_cut

SHAPE = (2, 3, 13, 11)
INF = float("inf")
POWERS = (1, 2, 3, 2.5, 0.5, 0, -1, -2.5, INF, -INF)


class Norms(nn.Module):
    """Times norms of each channel, of each sample and of all."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.linalg.vector_norm(x, self.p, (-1, -2))[:, :, None, None]
        found = torch.linalg.vector_norm(x, self.p, (1, 2, 3), True) + torch.linalg.vector_norm(x, self.p)
        return x * (flat + found) + torch.linalg.vector_norm(x, self.p, (2, 3), True)


@pytest.mark.parametrize(("schedule", "regions"), WAYS)
@pytest.mark.parametrize("p", POWERS)
def test_of_space(p: float, schedule: str, regions: tuple[int, ...]) -> None:
    """Cut along all that is summed."""
    check_cut(between(Norms(p)), SHAPE, schedule, regions)


@pytest.mark.parametrize(("schedule", "regions"), WAYS)
def test_other_names(schedule: str, regions: tuple[int, ...]) -> None:
    """`Tensor.norm`, `linalg.norm`, `matrix_norm`, `normalize`, global response normalisation."""

    def norms(x: Tensor) -> Tensor:
        flat = x.norm(3, dim=(2, 3)) + torch.linalg.norm(x, dim=(2, 3)) + torch.linalg.matrix_norm(x, 1)
        return x.norm() * x + flat[:, :, None, None] + torch.norm(x, INF, dim=(2, 3), keepdim=True)

    # where columns are cut too, a matrix norm's sums along rows are finished before the largest of them
    whole = ["amax", "linalg_vector_norm"] if len(regions) > 1 else []
    check_cut(between(norms), SHAPE, schedule, regions, whole)
    check_cut(between(GlobalResponseNorm()), SHAPE, schedule, regions)


@pytest.mark.parametrize("p", POWERS)
def test_zeros_and_ties(p: float) -> None:
    """Gradients where the derivative of a power or of a root is infinite, and where several are the largest."""
    x = random_inputs((SHAPE,))[0].round()
    x[0, 0] = 0
    for schedule, regions in WAYS:
        compare(Norms(p), lambda m, s=schedule, r=regions: ranger_nn.regionalize(m, regions=r, schedule=s), (x,))


@pytest.mark.parametrize(("schedule", "regions"), WAYS)
@pytest.mark.parametrize(("space", "size"), [((17,), 3), ((13, 11), 4), ((13, 11), 5), ((7, 6, 5), 4)], ids=str)
def test_of_neighbouring_channels(space: tuple[int, ...], size: int, schedule: str, regions: tuple[int, ...]) -> None:
    """`LocalResponseNorm` is a pool over channels, padded: of series, images and volumes."""
    conv: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(space) - 1]
    norm = nn.LocalResponseNorm(size, alpha=0.3, beta=0.6, k=1.5)
    model = nn.Sequential(conv(3, 6, 3, padding=1), norm, conv(6, 4, 3, padding=1))
    check_cut(model, (2, 3, *space), schedule, regions[: len(space)])
