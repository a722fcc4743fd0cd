"""A layer as a function of numbers: what it holds goes in, and what it changes comes out.

`keras.remat` runs a function twice. A layer that assigns to its variables while it runs (batch norm, the seeds of dropout)
would assign twice, and draw other numbers the second time (TensorFlow), or fail (JAX, PyTorch). So its variables are
arguments, and assignments are made afterwards, once. Enter at `Recomputed`, or at `applied`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from ranger_nn.errors import PartitionError
from ranger_nn.keras.private import layers_of, seeds_of


def applied(
    layer: Any, variables: Sequence[Any], values: Sequence[Any], run: Callable[[], Any]
) -> tuple[Any, list[Any]]:
    """What `run` gives where these variables of `layer` have these values, and for each its new value, or None.

    Raises:
        PartitionError: the layer adds losses, which have no place in a function.
    """
    with keras.StatelessScope(list(zip(variables, values)), collect_losses=True) as scope:
        before = [scope.get_current_value(v) for v in variables]
        y = run()
        after = [scope.get_current_value(v) for v in variables]
    if scope.losses:
        raise PartitionError(
            f"the local network {layer.name} adds losses while it runs (activity_regularizer, add_loss), which "
            "memory= and per_region=True would lose: add them from its result, or leave both out"
        )
    return y, [None if a is b else a for a, b in zip(after, before)]


class Recomputed:
    """Calls of a layer that are computed again in backward; its variables change once for each.

    Args:
        layer: what runs; None or a function: nothing changes.
        calls: so many calls are one without memory: each begins with the same variables, seeds go on.
    """

    def __init__(self, layer: Any, calls: int = 1) -> None:
        self._layer, self._calls = layer, calls
        self._variables = layer.variables if isinstance(layer, keras.layers.Layer) else []
        # copies: given a variable itself, TensorFlow's recomputation would count its gradient twice
        self._values = [ops.copy(v) for v in self._variables]
        self._seeds = {id(v) for v in seeds_of(layer)} if self._variables else set()

    def __call__(self, run: Callable[[Any], Any], x: Any) -> Any:
        """run(x); the variables have their new values afterwards."""
        moved: list[int] = []

        def pure(x: Any, *values: Any) -> list[Any]:
            y, after = applied(self._layer, self._variables, values, lambda: run(x))
            moved[:] = [i for i, a in enumerate(after) if a is not None]
            return [y, *[after[i] for i in moved]]

        y, *after = keras.remat(pure)(x, *self._values)
        self._check(moved)
        for i, new in zip(moved, after):
            variable, new = self._variables[i], ops.stop_gradient(new)
            variable.assign(new)
            if id(variable) in self._seeds:
                self._values[i] = new
        return y

    def _check(self, moved: Sequence[int]) -> None:
        """Refuse what cannot be repeated or divided.

        Raises:
            PartitionError: weights that the layer writes; in several calls statistics of what a call is given, such as
                batch norm's in training.
        """
        changed = [self._variables[i] for i in moved if id(self._variables[i]) not in self._seeds]
        weights = [v for v in changed if v.trainable and keras.backend.backend() != "jax"]
        if (
            weights
        ):  # on JAX its gradient is that of what was written; elsewhere that of the variable, which is no function
            raise PartitionError(
                f"memory= computes the local network again in backward, and it writes {weights[0].path}, a weight, while it "
                "runs (as SpectralNormalization does): leave memory out"
            )
        norms = keras.layers.SpectralNormalization
        layers = layers_of(self._layer) if changed else []
        alike = {id(v) for sub in layers if isinstance(sub, norms) for v in sub.variables}
        for variable in changed if self._calls > 1 else []:
            if id(variable) not in alike:
                raise PartitionError(
                    f"memory= runs the regions in {self._calls} calls, and the local network changes {variable.path} in "
                    "each: without memory it is made once, from all regions, as batch norm's statistics are. Allow the "
                    "memory of all regions at once, freeze the layer (trainable=False), use GroupNormalization or "
                    "LayerNormalization, or leave memory out"
                )
