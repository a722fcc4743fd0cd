"""Program structure: skips, shared and tied weights, many inputs and outputs, writes in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.nets.make import feature, net


class SmallUNet(nn.Module):
    """A U-Net of two levels that crops its skips, with a norm of choice."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()

        def double(i: int, o: int) -> nn.Sequential:
            first = (nn.Conv2d(i, o, 3, padding=1), norm(o), nn.ReLU(inplace=True))
            return nn.Sequential(*first, nn.Conv2d(o, o, 3, padding=1), norm(o), nn.LeakyReLU(0.1))

        self.down0, self.down1, self.bottom = double(3, 4), double(4, 8), double(8, 8)
        self.up1 = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.join1, self.join0 = double(16, 4), double(8, 4)
        self.out = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down0(x)
        b = self.down1(F.max_pool2d(a, 2))
        c = self.up1(self.bottom(F.max_pool2d(b, 2)))
        y = self.join1(torch.cat([b[..., : c.shape[2], : c.shape[3]], c], 1))
        y = F.interpolate(y, size=a.shape[2:], mode="bilinear", align_corners=False)
        return self.out(self.join0(torch.cat([a, y], 1)))


class Shared(nn.Module):
    """One convolution and one norm used three times: gradients add up once each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.conv = nn.Conv2d(6, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        for _ in range(3):
            y = y + torch.tanh(self.norm(self.conv(y)))
        return self.head(y)


class TiedWeights(nn.Module):
    """The same Parameter under two names, once as a convolution, once transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.decode = nn.ConvTranspose2d(6, 3, 3, padding=1, bias=False)
        self.decode.weight = self.encode.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(F.relu(self.encode(x)))


class ManyInMany(nn.Module):
    """Two images and a vector in; a nested dict of outputs at several resolutions out."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 6, 3, padding=1)
        self.right = nn.Conv2d(1, 6, 5, padding=2)
        self.condition = nn.Linear(4, 6)
        self.shrink = nn.Conv2d(6, 4, 3, stride=2, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, image: Tensor, depth: Tensor, vector: Tensor) -> dict[str, Any]:
        fine = F.silu(self.left(image) + self.right(depth))
        fine = fine + self.condition(vector)[:, :, None, None]
        coarse = self.shrink(fine)
        scores = self.head(coarse.mean((2, 3)))
        return {"maps": {"fine": fine, "coarse": [coarse, coarse * 2]}, "scores": (scores,)}


class InPlace(nn.Module):
    """Writes in place into values that are read again later."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        z = self.second(F.relu_(y))
        z += y
        z.mul_(0.5).add_(1.0)
        return F.hardswish(z.clamp_(-2.0, 2.0), inplace=True)


class InPlaceView(nn.Module):
    """Writes into a slice of a fresh copy."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).clone()
        y[:, :3] *= 2.0
        y[:, 3:].add_(1.0)
        return torch.tanh(y)


class PartlyNoGrad(nn.Module):
    """A fixed feature extractor under no_grad and a detached branch beside trained layers."""

    def __init__(self) -> None:
        super().__init__()
        self.fixed = nn.Conv2d(3, 6, 3, padding=1)
        self.trained = nn.Conv2d(6, 6, 3, padding=1)
        self.side = nn.Conv2d(3, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = F.relu(self.fixed(x))
        z = self.side(x)
        return self.trained(y) + z * torch.sigmoid(z.detach())


class Untouched(nn.Module):
    """A parameter and an input that the output does not depend on: their gradients are None."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Conv2d(3, 4, 3, padding=1)
        self.unused = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor, ignored: Tensor) -> Tensor:
        return self.used(x)


class Branches(nn.Module):
    """Inception-like branches with different reach, joined by cat; one output is the input."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 2, 1)
        self.b = nn.Conv2d(3, 2, (1, 7), padding=(0, 3))
        self.c = nn.Conv2d(3, 2, 3, padding=4, dilation=4)
        self.d = nn.Conv2d(3, 2, 4, padding="same")
        self.out = nn.Conv2d(11, 3, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pooled = F.max_pool2d(x, 3, stride=1, padding=1)
        y = self.out(torch.cat([self.a(x), self.b(x), self.c(x), self.d(x), pooled], 1))
        return y, x


class Constants(nn.Module):
    """Buffers and fresh tensors with spatial axes: a positional map, a grid, a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.position = nn.Parameter(0.1 * torch.randn(1, 6, 37, 41))
        self.register_buffer("table", torch.randn(1, 1, 37, 1))
        self.out = nn.Conv2d(7, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x) + self.position
        ramp = torch.linspace(-1, 1, x.shape[3], dtype=x.dtype, device=x.device)
        y = torch.cat([y * self.table, ramp.expand(x.shape[0], 1, x.shape[2], -1)], 1)
        inside = torch.arange(x.shape[2], device=x.device)[:, None] > 4
        return self.out(torch.where(inside, y, torch.zeros_like(y)))


STRUCTURE = (
    net("shared", Shared),
    net("shared_train", Shared, train=True),
    net("tied_weights", TiedWeights),
    net("many_in_many_out", ManyInMany, ((2, 3, 37, 41), (2, 1, 37, 41), (2, 4))),
    net("in_place", InPlace),
    net("in_place_view", InPlaceView),
    net("partly_no_grad", PartlyNoGrad),
    net("untouched_parts", Untouched, ((2, 3, 37, 41), (2, 5))),
    net("branches", Branches),
    net("constants", Constants),
    feature("dropout_eval", lambda: nn.Dropout(0.5)),
    net("identity", nn.Identity),
    net("single_pixel_wide", lambda: nn.Conv2d(3, 4, 3, padding=1), ((1, 3, 97, 1),)),
)
