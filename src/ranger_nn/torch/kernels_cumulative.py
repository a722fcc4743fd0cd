"""Kernels of cumulative sums, products and extrema: with the last row carried, or in blocks whose totals come first.

`cummax` and `cummin` give the gradient to the last of equal elements, as PyTorch does, also across blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from ranger_nn.core.program import Extent
from ranger_nn.core.reach import Box
from ranger_nn.ops.cumulative import block_length
from ranger_nn.torch.kernels import SMALL_TENSORS, Call, Kernel, Local


@dataclass(frozen=True)
class Form:
    """`scan(x, dim)` gives all rows so far; `join(before, here)` what comes of both; `nothing` changes no row.

    `pulls`: copies of what is scanned that backward takes, forward again included: counted with `ranger_nn.measure` on
    PyTorch 2.13.
    """

    scan: Callable[[Tensor, int], Tensor]
    join: Callable[[Tensor, Tensor], Tensor]
    nothing: float
    pulls: int

    def of_nothing(self, dtype: torch.dtype) -> float | int:
        """`nothing` in a dtype."""
        if dtype.is_floating_point or abs(self.nothing) < inf:
            return self.nothing
        return torch.iinfo(dtype).min if self.nothing < 0 else torch.iinfo(dtype).max


def _larger(before: Tensor, here: Tensor) -> Tensor:
    return torch.where((here >= before) | here.isnan(), here, before)


def _smaller(before: Tensor, here: Tensor) -> Tensor:
    return torch.where((here <= before) | here.isnan(), here, before)


FORMS = {
    "cumsum": Form(torch.cumsum, torch.add, 0, 5),
    "cumprod": Form(torch.cumprod, torch.mul, 1, 9),
    "logcumsumexp": Form(torch.logcumsumexp, torch.logaddexp, -inf, 12),
    "cummax": Form(lambda x, dim: torch.cummax(x, dim).values, _larger, -inf, 8),
    "cummin": Form(lambda x, dim: torch.cummin(x, dim).values, _smaller, inf, 8),
}


class Cumulative(Kernel):
    """All rows so far along dimension `along`; what it becomes is for `bounds/scans.py`."""

    def __init__(
        self, form: Form, function: Callable[[Tensor], Tensor], dim: int, size: int, dtype: torch.dtype
    ) -> None:
        """`function`: the untouched call; `size`: rows of the whole; `dtype`: of the result."""
        self.form, self.function, self.along, self.dtype = form, function, dim, dtype
        self.block = block_length(size)
        self.computing = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
        self.wide, self.wide_bytes = str(self.computing)[6:], self.computing.itemsize

    def bind(self, out_box: Box, in_boxes: Sequence[Box]) -> Local:
        """The untouched call."""
        return self.function

    def plain(self) -> Kernel:
        """Where the dimension is never cut."""
        return Call(self.function)

    def carried(self) -> Kernel:
        """With a state."""
        return Carried(self)

    def parts(self) -> tuple[Kernel, Kernel, Kernel]:
        """In blocks."""
        return Totals(self), Before(self), Joined(self)


class Part(Kernel):
    """What the forms share."""

    def __init__(self, whole: Cumulative) -> None:
        """`whole`: the operator that it is a form of."""
        self.form, self.dim, self.block = whole.form, whole.along, whole.block
        self.dtype, self.computing = whole.dtype, whole.computing

    def scan(self, x: Tensor, dim: int) -> Tensor:
        """All rows so far, in the dtype of totals."""
        return self.form.scan(x, dim).to(self.computing)

    def blocks(self, x: Tensor, rows: int) -> Tensor:
        """Rows from the first of a block on, `rows` of them missing behind, as (blocks, rows of a block)."""
        x = x.to(self.computing)
        if rows:
            shape = [rows if d == self.dim else n for d, n in enumerate(x.shape)]
            x = torch.cat([x, x.new_full(shape, self.form.of_nothing(self.computing))], self.dim)
        return x.unflatten(self.dim, (-1, self.block))

    def _copies(self, at: Extent, times: int) -> int:
        """So many copies of the input, a block longer, in the dtype of totals."""
        box = at.reads[0].box
        rows = box[self.dim][1] - box[self.dim][0]
        longer = at.in_bytes[0] * (rows + self.block) // max(1, rows)
        return times * longer * self.computing.itemsize // self.itemsize + SMALL_TENSORS


class Carried(Part):
    """The rows of a region, and the last of them; given the last of the region before, they go on from it."""

    def bind(self, out_box: Box, in_boxes: Sequence[Box]) -> Local:
        """(rows, state)."""

        def local(x: Tensor, *state: Tensor) -> list[Tensor]:
            y = self.scan(x.to(self.computing), self.dim)
            y = self.form.join(state[0], y) if state else y
            return [y.to(self.dtype), y.narrow(self.dim, -1, 1).clone()]

        return local

    def scratch(self, at: Extent) -> int:
        """The rows cast, their scan, and what comes of it."""
        return self._copies(at, 3)


class Totals(Part):
    """The last row of each block's own scan."""

    def bind(self, out_box: Box, in_boxes: Sequence[Box]) -> Local:
        """Of whole blocks; the last of all is filled up."""
        missing = out_box[self.dim][1] * self.block - in_boxes[0][self.dim][1]
        return lambda x: self.scan(self.blocks(x, missing), self.dim + 1).select(self.dim + 1, -1).clone()

    def scratch(self, at: Extent) -> int:
        """The rows filled up, and their scan."""
        return self._copies(at, 3)

    def vjp_scratch(self, at: Extent) -> int:
        """Forward again, and its gradients."""
        return self._copies(at, self.form.pulls)


class Before(Part):
    """The scan of totals, a row later."""

    def bind(self, out_box: Box, in_boxes: Sequence[Box]) -> Local:
        """Nothing comes before the first."""

        def local(x: Tensor) -> Tensor:
            first = torch.full_like(x.narrow(self.dim, 0, 1), self.form.of_nothing(x.dtype))
            return torch.cat([first, self.scan(x, self.dim).narrow(self.dim, 0, x.shape[self.dim] - 1)], self.dim)

        return local

    def scratch(self, at: Extent) -> int:
        """The scan."""
        return 2 * at.in_bytes[0]

    def vjp_scratch(self, at: Extent) -> int:
        """Forward again, and its gradients."""
        return self.form.pulls * at.in_bytes[0] + SMALL_TENSORS


class Joined(Part):
    """Each block's own scan, and what comes before it."""

    def bind(self, out_box: Box, in_boxes: Sequence[Box]) -> Local:
        """From the first row of the block in which the region begins."""
        dim, (start, stop), (low, high) = self.dim, out_box[self.dim], in_boxes[0][self.dim]
        first = start // self.block * self.block
        missing = -(-stop // self.block) * self.block - stop

        def local(x: Tensor, before: Tensor) -> Tensor:
            here = self.scan(self.blocks(x.narrow(dim, first - low, high - first), missing), dim + 1)
            return (
                self.form.join(before.unsqueeze(dim + 1), here)
                .flatten(dim, dim + 1)
                .narrow(dim, start - first, stop - start)
                .to(self.dtype)
            )

        return local

    def scratch(self, at: Extent) -> int:
        """The rows filled up, their scan, and what comes of both."""
        return self._copies(at, 3)

    def vjp_scratch(self, at: Extent) -> int:
        """Forward again, and its gradients."""
        return self._copies(at, self.form.pulls)
