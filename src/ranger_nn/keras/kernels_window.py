"""Kernels with a window: convolution, transposed convolution, pooling.

the window's rows           [ lo ............ hi )       given with their border already filled
the layer's own padding     on every other dimension, put on before the call, which pads nothing itself
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import keras
import numpy as np
from keras import ops

from ranger_nn.core.reach import Reach
from ranger_nn.keras.kernels import Kernel, Local
from ranger_nn.keras.loops import clipped
from ranger_nn.ops import window

Ints = tuple[int, ...]


BLOCK = 16
"""Channels that oneDNN puts together: fewer are padded to so many."""


@dataclass(frozen=True)
class Side:
    """One windowed dimension: `dim` of input and output, and the integers of its window."""

    dim: int
    size: int
    out: int
    kernel: int
    stride: int
    dilation: int
    before: int
    after: int

    @property
    def span(self) -> int:
        """Indices from the first to the last that a window reads."""
        return self.dilation * (self.kernel - 1) + 1

    def places(self, size: int) -> int:
        """How many windows fit, without a border, on so many indices."""
        return (size - self.span) // self.stride + 1

    @property
    def reach(self) -> Reach:
        """The four integers of a window that slides over the input."""
        return window.window_reach(self.kernel, self.stride, self.dilation, self.before)


def padding(size: int, kernel: int, stride: int, dilation: int, mode: str) -> tuple[int, int]:
    """What Keras puts before and after: nothing, or ("same") half each, the odd one after."""
    if mode != "same":
        return 0, 0
    span = dilation * (kernel - 1) + 1
    total = max((-(-size // stride) - 1) * stride + span - size, 0)
    return total // 2, total - total // 2


def pad(x: Any, widths: dict[int, tuple[int, int]], value: float = 0.0) -> Any:
    """`x` with (before, after) filled along dimensions; negative widths are cut off."""
    rank = len(x.shape)
    if any(w < 0 for pair in widths.values() for w in pair):
        cut = [slice(None)] * rank
        for d, (a, b) in widths.items():
            cut[d] = slice(max(0, -a), x.shape[d] - max(0, -b))
        x = x[tuple(cut)]
    full = [(max(0, widths[d][0]), max(0, widths[d][1])) if d in widths else (0, 0) for d in range(rank)]
    if not any(w for pair in full for w in pair):
        return x
    # without a value TensorFlow and PyTorch take the short way
    return ops.pad(x, full) if value == 0.0 else ops.pad(x, full, constant_values=value)


def inside(rows: Any, size: int, first: Any, count: int) -> Any:
    """Where the nearest of [0, size) to each row stands among `count` rows given from `first` on."""
    return ops.clip(ops.clip(rows, 0, size - 1) - first, 0, count - 1)


def _shares(side: Side) -> np.ndarray:
    """What the average of each window is multiplied with where padding counts as zeros: its indices by those inside."""
    first = np.arange(side.out) * side.stride - side.before
    inside = np.minimum(first + side.kernel, side.size) - np.maximum(first, 0)
    return side.kernel / np.maximum(inside, 1)


def on_torch() -> bool:
    """Whether Keras runs on PyTorch."""
    return bool(keras.backend.backend() == "torch")


class Window(Kernel):
    """A window over `sides`; `valid` is the operator without padding."""

    tame = True

    def __init__(self, function: Any, valid: Any, sides: Sequence[Side], border: float) -> None:
        """`border`: what padding holds."""
        super().__init__(function)
        self.valid, self.sides, self.given = valid, tuple(sides), border

    def _widths(self, dim: int) -> dict[int, tuple[int, int]]:
        return {s.dim: (s.before, s.after) for s in self.sides if s.dim != dim and (s.before or s.after)}

    def region(self, dim: int | None, rows: int, start: int = 0) -> Local:
        """Pad the other dimensions, then the operator without padding."""
        if all(s.dim != dim for s in self.sides):
            return self.function
        widths, valid, border = self._widths(dim or 0), self.valid, self.given or 0.0
        if not widths:
            return valid
        return lambda x, *rest: valid(pad(x, widths, border), *rest)

    def scratch(self, out_bytes: int, in_bytes: Sequence[int]) -> int:
        """The padded input, and as much again where the back end reorders it; PyTorch's maxima come with indices."""
        return 2 * in_bytes[0] + 2 * sum(in_bytes[1:]) + (2 * out_bytes if on_torch() else 0)

    def tape(self, out_bytes: int, in_bytes: Sequence[int]) -> int:
        """On PyTorch the indices of maxima, in 64 bits, and the padded input."""
        return 2 * out_bytes + in_bytes[0] if on_torch() else 0


