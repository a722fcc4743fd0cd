"""The loops of the running back end. Enter at `loops`."""

from __future__ import annotations

import functools

import keras

from ranger_nn.keras.loops import Loops


@functools.cache
def loops() -> Loops:
    """Those of the running back end."""
    name = keras.backend.backend()
    if name == "jax":
        from ranger_nn.keras.loops_jax import JaxLoops

        return JaxLoops()
    if name == "tensorflow":
        from ranger_nn.keras.loops_tensorflow import TensorFlowLoops

        return TensorFlowLoops()
    if name == "torch":
        from ranger_nn.keras.loops_torch import TorchLoops

        return TorchLoops()
    raise RuntimeError(f"Keras back ends jax, tensorflow and torch run region by region; this is {name!r}")
