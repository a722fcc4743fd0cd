"""`SlicedRNN` for Keras 3: recurrent layers over slices of a sequence, in parallel, then over the slices' states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from ranger_nn.errors import PartitionError
from ranger_nn.layers.slices import check_slices, levels


@keras.saving.register_keras_serializable(package="ranger_nn")
class SlicedRNN(keras.layers.Layer):
    """Recurrent layers over the slices of a sequence (Yu & Liu 2018, Sliced Recurrent Neural Networks, section 3).

    The sequence is cut in slices, the slices in slices. The layer of level 0 runs over all shortest slices at once, as a
    batch; their last states are the sequence of level 1, and so on: T = 32768 with slices (32, 32, 32) takes 96 steps.
    Each level has weights of its own, as in the paper. The result is not that of the plain layer: what a slice passes
    on is its last state.

    Any length is allowed: slices are filled up at the end and masked there, so that filling changes nothing; the last level
    takes what is left, however long. Slices that a mask leaves empty are masked on the next level.

    Args:
        cell: a `GRU`, `LSTM`, `SimpleRNN` or `RNN` layer, or a cell, whose configuration all levels take.
        slices: steps of a slice on each level, the shortest slices first.
        shared: one layer for all levels; its input must be as wide as its state.

    Shapes:
        x (batch, time, features) -> (batch, units): the last state of the last level. The number of steps must be known
        when the layer is called.

    Raises:
        PartitionError (a ValueError): slices that are not positive integers, a layer of another kind, an unknown
            number of steps, `shared` with widths that differ.
    """

    def __init__(self, cell: Any, slices: Sequence[int] = (32, 32, 32), *, shared: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.slices = check_slices(slices)
        self.shared = shared
        first = _recurrent(cell)
        self.levels = [first] + [first if shared else _like(first) for _ in self.slices[1:]]
        self.supports_masking = True

    def build(self, shape: Any) -> None:
        """Build each level on the width of what it gets."""
        if shape[1] is None:
            raise PartitionError(f"SlicedRNN needs a known number of steps; the input has shape {tuple(shape)}")
        units = self.levels[0].compute_output_shape((None, 1, shape[-1]))[-1]
        if self.shared and shape[-1] != units:
            raise PartitionError(
                f"shared=True feeds states to the same layer, so its input must be as wide as its state: the input has "
                f"{shape[-1]} features, the state {units}; leave shared out"
            )
        for k, layer in enumerate(self.levels):
            if not layer.built:
                layer.build((None, None, shape[-1] if k == 0 else units))
        self.built = True

    def call(self, x: Any, mask: Any = None) -> Any:
        """The last state of the last level.

        Args:
            x: (batch, time, features).
            mask: (batch, time) bool, as Keras's masking layers give it.
        """
        for level, layer in zip(levels(x.shape[1], self.slices), self.levels):
            if level.filling:
                mask = ops.ones(ops.shape(x)[:2], "bool") if mask is None else mask
                x = ops.pad(x, ((0, 0), (0, level.filling), (0, 0)))
                mask = ops.pad(mask, ((0, 0), (0, level.filling)))
            folded = ops.reshape(x, (-1, level.length, x.shape[-1]))
            there = None if mask is None else ops.reshape(mask, (-1, level.length))
            y = layer(folded, mask=there)
            x = ops.reshape(y, (-1, level.count, y.shape[-1]))
            mask = None if there is None else ops.reshape(ops.any(there, axis=1), (-1, level.count))
        return x[:, 0]

    def compute_output_shape(self, shape: Any) -> Any:
        """(batch, units)."""
        return (shape[0], self.levels[0].compute_output_shape((None, 1, shape[-1]))[-1])

    def compute_mask(self, inputs: Any, mask: Any = None) -> Any:
        """No steps are left to mask."""
        return None

    def get_config(self) -> dict[str, Any]:
        """Plain data."""
        cell = keras.saving.serialize_keras_object(self.levels[0])
        return {**super().get_config(), "cell": cell, "slices": self.slices, "shared": self.shared}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SlicedRNN:
        """The layer that `get_config` described."""
        cell = keras.saving.deserialize_keras_object(config["cell"])
        return cls(**{**config, "cell": cell, "slices": tuple(config["slices"])})


def _recurrent(given: Any) -> Any:
    """A layer that returns its last output, from a layer or a cell."""
    if isinstance(given, keras.layers.Bidirectional):
        raise PartitionError(
            "SlicedRNN passes on the last state of a slice, so it takes one direction; got Bidirectional"
        )
    if isinstance(given, keras.layers.RNN):
        config = {"return_sequences": False, "return_state": False, "stateful": False}
        if all(given.get_config()[k] == v for k, v in config.items()):
            return given
        return type(given).from_config({**given.get_config(), **config})
    if isinstance(given, keras.layers.Layer) and hasattr(given, "state_size"):
        return keras.layers.RNN(given)
    raise PartitionError(
        f"SlicedRNN takes a GRU, LSTM, SimpleRNN or RNN layer, or a cell; got {type(given).__name__}. Any cell with "
        "state_size goes into keras.layers.RNN"
    )


def _like(layer: Any) -> Any:
    """A new layer of the same configuration."""
    config = layer.get_config()
    config.pop("name", None)
    return type(layer).from_config(config)
