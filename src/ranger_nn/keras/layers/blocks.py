"""`BlockDense` for Keras 3: a dense layer whose weight matrix is held and applied block by block."""

from __future__ import annotations

from math import sqrt
from typing import Any

import keras
from keras import ops

from ranger_nn.errors import PartitionError
from ranger_nn.partition.blocks import Blocks
from ranger_nn.partition.config import from_config, to_config


@keras.saving.register_keras_serializable(package="ranger_nn")
class BlockDense(keras.layers.Layer):
    """y = activation(x W + b), exactly, with W in the blocks of `Blocks(rows, columns)`.

        y_j = sum over i of  x_i W_ij         row blocks are summed, column blocks stitched

    Blocks are variables of their own (shape (inputs of i, units of j)), initialised as `Dense` would initialise the
    whole matrix (Glorot & Bengio 2010).

    Args:
        units: width of the output.
        blocks: how the matrix is cut; uneven division is allowed.
        activation: as in `keras.layers.Dense`.
        use_bias: add b.

    Shapes:
        x (..., features) -> (..., units).

    Raises:
        PartitionError (a ValueError): more blocks than units or features, an unknown number of features.
        ValueError: an input of another width.
    """

    def __init__(
        self, units: int, blocks: Blocks, activation: Any = None, use_bias: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if not isinstance(blocks, Blocks):
            raise PartitionError(f"BlockDense is cut by Blocks(rows, columns); got {blocks!r}")
        self.units, self.blocks, self.use_bias = units, blocks, use_bias
        self.activation = keras.activations.get(activation)
        self.columns = blocks.matrix(blocks.rows, units)[1]
        self.supports_masking = True

    def build(self, shape: Any) -> None:
        """Make the blocks."""
        if shape[-1] is None:
            raise PartitionError(f"BlockDense needs a known number of features; the input has shape {tuple(shape)}")
        features = int(shape[-1])
        self.rows = self.blocks.matrix(features, self.units)[0]
        self.input_spec = keras.layers.InputSpec(min_ndim=2, axes={-1: features})
        bound = sqrt(6 / (features + self.units))
        self.weight_blocks = [
            [
                self.add_weight(
                    shape=(b - a, d - c),
                    initializer=keras.initializers.RandomUniform(-bound, bound),
                    name=f"kernel_{i}_{j}",
                )
                for j, (c, d) in enumerate(self.columns)
            ]
            for i, (a, b) in enumerate(self.rows)
        ]
        self.bias = self.add_weight(shape=(self.units,), initializer="zeros", name="bias") if self.use_bias else None
        self.built = True

    def call(self, x: Any) -> Any:
        """(..., features) -> (..., units)."""
        y = ops.concatenate([self._column(x, j) for j in range(len(self.columns))], axis=-1)
        return self.activation(y if self.bias is None else y + self.bias)

    def _column(self, x: Any, j: int) -> Any:
        """Sum over the row blocks."""
        total = ops.matmul(x[..., : self.rows[0][1]], self.weight_blocks[0][j])
        for i, (a, b) in list(enumerate(self.rows))[1:]:
            total = total + ops.matmul(x[..., a:b], self.weight_blocks[i][j])
        return total

    def set_dense(self, kernel: Any, bias: Any = None) -> None:
        """Take the values of a whole matrix (features, units), such as `Dense.get_weights()` gives."""
        for i, (a, b) in enumerate(self.rows):
            for j, (c, d) in enumerate(self.columns):
                self.weight_blocks[i][j].assign(kernel[a:b, c:d])
        if bias is not None and self.bias is not None:
            self.bias.assign(bias)

    def compute_output_shape(self, shape: Any) -> Any:
        """The last axis becomes `units`."""
        return (*shape[:-1], self.units)

    def get_config(self) -> dict[str, Any]:
        """Plain data."""
        own = {"units": self.units, "blocks": to_config(self.blocks), "use_bias": self.use_bias}
        return {**super().get_config(), **own, "activation": keras.activations.serialize(self.activation)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> BlockDense:
        """The layer that `get_config` described."""
        return cls(**{**config, "blocks": from_config(config["blocks"], {"Blocks": Blocks})})
