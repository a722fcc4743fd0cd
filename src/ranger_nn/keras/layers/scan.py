"""`linear_scan` for Keras 3. `keras.ops.custom_gradient` does not serve all back ends, so each has a small module of its own.

    scan_tensorflow    tf.custom_gradient, loops of `tf.while_loop` (eager, graph and XLA; any number of steps)
    scan_jax           jax.custom_vjp, loops of `lax.fori_loop`
    scan_torch         torch.autograd.Function, loops in place

Each gives `scan(a, b, initial, chunk)` on its own arrays, `pair(re, im)`, `parts(z)`, `polar(size,
angle)` for complex numbers (Keras's own cos and sin give float32 for float64 on JAX).
"""

from __future__ import annotations

import importlib
from typing import Any

import keras
from keras import ops

from ranger_nn.layers.scan import check_scan

HALF = ("float16", "bfloat16")


def backend() -> Any:
    """The module of Keras's back end."""
    return importlib.import_module(f"ranger_nn.keras.layers.scan_{keras.backend.backend()}")


def linear_scan(a: Any, b: Any, initial: Any = None, chunk: int | None = None) -> Any:
    """All states of h_t = a_t * h_{t-1} + b_t (elementwise), by slices of time: the numbers of the step loop up to rounding.

    Its own backward keeps a and h. To be called on arrays, eagerly or in a layer's `call`; not on symbolic `KerasTensor`s.

    Args:
        a, b: (batch, time, ...), one shape and dtype; real or complex. Half precision accumulates in float32. In TensorFlow
            graphs time may be unknown; the steps then go one by one, so make it known where speed matters.
        initial: (batch, ...) state before the first step; None: zero.
        chunk: steps of a slice; None: chosen. It changes speed and rounding, never the meaning.

    Returns:
        (batch, time, ...) in the dtype of b. NaN and infinity spread as in the step loop: to later steps.
        Products of decays are taken over slices: decays so far above 1 that a product overflows give NaN there, even
        where the states themselves are zero.

    Raises:
        InputError (a ValueError): shapes that differ, no step.
        PartitionError (a ValueError): chunk below 1.

    Source: Blelloch 1990, Prefix sums and their applications, section 1.4; Martin & Cundy 2018, Parallelizing linear
    recurrent neural nets over sequence length, section 2.
    """
    a, b = ops.convert_to_tensor(a), ops.convert_to_tensor(b)
    initial = ops.zeros_like(b[:, 0]) if initial is None and len(b.shape) > 1 and b.shape[1] != 0 else initial
    initial = None if initial is None else ops.convert_to_tensor(initial)
    check_scan(a.shape, b.shape, None if initial is None else initial.shape, chunk)
    dtype = keras.backend.standardize_dtype(b.dtype)
    if dtype in HALF:
        a, b, initial = (ops.cast(v, "float32") for v in (a, b, initial))
        return ops.cast(backend().scan(a, b, initial, chunk), dtype)
    return backend().scan(a, b, initial, chunk)
