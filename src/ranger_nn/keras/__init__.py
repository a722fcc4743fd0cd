"""Keras 3 adapter (TensorFlow, JAX and PyTorch back ends). Only this room imports keras.

The layers of `keras/layers` have the same names and arguments as those of `ranger_nn.torch`. `declare` gives a layer of
your own, which the capture cannot trace, a rule for regions: `declare(MyBlur, Local(before=1, after=1))`.
"""

from __future__ import annotations

from importlib.util import find_spec

from ranger_nn.lazy import exporter

_LAYERS = {
    "RegionalAggregator": "regional",
    "BlockDense": "blocks",
    "SlicedRNN": "sliced_rnn",
    "linear_scan": "scan",
    "MinGRU": "recurrence",
    "LRU": "recurrence",
    "GatedLinearAttention": "recurrence",
    "ClusteredAttention": "attention",
    "RegionExperts": "experts",
}

_EXACT = {"declare": "lowering_layers", "Local": "lowering_layers"}

__all__ = [*_LAYERS, *_EXACT]
__getattr__, __dir__ = exporter(
    __name__,
    {n: f"ranger_nn.keras.layers.{m}" for n, m in _LAYERS.items()}
    | {n: f"ranger_nn.keras.{m}" for n, m in _EXACT.items()},
)

if (
    find_spec("keras") is not None
):  # `keras.saving.load_model` finds the class of a regional model once it is registered
    from ranger_nn.keras import model as _model  # noqa: F401
