"""Axes and shapes: tokens, windows, patches, crops, rolls, shuffles, attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.nets.make import between, feature, function, net


class Tokens(nn.Module):
    """Flatten space to tokens, norm and linear on each, and back: no mixing between tokens."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.linear = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y = x.flatten(2).transpose(1, 2)
        y = y + F.gelu(self.linear(self.norm(y)))
        return y.transpose(1, 2).reshape(n, c, h, w)


class TokenAttention(nn.Module):
    """Self-attention over all positions: mixes globally."""

    def __init__(self, channels: int = 6, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = (
            part.view(n, h * w, self.heads, c // self.heads).transpose(1, 2)
            for part in self.qkv(tokens).chunk(3, dim=-1)
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, h * w, c)
        return x + self.out(y).transpose(1, 2).reshape(n, c, h, w)


class PlainAttention(nn.Module):
    """The same mixing written as matmul and softmax, with keys at a quarter of the size."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.query = nn.Conv2d(channels, channels, 1)
        self.key = nn.Conv2d(channels, channels, 4, stride=4)
        self.value = nn.Conv2d(channels, channels, 4, stride=4)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        q, k, v = (f(x).flatten(2) for f in (self.query, self.key, self.value))
        weights = torch.softmax(q.transpose(1, 2) @ k / c**0.5, dim=-1)
        return x + (weights @ v.transpose(1, 2)).transpose(1, 2).reshape(n, c, h, w)


class Windows(nn.Module):
    """Attention inside shifted 4 x 4 windows: pad, roll, split views, attend, undo."""

    def __init__(self, channels: int = 6, size: int = 4, shift: int = 2) -> None:
        super().__init__()
        self.size, self.shift = size, shift
        self.qkv = nn.Linear(channels, 3 * channels)

    def forward(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        s = self.size
        y = F.pad(x, (0, -width % s, 0, -height % s))
        y = torch.roll(y, (-self.shift, -self.shift), (2, 3))
        h, w = y.shape[2] // s, y.shape[3] // s
        y = y.view(n, c, h, s, w, s).permute(0, 2, 4, 3, 5, 1).reshape(n * h * w, s * s, c)
        q, k, v = self.qkv(y).chunk(3, dim=-1)
        y = F.scaled_dot_product_attention(q, k, v)
        y = y.view(n, h, w, s, s, c).permute(0, 5, 1, 3, 2, 4).reshape(n, c, h * s, w * s)
        y = torch.roll(y, (self.shift, self.shift), (2, 3))
        return x + y[:, :, :height, :width]


class Patches(nn.Module):
    """Patch embedding by unfold, and the image back by a view and pixel shuffle."""

    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.size = size
        self.embed = nn.Linear(3 * size * size, 2 * size * size)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        patches = F.unfold(x, self.size, stride=self.size).transpose(1, 2)
        y = self.embed(patches).transpose(1, 2)
        return F.pixel_shuffle(y.reshape(n, -1, h // self.size, w // self.size), self.size)


class CropAndSlice(nn.Module):
    """Crops by slices and narrow, a strided slice, and a flip of nothing spatial."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3)
        self.second = nn.Conv2d(6, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        skip = y[:, :, 2:-2, 3:-1].narrow(3, 0, y.shape[3] - 4)
        y = self.second(y)[:, :, 1:-1, 1:-1]
        return skip[:, 2:] + y + y[:, :, ::1]


class StridedSlices(nn.Module):
    """Space to depth by four strided slices, as YOLO's focus layer does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(12, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        parts = (x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2])
        return self.conv(torch.cat(parts, 1))


class Transposed(nn.Module):
    """Rows and columns change places in the middle of the network."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, (3, 5), padding=(1, 2))
        self.second = nn.Conv2d(6, 4, (5, 1), padding=(2, 0))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).transpose(2, 3))


MOVEMENT = (
    function("pixel_shuffle", lambda x: F.pixel_shuffle(torch.cat([x, x], 1), 2)),
    net("pixel_unshuffle", lambda: between(lambda x: F.pixel_unshuffle(x, 2)), ((2, 3, 38, 42),)),
    function("roll", lambda x: torch.roll(x, (5, -7), (2, 3))),
    function("roll_far", lambda x: x + torch.roll(x, (36, 40), (2, 3))),
    function("pad_constant", lambda x: F.pad(x, (3, 1, 2, 5), value=0.7)),
    function("pad_negative", lambda x: F.pad(x, (-3, 1, 2, -5))),
    function("pad_reflect", lambda x: F.pad(x, (3, 5, 4, 1), mode="reflect")),
    function("pad_replicate", lambda x: F.pad(x, (3, 5, 4, 1), mode="replicate")),
    function("pad_circular", lambda x: F.pad(x, (3, 5, 4, 1), mode="circular")),
    function("repeat_interleave", lambda x: x.repeat_interleave(2, dim=2)),
    function("repeat_tiles", lambda x: x.repeat(1, 1, 2, 1)),
    function("unbind_stack", lambda x: torch.stack(x.unbind(1)[::-1], 1)),
    function("split_swap", lambda x: torch.cat([x.split(2, 1)[i] for i in (2, 0, 1)], 1)),
    function("cat_rows", lambda x: torch.cat([x, 2 * x[:, :, :9]], 2)),
    function(
        "channel_shuffle",
        lambda x: x.view(x.shape[0], 2, 3, *x.shape[2:]).transpose(1, 2).reshape(x.shape),
    ),
    feature("tokens", Tokens),
    feature("token_attention", TokenAttention, whole=True),
    feature("plain_attention", PlainAttention, whole=True),
    feature("window_attention", Windows, whole=True),
    net("patches", Patches, ((2, 3, 36, 44),)),
    net("crop_and_slice", CropAndSlice),
    net("strided_slices", StridedSlices, ((2, 3, 38, 42),)),
    net("transposed_axes", Transposed),
)
