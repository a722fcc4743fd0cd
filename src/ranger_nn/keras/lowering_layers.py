"""Layers: what each does is traced, but for those that draw random numbers and those with a declared rule.

Enter at `lower_layer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import KerasTensor, ops, tree

from ranger_nn.keras.capture import Lower, _reason, with_training
from ranger_nn.keras.lowering import emit_call

WHOLE = (keras.layers.RNN, keras.layers.Bidirectional, keras.layers.TimeDistributed)


def lower_layer(lower: Lower, layer: Any, args: Any, kwargs: Any, outs: Sequence[Any], training: bool) -> list[Any]:
    """What stands for each flattened output of a call of `layer`."""
    training = bool(training if kwargs.get("training") is None else kwargs["training"])
    refusal = _refusal(layer, training)
    if refusal is None:
        try:
            leaves, _ = lower.layer(layer, args, kwargs, training)
            return [lower.resolve(leaf) for leaf in leaves]
        except Exception as error:
            refusal = _reason(error)
    lower.stack.append(layer)
    try:
        kwargs = with_training(layer, kwargs, training)
        return list(lower.whole(type(layer).__name__.lower(), layer, args, kwargs, outs, f"its call {refusal}"))
    finally:
        lower.stack.pop()


def _refusal(layer: Any, training: bool) -> str | None:
    """Why a layer is not traced, or None."""
    if isinstance(layer, WHOLE):
        return "is a loop over time"
    if layer.quantization_mode is not None:
        return "is quantised"
    if training and layer.activity_regularizer is not None:
        return "has an activity regulariser, which sums over all of the output"
    return None
