"""`BlockDense` for PyTorch: a dense layer whose weight matrix is held and applied block by block."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from ranger_nn.errors import InputError, PartitionError
from ranger_nn.names import nearest
from ranger_nn.partition.blocks import Blocks

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
    "softplus": nn.functional.softplus,
    "elu": nn.functional.elu,
}


class BlockDense(LazyModuleMixin, nn.Module):
    """y = activation(x W + b), exactly, with W in the blocks of `Blocks(rows, columns)`.

        y_j = sum over i of  x_i W_ij         row blocks are summed, column blocks stitched

    Blocks are parameters of their own (`weight_0_0`, ...; shape (inputs of i, units of j)), so that one at a time need
    be in memory: with `store` they are memory-mapped files, read when their turn comes (gradients, in training, are
    ordinary tensors).

    Args:
        units: width of the output.
        blocks: how the matrix is cut; uneven division is allowed.
        activation: None, a name ("relu", "tanh", ...) or a callable.
        use_bias: add b.
        features: width of the input; None: taken from the first input.
        store: folder for memory-mapped blocks; it is made if missing, and blocks that are there are used.

    Shapes:
        x (..., features) -> (..., units).

    Raises:
        PartitionError: more blocks than units or features; an unknown activation.
        InputError: an input of another width.
    """

    cls_to_become = None

    def __init__(
        self,
        units: int,
        blocks: Blocks,
        activation: str | Callable[[Tensor], Tensor] | None = None,
        use_bias: bool = True,
        *,
        features: int | None = None,
        store: str | PathLike[str] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(blocks, Blocks):
            raise PartitionError(f"BlockDense is cut by Blocks(rows, columns); got {blocks!r}")
        if isinstance(activation, str) and activation not in _ACTIVATIONS:
            raise PartitionError(
                f"unknown activation {activation!r}{nearest(activation, _ACTIVATIONS)}; known are {', '.join(_ACTIVATIONS)}"
            )
        self.units, self.blocks = units, blocks
        self.activation = _ACTIVATIONS[activation] if isinstance(activation, str) else activation
        self.store = None if store is None else Path(store)
        self.columns = blocks.matrix(blocks.rows, units)[1]
        for i in range(blocks.rows):
            for j in range(blocks.columns):
                setattr(self, f"weight_{i}_{j}", nn.UninitializedParameter())
        self.bias = nn.Parameter(torch.zeros(units)) if use_bias else None
        if features is not None:
            self._materialise(features)

    @classmethod
    def from_dense(cls, dense: nn.Linear, blocks: Blocks, store: str | PathLike[str] | None = None) -> BlockDense:
        """The same layer in blocks, with the values of a linear layer."""
        made = cls(dense.out_features, blocks, use_bias=dense.bias is not None, features=dense.in_features, store=store)
        made.to(dense.weight.dtype)
        with torch.no_grad():
            for i, (a, b) in enumerate(made.rows):
                for j, (c, d) in enumerate(made.columns):
                    made.block(i, j).copy_(dense.weight[c:d, a:b].T)
            if made.bias is not None:
                made.bias.copy_(dense.bias)
        return made

    @property
    def rows(self) -> list[tuple[int, int]]:
        """Intervals of the input's features."""
        return self.blocks.matrix(self.features, self.units)[0]

    @property
    def features(self) -> int:
        """Width of the input."""
        return sum(self.block(i, 0).shape[0] for i in range(self.blocks.rows))

    def block(self, i: int, j: int) -> Tensor:
        """W_ij."""
        return self.get_parameter(f"weight_{i}_{j}")

    def initialize_parameters(self, x: Tensor) -> None:
        """Take the width from the first input."""
        if self.has_uninitialized_params():
            self._materialise(x.shape[-1])

    def _materialise(self, features: int) -> None:
        rows, columns = self.blocks.matrix(features, self.units)
        bound = 1 / sqrt(features)
        for i, (a, b) in enumerate(rows):
            for j, (c, d) in enumerate(columns):
                self.register_parameter(f"weight_{i}_{j}", self._new_block(i, j, (b - a, d - c), bound))
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def _new_block(self, i: int, j: int, shape: tuple[int, int], bound: float) -> nn.Parameter:
        if self.store is None:
            return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
        self.store.mkdir(parents=True, exist_ok=True)
        path = self.store / f"weight_{i}_{j}.bin"
        itemsize, count = torch.get_default_dtype().itemsize, shape[0] * shape[1]
        if path.exists() and path.stat().st_size != count * itemsize:
            raise InputError(
                f"{path} has {path.stat().st_size} bytes, block ({i}, {j}) of shape {shape} has {count * itemsize}; "
                "give another store, or remove the file"
            )
        there = path.exists()
        weight = torch.from_file(str(path), shared=True, size=count, dtype=torch.get_default_dtype()).view(shape)
        return nn.Parameter(weight if there else weight.uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        """(..., features) -> (..., units)."""
        rows = self.rows
        if x.shape[-1] != rows[-1][1]:
            raise InputError(f"BlockDense was made for {rows[-1][1]} features; the input has shape {tuple(x.shape)}")
        stitched = torch.cat([self._column(x, rows, j) for j in range(self.blocks.columns)], -1)
        return stitched if self.activation is None else self.activation(stitched)

    def _column(self, x: Tensor, rows: list[tuple[int, int]], j: int) -> Tensor:
        """Sum over the row blocks."""
        total: Any = None if self.bias is None else self.bias[slice(*self.columns[j])]
        for i, (a, b) in enumerate(rows):
            part = x[..., a:b] @ self.block(i, j)
            total = part if total is None else total + part
        return total

    def extra_repr(self) -> str:
        """Units and blocks."""
        return f"{self.units}, {self.blocks}"