@dataclass(frozen=True)
class Columns:
    """What PyTorch unfolds a convolution's input to on the CPU: a column for each output place, where oneDNN is not called.

    `share`: bytes of columns to one of output, `most`: bytes of input up to which it unfolds.
    """

    share: float
    most: float

    FEW = 20480
    """PyTorch's own number (`ConvParams::use_mkldnn`): float32 calls of one sample with fewer elements (of a volume, the
    last dimension not counted) are unfolded."""

    @classmethod
    def of(cls, window: int, channels: int, last: int, batch: int, groups: int, dtype: str) -> Columns:
        """`window`: products that are summed to one element; `last`: size of a volume's last dimension, else 1."""
        if groups > 1 or dtype not in ("float32", "float64", "float16"):
            return cls(0.0, 0.0)
        few = 4 * cls.FEW * last if batch == 1 else 0
        return cls(window / channels, few if dtype == "float32" else float("inf"))

    def bytes(self, out_bytes: int, in_bytes: int) -> int:
        """Bytes of columns of one call."""
        return int(self.share * out_bytes) if in_bytes <= self.most and on_torch() else 0


class Convolution(Window):
    """A convolution: the call pads the other dimensions itself."""

    def __init__(self, function: Any, padded: Any, sides: Sequence[Side], columns: Columns) -> None:
        """`padded(x, weights, pads)`: the convolution with (before, after) zeros along each dimension."""
        super().__init__(function, None, sides, 0.0)
        self.padded, self.columns = padded, columns

    def region(self, dim: int | None, rows: int, start: int = 0) -> Local:
        """No padding along the cut dimension."""
        if all(s.dim != dim for s in self.sides):
            return self.function
        pads = [(0, 0) if s.dim == dim else (s.before, s.after) for s in self.sides]
        return lambda x, w: self.padded(x, w, pads)

    def scratch(self, out_bytes: int, in_bytes: Sequence[int]) -> int:
        """What the back end reorders, input and weights, or unfolds; PyTorch makes a new result of columns."""
        return in_bytes[0] + 2 * sum(in_bytes[1:]) + self.backward(out_bytes, in_bytes)

    def backward(self, out_bytes: int, in_bytes: Sequence[int]) -> int:
        """Columns, and input and result in the order that they ask for."""
        columns = self.columns.bytes(out_bytes, in_bytes[0])
        return columns + in_bytes[0] + out_bytes if columns else 0

    def tape(self, out_bytes: int, in_bytes: Sequence[int]) -> int:
        """On PyTorch the input in order, padded where its padding is uneven."""
        return in_bytes[0] if on_torch() else 0


