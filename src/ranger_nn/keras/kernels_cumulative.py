"""Kernels of cumulative sums and products: totals of blocks, what comes before each, both joined (`ops/cumulative.py`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from keras import ops

from ranger_nn.keras.kernels import Kernel, Local
from ranger_nn.keras.kernels_movement import cut
from ranger_nn.ops.cumulative import block_length

Scan = Callable[..., Any]


class Cumulative(Kernel):
    """All rows so far along dimension `along`; what it becomes is for `bounds/scans.py`."""

    def __init__(self, function: Any, product: bool, dim: int, shape: Sequence[int], dtype: str, wide: str, item: int):
        """`shape`: of the whole; `dtype`: of the result; `wide`, `item`: dtype of totals, and bytes of an element."""
        super().__init__(function)
        self.scan: Scan = ops.cumprod if product else ops.cumsum
        self.total: Scan = ops.prod if product else ops.sum
        self.join: Scan = ops.multiply if product else ops.add
        self.nothing = 1.0 if product else 0.0
        self.along, self.shape, self.dtype, self.wide, self.wide_bytes = dim, tuple(shape), dtype, wide, item
        self.block = block_length(self.shape[dim])

    def plain(self) -> Kernel:
        """Where the dimension is never cut."""
        return Kernel(self.function, tame=True)

    def carried(self) -> Kernel:
        """Not here: no state goes from step to step."""
        raise NotImplementedError

    def parts(self) -> tuple[Kernel, Kernel, Kernel]:
        """In blocks."""
        return Totals(self), Before(self), Joined(self)


class Part(Kernel):
    """What the forms share."""

    tame = True

    def __init__(self, of: Cumulative) -> None:
        """`of`: the operator that it is a form of."""
        super().__init__(of.function)
        self.of, self.dim, self.block = of, of.along, of.block

    def blocks(self, x: Any, before: int, behind: int) -> Any:
        """Rows, so many of them missing in front and behind, as (blocks, rows of a block)."""
        x = ops.cast(x, self.of.wide)
        if before or behind:
            widths = [(before, behind) if d == self.dim else (0, 0) for d in range(len(x.shape))]
            x = ops.pad(x, widths, constant_values=self.of.nothing)
        shape = [-1, *x.shape[1 : self.dim], x.shape[self.dim] // self.block, self.block, *x.shape[self.dim + 1 :]]
        return ops.reshape(x, shape)

    def scratch(self, out_bytes: int, in_bytes: Sequence[int]) -> int:
        """The rows filled up, their scan, and what comes of both."""
        return 3 * in_bytes[0]

    def tape(self, out_bytes: int, in_bytes: Sequence[int]) -> int:
        """The same, for backward."""
        return 3 * in_bytes[0]


class Totals(Part):
    """All of each block."""

    def __init__(self, of: Cumulative) -> None:
        """Rows behind the last change nothing."""
        super().__init__(of)
        self.given = of.nothing

    def whole(self, *inputs: Any) -> Any:
        """The last block is filled up."""
        return self._totals(inputs[0], -self.of.shape[self.dim] % self.block)

    def region(self, dim: int | None, rows: int, start: int = 0) -> Local:
        """Of whole blocks, filled up already."""
        return lambda x: self._totals(x, 0 if dim == self.dim else -self.of.shape[self.dim] % self.block)

    def _totals(self, x: Any, behind: int) -> Any:
        return self.of.total(self.blocks(x, 0, behind), axis=self.dim + 1)


class Before(Part):
    """The scan of totals, a block later."""

    def whole(self, *inputs: Any) -> Any:
        """Nothing comes before the first."""
        (x,) = inputs
        first = ops.zeros_like(cut(x, self.dim, 0, 1)) + ops.cast(self.of.nothing, x.dtype)
        return ops.concatenate(
            [first, cut(self.of.scan(x, axis=self.dim), self.dim, 0, x.shape[self.dim] - 1)], self.dim
        )

    def region(self, dim: int | None, rows: int, start: int = 0) -> Local:
        """Whole along its own dimension."""
        return self.whole


class Joined(Part):
    """Each block's own scan, and what comes before it."""

    def whole(self, *inputs: Any) -> Any:
        """From the first row on."""
        x, before = inputs
        return self._joined(x, before, 0, self.of.shape[self.dim])

    def region(self, dim: int | None, rows: int, start: int = 0) -> Local:
        """The rows given begin a block less one before the first that is asked for."""
        if dim != self.dim:
            return self.whole
        skip, more = start % self.block, self.block - 1
        return lambda x, before: self._joined(cut(x, dim, more - skip, skip + rows), before, skip, rows)

    def _joined(self, x: Any, before: Any, skip: int, rows: int) -> Any:
        """`x`: rows from the first of a block on, of which `skip` are not asked for."""
        here = self.of.scan(self.blocks(x, 0, -(skip + rows) % self.block), axis=self.dim + 1)
        found = self.of.join(ops.expand_dims(before, self.dim + 1), here)
        shape = [-1, *found.shape[1 : self.dim], found.shape[self.dim] * self.block, *found.shape[self.dim + 2 :]]
        return ops.cast(cut(ops.reshape(found, shape), self.dim, skip, rows), self.of.dtype)
