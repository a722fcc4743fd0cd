"""Networks for the tests of `run`, importable by name from another process; weights fixed."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def fixed(net: nn.Module) -> nn.Module:
    """The same weights in every process."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.2)
    return net.eval()


class Smooth(nn.Module):
    """Local only: one sweep."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.up = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(), nn.Upsample(scale_factor=2))
        fixed(self)

    def forward(self, x: Tensor) -> Tensor:
        """Same size out as in, for even sizes."""
        y = torch.relu(self.a(x))
        return self.b(y + self.up(y))


class Gated(nn.Module):
    """Instance norm and squeeze-and-excitation: several sweeps, with values between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.gate = nn.Conv2d(3, 8, 3, padding=1), nn.InstanceNorm2d(8), nn.Linear(8, 8)
        self.b = nn.Conv2d(8, 3, 3, padding=1)
        fixed(self)

    def forward(self, x: Tensor) -> Tensor:
        """Same size out as in."""
        y = torch.relu(self.norm(self.a(x)))
        return self.b(y * torch.sigmoid(self.gate(y.mean((2, 3))))[:, :, None, None])


class Two(nn.Module):
    """Two pictures and scores."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 2)
        fixed(self)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Same size, half the size, none."""
        y = self.a(x)
        return y, nn.functional.avg_pool2d(y, 2), self.head(y.mean((2, 3)))


class Scores(nn.Module):
    """A classifier: no picture."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Linear(4, 5)
        fixed(self)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 5)."""
        return self.head(torch.relu(self.a(x)).amax((2, 3)))


class Tagger(nn.Module):
    """A recurrence along time between convolutions: (batch, features, steps, 1) in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.lstm, self.b = nn.Conv1d(3, 6, 5, padding=2), nn.LSTM(6, 5), nn.Conv1d(5, 2, 3, padding=1)
        fixed(self)

    def forward(self, x: Tensor) -> Tensor:
        """One label for each step."""
        y = self.lstm(torch.relu(self.a(x[..., 0])).permute(2, 0, 1))[0]
        return self.b(y.permute(1, 2, 0)).unsqueeze(-1)
