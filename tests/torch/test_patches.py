"""Overlapping patches, taken out of a map and added up into one: cut along the rows of their places."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.nets import between
from tests.torch.cut import WAYS, check_cut

SHAPE = (2, 3, 13, 11)
WINDOWS: dict[str, dict[str, Any]] = {
    "overlapping": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": (3, 4), "dilation": (2, 1), "padding": (2, 3), "stride": (3, 2)},
    "apart": {"kernel_size": 2, "stride": 3},
    "wide border": {"kernel_size": (4, 2), "padding": 5, "stride": (1, 3)},
    "rows alone": {"kernel_size": (5, 1), "stride": (2, 1), "padding": (2, 0)},
}
JOINED = ("view", "reshape")
"""Where columns are cut as well, rows and columns of places are joined when both are finished."""


def joined(regions: tuple[int, ...]) -> tuple[str, ...]:
    """What may be whole."""
    return JOINED if len(regions) > 1 else ()


@pytest.mark.parametrize(("schedule", "regions"), WAYS)
@pytest.mark.parametrize("window", WINDOWS)
def test_unfold_and_fold(window: str, schedule: str, regions: tuple[int, ...]) -> None:
    """Steps and tiles that end within a row of places; rows of the map that no place reaches."""
    options = WINDOWS[window]

    def patches(x: Tensor) -> Tensor:
        return F.fold(F.unfold(x, **options).sin(), x.shape[2:], **options)

    check_cut(between(patches), SHAPE, schedule, regions, joined(regions))


@pytest.mark.parametrize(("schedule", "regions"), WAYS)
def test_windows_of_a_dimension(schedule: str, regions: tuple[int, ...]) -> None:
    """`Tensor.unfold`, of rows, of columns and of both."""

    def windows(x: Tensor) -> Tensor:
        rows = (
            x.unfold(2, 3, 1)[:, :, :, 1:10].sum(-1)
            + x.unfold(2, 4, 1)[:, :, 1:, 1:10, 2].sin().mean() * x[:, :, 1:12, 1:10]
        )
        return rows * x.unfold(3, 3, 1)[..., 0][:, :, 2:] + x.unfold(2, 3, 1).unfold(-2, 3, 1).prod(-1).sum(-1)

    check_cut(between(windows), SHAPE, schedule, regions)
    strided = between(lambda x: x.unfold(2, 2, 3).unfold(3, 3, 2).movedim((4, 5), (1, 2)).flatten(1, 3))
    check_cut(strided, SHAPE, schedule, (2, 3)[: len(regions)])


class Outlook(nn.Module):
    """VOLO's outlook attention (Yuan et al. 2021): each place weighs the patch around it, and adds it back."""

    def __init__(self, width: int, heads: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.heads, self.kernel, self.stride = heads, kernel, stride
        self.norm, self.value, self.project = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)
        self.weigh, self.pool = nn.Linear(width, kernel**4 * heads), nn.AvgPool2d(stride, stride, ceil_mode=True)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y = self.norm(x.permute(0, 2, 3, 1))
        window = {"kernel_size": self.kernel, "padding": self.kernel // 2, "stride": self.stride}
        values = F.unfold(self.value(y).permute(0, 3, 1, 2), **window)
        places, inside = values.shape[-1], self.kernel**2
        values = values.reshape(n, self.heads, c // self.heads, inside, places).permute(0, 1, 4, 3, 2)
        weights = self.weigh(self.pool(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        weights = weights.reshape(n, places, self.heads, inside, inside).permute(0, 2, 1, 3, 4).softmax(-1)
        found = (weights @ values).permute(0, 1, 4, 3, 2).reshape(n, c * inside, places)
        return x + self.project(F.fold(found, (h, w), **window).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Overlapping(nn.Module):
    """HAT's overlapping cross-attention (Chen et al. 2023): windows of queries, wider windows of keys and values."""

    def __init__(self, width: int, side: int, wide: int) -> None:
        super().__init__()
        self.side, self.wide = side, wide
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        side, wide = self.side, self.wide
        q, k, v = self.qkv(x.permute(0, 2, 3, 1)).chunk(3, -1)
        q = q.view(n, h // side, side, w // side, side, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, side * side, c)
        kv = F.unfold(torch.cat([k, v], -1).permute(0, 3, 1, 2), wide, stride=side, padding=(wide - side) // 2)
        k, v = kv.view(n, 2, c, wide * wide, -1).permute(1, 0, 4, 3, 2).reshape(2, -1, wide * wide, c)
        y = F.scaled_dot_product_attention(q, k, v).view(n, h // side, w // side, side, side, c)
        return x + self.project(y.permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)).permute(0, 3, 1, 2)


class Tokens(nn.Module):
    """T2T's tokens (Yuan et al. 2021): unfolded, projected, laid out as a map, and again."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(9 * 3, width), nn.Linear(9 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.first(F.unfold(x, 3, stride=2, padding=1).mT)
        x = tokens.mT.reshape(x.shape[0], -1, x.shape[2] // 2, x.shape[3] // 2)
        return self.second(F.unfold(x, 3, stride=2, padding=1).mT)


@pytest.mark.parametrize(("schedule", "regions"), WAYS)
def test_networks(schedule: str, regions: tuple[int, ...]) -> None:
    """Patches as attention uses them."""
    for stride in (1, 2):
        check_cut(between(Outlook(6, 2, 3, stride)), SHAPE, schedule, regions, joined(regions))
    check_cut(between(Overlapping(6, 4, 6)), (1, 3, 20, 12), schedule, regions, joined(regions))
    check_cut(Tokens(6), (2, 3, 20, 12), schedule, regions, joined(regions))


def test_one_image_without_samples() -> None:
    """`F.unfold` and `F.fold` take images of three dimensions, too."""

    class Alone(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.fold(F.unfold(x.sin(), 3, padding=1, stride=2), x.shape[1:], 3, padding=1, stride=2)

    check_cut(Alone(), SHAPE[1:], "slide", (3,))
