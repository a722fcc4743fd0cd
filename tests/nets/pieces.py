"""Pieces of any length, one above all: class tokens, wraps, causal pads, first differences, single rows, odd reshapes.

Each is a module on (batch, channels, *space) in one to three dimensions, with `axis` the dimension that it works along;
`PIECES` names them, for the property tests and for the catalogue.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Wrap(nn.Module):
    """The last rows in front and the first ones behind, as panoramas and weather networks pad."""

    def __init__(self, axis: int, before: int, after: int) -> None:
        super().__init__()
        self.axis, self.before, self.after = axis, before, after

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[self.axis]
        parts = [x.narrow(self.axis, n - self.before, self.before)] if self.before else []
        parts += [x] + ([x.narrow(self.axis, 0, self.after)] if self.after else [])
        return torch.cat(parts, self.axis)


class Causal(nn.Module):
    """Padding in front only: zeros, or the first row again (CogVideoX, EnCodec)."""

    def __init__(self, axis: int, rows: int, mode: str) -> None:
        super().__init__()
        self.axis, self.rows, self.mode = axis, rows, mode

    def forward(self, x: Tensor) -> Tensor:
        first = x.narrow(self.axis, 0, 1)
        if self.mode == "zeros":
            shape = list(x.shape)
            shape[self.axis] = self.rows
            return torch.cat([x.new_zeros(shape), x], self.axis)
        if self.mode == "expand":
            shape = [-1] * x.dim()
            shape[self.axis] = self.rows
            return torch.cat([first.expand(shape), x], self.axis)
        return torch.cat([first] * self.rows + [x], self.axis)


class Difference(nn.Module):
    """First difference; the first row is its own, a zero row, or left out; forwards or backwards in time."""

    def __init__(self, axis: int, first: str, back: bool) -> None:
        super().__init__()
        self.axis, self.first, self.back = axis, first, back

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[self.axis]
        ahead, behind = x.narrow(self.axis, 1, n - 1), x.narrow(self.axis, 0, n - 1)
        apart = behind - ahead if self.back else ahead - behind
        if self.first == "none":
            return apart
        row = x.narrow(self.axis, n - 1 if self.back else 0, 1)
        row = row if self.first == "own" else torch.zeros_like(row)
        return torch.cat([apart, row] if self.back else [row, apart], self.axis)


class OneRow(nn.Module):
    """One row of the input, joined at either end, added to all of them, or swapped with the rest."""

    def __init__(self, axis: int, row: int, how: str) -> None:
        super().__init__()
        self.axis, self.row, self.how = axis, row, how

    def forward(self, x: Tensor) -> Tensor:
        row = x.narrow(self.axis, self.row % x.shape[self.axis], 1)
        if self.how == "add":
            return x + torch.tanh(row)
        if self.how == "select":
            return x * torch.sigmoid(x.select(self.axis, self.row % x.shape[self.axis]).unsqueeze(self.axis))
        if self.how == "swap":
            n = x.shape[self.axis]
            return torch.cat([x.narrow(self.axis, n - 1, 1), x.narrow(self.axis, 0, n - 1)], self.axis)
        mean = x.mean(self.axis, keepdim=True)
        return torch.cat([row, x, mean] if self.how == "front" else [x, mean, row, row], self.axis)


class Tokens(nn.Module):
    """Space as tokens with learned ones in front (and behind), a step on each, and back to a map without `drop` of them."""

    def __init__(self, channels: int, front: int, behind: int) -> None:
        super().__init__()
        self.front = nn.Parameter(torch.randn(1, front, channels)) if front else None
        self.behind = nn.Parameter(torch.randn(1, behind, channels)) if behind else None
        self.linear = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        n, c, *space = x.shape
        parts = [] if self.front is None else [self.front.expand(n, -1, -1)]
        parts.append(x.flatten(2).transpose(1, 2))
        parts += [] if self.behind is None else [self.behind.expand(n, -1, -1)]
        y = self.linear(torch.cat(parts, 1))
        y = y + torch.tanh(y)
        start = 0 if self.front is None else self.front.shape[1]
        tokens = y[:, start : start + parts[self.front is not None].shape[1]]
        found = tokens.transpose(1, 2).reshape(n, c, *space)
        return found if self.front is None else found + y[:, 0].reshape(n, c, *[1] * len(space))


class Refold(nn.Module):
    """The axis cut to a multiple of `length` from `offset` on, folded into rows of `length`, worked on, laid out again."""

    def __init__(self, axis: int, offset: int, length: int) -> None:
        super().__init__()
        self.axis, self.offset, self.length = axis, offset, length

    def forward(self, x: Tensor) -> Tensor:
        n = (x.shape[self.axis] - self.offset) // self.length
        part = x.narrow(self.axis, self.offset, n * self.length)
        folded = part.unflatten(self.axis, (n, self.length))
        return torch.sigmoid(folded * folded.mean(self.axis + 1, keepdim=True)).flatten(self.axis, self.axis + 1)


class Stacked(nn.Module):
    """Shifted copies as a new dimension, which is summed, or interleaved with the axis."""

    def __init__(self, axis: int, count: int, interleave: bool) -> None:
        super().__init__()
        self.axis, self.count, self.interleave = axis, count, interleave

    def forward(self, x: Tensor) -> Tensor:
        rows = x.shape[self.axis] - self.count + 1
        parts = [x.narrow(self.axis, k, rows) * (k + 1) for k in range(self.count)]
        stacked = torch.stack(parts, self.axis + 1)
        return stacked.flatten(self.axis, self.axis + 1) if self.interleave else stacked.sum(self.axis + 1)


class Chop(nn.Module):
    """The axis chopped in pieces of many lengths, some of one row, and put together in another order."""

    def __init__(self, axis: int, at: tuple[int, ...], turn: int) -> None:
        super().__init__()
        self.axis, self.at, self.turn = axis, at, turn

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[self.axis]
        ends = sorted({0, n, *(a % n for a in self.at)})
        parts = [x.narrow(self.axis, a, b - a) * (1 + k) for k, (a, b) in enumerate(itertools.pairwise(ends))]
        turn = self.turn % len(parts)
        return torch.cat(parts[turn:] + parts[:turn], self.axis)


class Grow(nn.Module):
    """A single row (the mean) grown to a few by padding, resizing or a transposed convolution, joined to the rest."""

    def __init__(self, axis: int, channels: int, how: str, rows: int) -> None:
        super().__init__()
        self.axis, self.how, self.rows = axis, how, rows
        self.weight = nn.Parameter(torch.randn(channels, channels, rows))

    def forward(self, x: Tensor) -> Tensor:
        row = x.mean(self.axis, keepdim=True)
        last = row.movedim(self.axis, -1)
        flat = last.reshape(-1, x.shape[1], 1) if self.how == "transposed" else last.reshape(1, -1, 1)
        if self.how == "pad":
            grown = F.pad(flat, (self.rows // 2, self.rows - 1 - self.rows // 2))
        elif self.how == "resize":
            grown = F.interpolate(flat, size=self.rows, mode="linear")
        else:
            grown = F.conv_transpose1d(flat, self.weight)
        grown = grown.reshape(*last.shape[:-1], self.rows).movedim(-1, self.axis)
        return torch.cat([grown, x], self.axis)


Number = Callable[[int, int], int]
"""A number from `low` to `high`, both included."""


def piece(kind: str, pick: Number, ndim: int, channels: int, size: list[int]) -> nn.Module:
    """One of `PIECES` with numbers from `pick`, for a value of `channels` and `size`."""
    axis = 2 + pick(0, ndim - 1)
    n = size[axis - 2]
    few = min(n, 4)
    makers: dict[str, Callable[[], nn.Module]] = {
        "wrap": lambda: Wrap(axis, pick(0, few), pick(1, few)),
        "causal": lambda: Causal(axis, pick(1, 4), ("zeros", "expand", "again")[pick(0, 2)]),
        "difference": lambda: Difference(axis, ("own", "zero", "none")[pick(0, 2)], bool(pick(0, 1))),
        "one_row": lambda: OneRow(axis, pick(0, n - 1), ("add", "select", "swap", "front", "behind")[pick(0, 4)]),
        "tokens": lambda: Tokens(channels, pick(0, 3), pick(0, 2)),
        "refold": lambda: Refold(axis, pick(0, few - 1), pick(1, few)),
        "stacked": lambda: Stacked(axis, pick(1, few), bool(pick(0, 1))),
        "chop": lambda: Chop(axis, tuple(pick(0, n - 1) for _ in range(pick(1, 4))), pick(0, 4)),
        "grow": lambda: Grow(axis, channels, ("pad", "resize", "transposed")[pick(0, 2)], pick(1, 5)),
    }
    return makers[kind]()


PIECES: tuple[Any, ...] = ("wrap", "causal", "difference", "one_row", "tokens", "refold", "stacked", "chop", "grow")