class AveragePool(Window):
    """Average over what is inside: sums over zeros, divided by the number of indices inside."""

    positional = True

    def __init__(self, function: Any, valid: Any, sides: Sequence[Side], repeats: bool) -> None:
        """`repeats`: padding repeats the edge and counts (the PyTorch back end, where it is uneven)."""
        super().__init__(function, valid, sides, 0.0)
        self.repeats = repeats
        self.positional = any(s.before or s.after for s in sides)

    def region(self, dim: int | None, rows: int, start: int = 0) -> Local:
        """The operator without padding, corrected where the window hangs over an edge."""
        side = next((s for s in self.sides if s.dim == dim), None)
        if side is None or not self.positional:
            run = self.function if side is None else self.valid
            return lambda x, position=None: run(x)
        if self.repeats:
            return lambda x, position: self._repeated(x, side, position)
        widths = self._widths(side.dim)
        padded = [(s, _shares(s)) for s in self.sides if s.before or s.after]

        def local(x: Any, position: Any) -> Any:
            y = self.valid(pad(x, widths))
            for s, every in padded:
                shares = ops.convert_to_tensor(every, y.dtype)
                if s is side:
                    shares = ops.take(shares, clipped(position, rows, s.out), axis=0)
                y = y * ops.reshape(shares, [-1 if d == s.dim else 1 for d in range(len(x.shape))])
            return y

        return local

    def _repeated(self, x: Any, side: Side, position: Any) -> Any:
        for s in self.sides:
            n = x.shape[s.dim] if s is side else s.size + s.before + s.after
            first = position * s.stride - s.before if s is side else -s.before
            start = first if s is side else 0
            x = ops.take(x, inside(ops.arange(n, dtype="int32") + first, s.size, start, x.shape[s.dim]), axis=s.dim)
        return self.valid(x)


class Transposed(Kernel):
    """Transposed convolution of the rows given, cropped to the rows asked for; `before` is what the layer cuts off."""

    tame, given = True, 0.0

    def __init__(self, function: Any, valid: Any, sides: Sequence[Side], channels: tuple[int, int], size: int) -> None:
        """`valid`: the operator that cuts nothing off; `channels`: in and out; `size`: bytes of one input channel."""
        super().__init__(function)
        self.valid, self.sides, self.channels, self.size = valid, tuple(sides), channels, size

    @staticmethod
    def reach(side: Side) -> Reach:
        """The four integers of one dimension."""
        return window.transposed_reach(side.kernel, side.stride, side.dilation, side.before)

    def region(self, dim: int | None, rows: int, start: int = 0) -> Local:
        """Nothing cut off by the operator itself; what is asked for is cut out of its result."""
        side = next((s for s in self.sides if s.dim == dim), None)
        if side is None:
            return self.function
        lo, hi = self.reach(side).needs(start, start + rows)
        widths = {}
        for s in self.sides:
            n, first, count = (
                (hi - lo, start - lo * s.stride + s.before, rows) if s is side else (s.size, s.before, s.out)
            )
            natural = (n - 1) * s.stride + max(s.span, s.stride)
            widths[s.dim] = (-first, first + count - natural)
        valid = self.valid
        return lambda x, *rest: pad(valid(x, *rest), widths)

    def scratch(self, out_bytes: int, in_bytes: Sequence[int]) -> int:
        """The result before it is cropped; PyTorch puts it in order, or unfolds: a column for each place of the input."""
        if not on_torch():
            return 2 * out_bytes + in_bytes[0] + 2 * sum(in_bytes[1:])
        columns = in_bytes[0] * self.channels[1] * prod(s.kernel for s in self.sides) // self.channels[0]
        blocks = BLOCK * (in_bytes[0] // self.channels[0] + self._natural(in_bytes[0]) // self.channels[1])
        return self._natural(in_bytes[0]) + 2 * in_bytes[0] + max(columns, blocks) + 2 * sum(in_bytes[1:])

    def _natural(self, in_bytes: int) -> int:
        """Bytes of the result before it is cropped, whichever dimension the input is a part of."""
        most, whole = 0, [(s.size - 1) * s.stride + max(s.span, s.stride) for s in self.sides]
        for i, side in enumerate(self.sides):
            row = self.size * self.channels[0] // side.size
            rows = max(1, -(-in_bytes // row))
            long = (rows - 1) * side.stride + max(side.span, side.stride)
            others = prod(n / s.size for k, (n, s) in enumerate(zip(whole, self.sides, strict=True)) if k != i)
            most = max(most, int(in_bytes * long / rows * others * self.channels[1] / self.channels[0]))
        return most

    def tape(self, out_bytes: int, in_bytes: Sequence[int]) -> int:
        """On PyTorch the input in order, and the result before it is cropped."""
        return in_bytes[0] + self._natural(in_bytes[0]) if on_torch() else 0
