"""One- and three-dimensional networks; `TCN` and `WaveNet` stand in the zoo too."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.nets.make import SERIES, VOLUME, Lambda, net


class Residual1d(nn.Module):
    """A block of a temporal convolutional network: causal, dilated, weight-normalised."""

    def __init__(self, inputs: int, outputs: int, kernel: int, dilation: int) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.weight_norm
        self.crop = (kernel - 1) * dilation
        options: dict[str, Any] = {"padding": self.crop, "dilation": dilation}
        self.first = norm(nn.Conv1d(inputs, outputs, kernel, **options))
        self.second = norm(nn.Conv1d(outputs, outputs, kernel, **options))
        self.match = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.dropout(F.relu(self.first(x)[:, :, : -self.crop].contiguous()))
        y = self.dropout(F.relu(self.second(y)[:, :, : -self.crop].contiguous()))
        return F.relu(y + self.match(x))


class TCN(nn.Module):
    """A temporal convolutional network (Bai et al., 2018) with a per-step linear head."""

    def __init__(self, channels: tuple[int, ...] = (8, 8, 12, 12), kernel: int = 3) -> None:
        super().__init__()
        widths = (2, *channels)
        self.blocks = nn.Sequential(*(Residual1d(widths[i], widths[i + 1], kernel, 2**i) for i in range(len(channels))))
        self.head = nn.Linear(channels[-1], 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x).transpose(1, 2))


class WaveNet(nn.Module):
    """Gated dilated causal convolutions with residual and skip paths (van den Oord, 2016)."""

    def __init__(self, channels: int = 8, skip: int = 12, layers: int = 6, cycles: int = 2) -> None:
        super().__init__()
        self.dilations = [2**i for _ in range(cycles) for i in range(layers)]
        self.stem = nn.Conv1d(1, channels, 1)
        self.gates = nn.ModuleList(nn.Conv1d(channels, 2 * channels, 2, dilation=d) for d in self.dilations)
        self.residuals = nn.ModuleList(nn.Conv1d(channels, channels, 1) for _ in self.dilations)
        self.skips = nn.ModuleList(nn.Conv1d(channels, skip, 1) for _ in self.dilations)
        self.head = nn.Sequential(nn.ReLU(), nn.Conv1d(skip, skip, 1), nn.ReLU())
        self.out = nn.Conv1d(skip, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        total: Tensor | None = None
        for d, gate, residual, skip in zip(self.dilations, self.gates, self.residuals, self.skips, strict=True):
            filtered, opened = gate(F.pad(x, (d, 0))).chunk(2, dim=1)
            y = torch.tanh(filtered) * torch.sigmoid(opened)
            total = skip(y) if total is None else total + skip(y)
            x = x + residual(y)
        return self.out(self.head(total))


class Audio(nn.Module):
    """A strided 1-D encoder and decoder, as in Demucs: GLU, transposed convolution, skips."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Conv1d(2, 8, 8, stride=4)
        self.gate = nn.Conv1d(8, 16, 1)
        self.decode = nn.ConvTranspose1d(8, 2, 8, stride=4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.glu(self.gate(F.relu(self.encode(x))), dim=1)
        return self.decode(y)


class Recurrent(nn.Module):
    """A GRU over steps between local layers: whole, correct and reported."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 6, 5, padding=2)
        self.gru = nn.GRU(6, 5, batch_first=True)
        self.out = nn.Conv1d(5, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.gru(self.conv(x).transpose(1, 2))
        return self.out(y.transpose(1, 2))


LINES_AND_VOLUMES = (
    net("conv1d_norms", lambda: nn.Sequential(
        nn.Conv1d(2, 6, 5, padding=4, dilation=2),
        nn.GroupNorm(2, 6),
        nn.SiLU(),
        nn.MaxPool1d(3, 2, ceil_mode=True),
        nn.ConvTranspose1d(6, 3, 4, stride=2, padding=1),
    ), SERIES, (29,)),
    net("audio", Audio, SERIES, (29,)),
    net("linear_resize", lambda: nn.Sequential(
        nn.Conv1d(2, 6, 3, padding=1),
        Lambda(lambda x: F.interpolate(x, size=173, mode="linear")),
        nn.AvgPool1d(3, 2, 1),
        nn.Conv1d(6, 2, 3, padding=1, padding_mode="reflect"),
    ), SERIES, (29,)),
    net("gru", Recurrent, SERIES, (29,), whole=True),
    net("conv3d_norms", lambda: nn.Sequential(
        nn.Conv3d(2, 4, 3, padding=1),
        nn.InstanceNorm3d(4, affine=True),
        nn.PReLU(),
        nn.MaxPool3d(2, ceil_mode=True),
        nn.ConvTranspose3d(4, 4, 3, stride=2, padding=1),
        nn.Conv3d(4, 2, 3, padding=1, padding_mode="replicate"),
    ), VOLUME, (5, 8, 7)),
    net("trilinear", lambda: nn.Sequential(
        nn.Conv3d(2, 4, (3, 1, 5), stride=(1, 2, 1), padding=(1, 0, 2)),
        Lambda(lambda x: F.interpolate(x, size=(17, 19, 23), mode="trilinear")),
        nn.AvgPool3d(3, 2, 1, count_include_pad=False),
        nn.Conv3d(4, 2, 1),
    ), VOLUME, (5, 8, 7)),
)  # fmt: skip
