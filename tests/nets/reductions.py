"""Reductions over space that feed back: squeeze-and-excitation and its kin."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.nets.make import feature, function


class SqueezeExcite(nn.Module):
    """Gate channels by a small network on their global mean."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.down = nn.Conv2d(channels, 2, 1)
        self.up = nn.Conv2d(2, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(F.silu(self.down(self.pool(x)))))


class LinearSqueezeExcite(nn.Module):
    """The same with a mean over axes, linear layers and a view back."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(channels, 3), nn.ReLU(), nn.Linear(3, channels), nn.Hardsigmoid())

    def forward(self, x: Tensor) -> Tensor:
        n, c, _, _ = x.shape
        return x * self.layers(x.mean((2, 3))).view(n, c, 1, 1).expand_as(x)


class Attend(nn.Module):
    """CBAM-like: channel gate from mean and max over space, spatial gate from mean and max."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.shared = nn.Sequential(nn.Linear(channels, 2), nn.ReLU(), nn.Linear(2, channels))
        self.spatial = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        average = self.shared(F.adaptive_avg_pool2d(x, 1).flatten(1))
        largest = self.shared(F.adaptive_max_pool2d(x, 1).flatten(1))
        x = x * torch.sigmoid(average + largest)[:, :, None, None]
        both = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * torch.sigmoid(self.spatial(both))


class Classifier(nn.Module):
    """Strided convolutions, global pooling by `pool`, and a linear head."""

    def __init__(self, pool: Callable[[Tensor], Tensor], features: int = 8) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, stride=2, padding=1),
            nn.Tanh(),
        )
        self.pool = pool
        self.head = nn.Linear(features, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.body(x)).flatten(1))


class RowsThenColumns(nn.Module):
    """Means over one spatial axis at a time: coordinate attention."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.rows = nn.Conv2d(channels, channels, 1)
        self.columns = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.sigmoid(self.rows(x.mean(3, keepdim=True)))
        columns = torch.sigmoid(self.columns(x.mean(2, keepdim=True)))
        return x * rows * columns


REDUCTIONS = (
    feature("squeeze_excite", SqueezeExcite),
    feature("squeeze_excite_linear", LinearSqueezeExcite),
    feature("channel_and_spatial_attention", Attend),
    feature("rows_then_columns", RowsThenColumns),
    function("mean_per_row", lambda x: x - x.mean(3, keepdim=True)),
    function("min_max_scale", lambda x: (x - x.amin((2, 3), True)) / (x.amax((2, 3), True) + 1)),
    function("softmax_over_space", lambda x: x.flatten(2).softmax(2).view_as(x), whole=True),
    function("cumsum_rows", lambda x: x.cumsum(2), whole=True),
    function("flip_rows", lambda x: x.flip(2), whole=True),
    function("spectrum", lambda x: torch.fft.irfft2(torch.fft.rfft2(x), s=(37, 41)), whole=True),
)
