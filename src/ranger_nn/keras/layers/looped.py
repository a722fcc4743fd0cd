"""The local network of Keras's `RegionalAggregator` under `memory`: a loop of the back end over groups of regions.

`keras.ops.scan` runs so many regions at once as the memory allows; `keras.remat` computes each step again in backward, so
that activations of one step are alive at a time. Enter at `looped`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
from keras import ops

from ranger_nn.keras.layers.estimate import at_once
from ranger_nn.keras.layers.stacked import has_state

if TYPE_CHECKING:
    from ranger_nn.keras.layers.regional import RegionalAggregator


def looped(layer: RegionalAggregator, taken: Any, ids: list[int], batch: Any, place: str) -> Any:
    """Local network on stacked regions (regions, batch, ...), so many in each step of a loop as `memory` allows.

    Args:
        layer: whose local network it is.
        taken: stacked regions.
        ids: which they are.
        batch: samples of a region; may be a tensor.
        place: for the error if one region does not fit.
    """
    one = tuple(n if isinstance(n, int) else 1 for n in taken.shape[1:])
    network = layer.local if layer.stacked is None else layer.stacked.template.held
    k = at_once(layer.allowed or 0, network, one, len(ids), place, layer.compute_dtype)
    if layer.locals is not None or (layer.stacked is None and has_state(layer.local)):
        k = 1 if layer.locals is not None else k
        run = keras.remat(layer._run)
        parts = [run(taken[j : j + k], ids[j : j + k]) for j in range(0, len(ids), k)]
        return ops.concatenate(parts, 0)
    chunks = len(ids) // k

    def split(a: Any) -> Any:
        return ops.reshape(a, (chunks, k, *[-1 if n is None else n for n in a.shape[1:]]))

    each = [] if layer.stacked is None else [split(layer.stacked.picked(w, ids)) for w in layer.stacked.stacked_weights]
    shared = _weights_of(layer.local)

    def local(*given: Any) -> Any:
        *own, part = given
        return _stateless(layer, own, part) if layer.stacked is None else layer.stacked.apply(own, part)

    def body(before: Any, given: Any) -> Any:
        # weights go in as arguments: TensorFlow's recomputation does not see variables inside a loop.
        # What it carries has the shape of what it gives.
        y = keras.remat(local)(*shared, *given)
        return y, y

    shape = layer._result_shape((None, *taken.shape[2:]))[1:]
    start = ops.zeros((k, batch, *shape), taken.dtype)
    _, y = ops.scan(body, start, (*each, split(taken)))
    return ops.reshape(y, (len(ids), -1, *y.shape[3:]))


def _stateless(layer: RegionalAggregator, weights: list[Any], stacked: Any) -> Any:
    """The shared network with these weights, on stacked regions."""
    if not weights or layer.local is None:
        return layer._run(stacked, list(range(stacked.shape[0])))
    folded = layer.local.stateless_call(weights, [], ops.reshape(stacked, (-1, *stacked.shape[2:])))[0]
    return ops.reshape(folded, (stacked.shape[0], -1, *folded.shape[1:]))


def _weights_of(layer: Any) -> list[Any]:
    own = layer.trainable_variables if isinstance(layer, keras.layers.Layer) else []
    # copies: given a variable itself, TensorFlow's recomputation would count its gradient twice
    return [ops.copy(v) for v in own]
