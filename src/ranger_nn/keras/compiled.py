"""A function of arrays, compiled by the running back end when it is first called. Enter at `compiled`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function(t, *nested lists of arrays)`, traced once for each set of shapes, `t` being any integer; on PyTorch itself."""
    name = keras.backend.backend()
    if name == "jax":
        import jax

        traced = jax.jit(function)
        return lambda t, *given: traced(np.int32(t), *given)
    if name == "tensorflow":
        import tensorflow as tf

        from ranger_nn.keras.loops_tensorflow import in_order

        graph = tf.function(lambda *given: in_order(function, *given), autograph=False)
        return lambda t, *given: graph(tf.constant(t, "int32"), *given)
    return function
