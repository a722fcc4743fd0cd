"""Normalisation: over channels, groups, instances, batches and space."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.nets.make import feature, net
from tests.nets.structure import SmallUNet


class ChannelsLastNorm(nn.Module):
    """LayerNorm over channels behind permutes, and a linear on channels: a ConvNeXt block."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.up = nn.Linear(channels, 4 * channels)
        self.down = nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(torch.full((channels,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(x).permute(0, 2, 3, 1)
        y = self.down(F.gelu(self.up(self.norm(y)))) * self.gamma
        return x + y.permute(0, 3, 1, 2)


class ChannelNorm(nn.Module):
    """LayerNorm over channels written by hand in channels-first layout."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        spread = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(spread + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class RMSNorm(nn.Module):
    """Root-mean-square norm over channels."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6)
        return x * scale * self.weight.view(1, -1, 1, 1)


class GlobalResponseNorm(nn.Module):
    """ConvNeXt-V2's norm: the L2 norm over space, divided by its mean over channels."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = x.permute(0, 2, 3, 1)
        size = torch.linalg.vector_norm(y, ord=2, dim=(1, 2), keepdim=True)
        y = self.weight * (y * (size / (size.mean(-1, keepdim=True) + 1e-6))) + self.bias + y
        return y.permute(0, 3, 1, 2)


class SpatialLayerNorm(nn.Module):
    """LayerNorm over channels and space together, without affine parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[1:])


class Standardise(nn.Module):
    """Subtract the mean and divide by the deviation over space, by `var` and `mean`."""

    def forward(self, x: Tensor) -> Tensor:
        centre = x.mean((-2, -1), keepdim=True)
        spread = x.var((-2, -1), keepdim=True, unbiased=False)
        return (x - centre) / (spread + 1e-5).sqrt()


NORMS = (
    feature("channels_last_norm", ChannelsLastNorm),
    feature("channel_norm_by_hand", ChannelNorm),
    feature("rms_norm", RMSNorm),
    feature("global_response_norm", GlobalResponseNorm),
    feature("spatial_layer_norm", SpatialLayerNorm),
    feature("layer_norm_affine_space", lambda: nn.LayerNorm((6, 37, 41))),
    feature("batch_norm", lambda: nn.BatchNorm2d(6)),
    feature("batch_norm_train", lambda: nn.BatchNorm2d(6), train=True),
    feature("batch_norm_no_stats", lambda: nn.BatchNorm2d(6, track_running_stats=False)),
    feature("batch_norm_no_affine", lambda: nn.BatchNorm2d(6, affine=False), train=True),
    feature("group_norm", lambda: nn.GroupNorm(3, 6)),
    feature("group_norm_no_affine", lambda: nn.GroupNorm(2, 6, affine=False)),
    feature("instance_norm", lambda: nn.InstanceNorm2d(6, affine=True)),
    feature("instance_norm_tracked", lambda: nn.InstanceNorm2d(6, track_running_stats=True)),
    feature("standardise", Standardise),
    net("unet_batch_norm", SmallUNet),
    net("unet_batch_norm_train", SmallUNet, train=True),
    net("unet_instance_norm", lambda: SmallUNet(nn.InstanceNorm2d)),
    net("unet_group_norm", lambda: SmallUNet(lambda c: nn.GroupNorm(2, c))),
)
