"""The local network of Keras's `RegionalAggregator` under `memory`: a loop of the back end over groups of regions.

`keras.ops.scan` runs so many regions at once as the memory allows; `keras.remat` computes each step again in backward, so
that activations of one step are alive at a time. Enter at `looped`.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from ranger_nn.keras.layers.aggregated import Aggregated
from ranger_nn.keras.layers.estimate import at_once
from ranger_nn.keras.layers.pure import Recomputed, applied
from ranger_nn.keras.layers.stacked import has_state


def looped(
    layer: Aggregated, taken: Any, ids: list[int], batch: Any, place: str, training: bool, masks: Any = None
) -> Any:
    """Local network on stacked regions (regions, batch, ...), so many in each step of a loop as `memory` allows.

    Args:
        layer: whose local network it is.
        taken: stacked regions.
        ids: which they are.
        batch: samples of a region; may be a tensor.
        place: for the error if one region does not fit.
        training: said again to the local network, which in backward is not called from the layer.
        masks: (regions, batch, time) for the local network.
    """
    one = tuple(n if isinstance(n, int) else 1 for n in taken.shape[1:])
    if layer.locals is not None:
        for i in ids:
            at_once(layer.allowed or 0, layer.locals[i], one, 1, place, layer.compute_dtype)
        return ops.concatenate([_again(layer, taken[k : k + 1], [i], training) for k, i in enumerate(ids)], 0)
    network = layer.local if layer.stacked is None else layer.stacked.template.held
    k = at_once(layer.allowed or 0, network, one, len(ids), place, layer.compute_dtype)
    if masks is not None or (layer.stacked is None and has_state(layer.local)):
        return _one_by_one(layer, taken, ids, k, masks, training)
    chunks = len(ids) // k

    def split(a: Any) -> Any:
        return ops.reshape(a, (chunks, k, *[-1 if n is None else n for n in a.shape[1:]]))

    each = [] if layer.stacked is None else [split(layer.stacked.picked(w, ids)) for w in layer.stacked.stacked_weights]
    shared = _weights_of(layer.local)

    def local(*given: Any) -> Any:
        *own, part = given
        return (
            _stateless(layer, own, part, training)
            if layer.stacked is None
            else layer.stacked.apply(own, part, training)
        )

    def body(before: Any, given: Any) -> Any:
        # weights go in as arguments: TensorFlow's recomputation does not see variables inside a loop.
        # What it carries has the shape of what it gives.
        y = keras.remat(local)(*shared, *given)
        return y, y

    shape = layer._result_shape((None, *taken.shape[2:]))[1:]
    start = ops.zeros((k, batch, *shape), taken.dtype)
    _, y = ops.scan(body, start, (*each, split(taken)))
    return ops.reshape(y, (len(ids), -1, *y.shape[3:]))


def _again(layer: Aggregated, taken: Any, ids: list[int], training: bool) -> Any:
    """A region through its own network of a list."""

    def run(x: Any) -> Any:
        return layer._run(x, ids, training=training)

    return Recomputed(layer.locals[ids[0]])(run, taken)  # type: ignore[index]


def _one_by_one(layer: Aggregated, taken: Any, ids: list[int], k: int, masks: Any, training: bool) -> Any:
    """A network with state, k regions at a time: not in a loop of the back end, whose steps share what they read."""
    call, found = Recomputed(layer.local, len(ids) // k), []
    for j in range(0, len(ids), k):
        some = {} if masks is None else {"mask": ops.reshape(masks[j : j + k], (-1, masks.shape[-1]))}

        def run(x: Any, j: int = j, some: dict[str, Any] = some) -> Any:
            return layer._run(x, ids[j : j + k], training=training, **some)

        found.append(call(run, taken[j : j + k]))
    return ops.concatenate(found, 0)


def _stateless(layer: Aggregated, weights: list[Any], stacked: Any, training: bool) -> Any:
    """The shared network with these weights, on stacked regions."""
    ids = list(range(stacked.shape[0]))
    if not weights or layer.local is None:
        return layer._run(stacked, ids, training=training)
    return applied(
        layer.local, layer.local.trainable_variables, weights, lambda: layer._run(stacked, ids, training=training)
    )[0]


def _weights_of(layer: Any) -> list[Any]:
    own = layer.trainable_variables if isinstance(layer, keras.layers.Layer) else []
    # copies: given a variable itself, TensorFlow's recomputation would count its gradient twice
    return [ops.copy(v) for v in own]
