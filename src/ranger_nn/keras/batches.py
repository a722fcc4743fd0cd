"""Batches on TensorFlow: Keras traces `fit` and `predict` there for batches of any size, but a plan has a shape.

by_shape      a model's own step functions are traced for each shape of their data, as on JAX
one_by_one    where someone else traces for any size (a model around this one, an export): samples in a loop
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import KerasTensor, ops, tree

from ranger_nn.aggregate.monoid import Moments
from ranger_nn.errors import InputError
from ranger_nn.keras.kernels_reduce import Reduce
from ranger_nn.keras.ready import Found, handed_out


def by_shape(model: Any, name: str, make: Callable[..., None], force: bool) -> None:
    """Make `model`'s step function `name`: one that has a trace for each shape of its data.

    `make(force=True)` is Keras's own way to make it, which sets the attribute.
    """
    if getattr(model, name) is not None and not force:
        return
    make(force=True)
    if keras.backend.backend() != "tensorflow":
        return
    import tensorflow as tf

    general, traced, one_at_a_time = getattr(model, name), {}, threading.Lock()

    def own(data: Any) -> Any:
        key = tuple(_kind(leaf) for leaf in tree.flatten(data))
        with one_at_a_time:
            if key not in traced:
                maker = _Maker(model)
                make.__func__(maker, force=True)  # type: ignore[attr-defined]
                traced[key] = getattr(maker, name)
            return traced[key]

    def function(given: Any) -> Any:
        if name == "predict_function":  # is given data, not an iterator
            return own(given)(given)
        if isinstance(given, tf.distribute.DistributedIterator):
            return general(given)
        outputs, any_data = None, False
        for _, data in zip(range(model.steps_per_execution), given, strict=False):
            outputs, any_data = own(data)([data]), True
        if not any_data:
            raise StopIteration  # as Keras's own function ends an epoch
        return outputs

    setattr(model, name, function)


class _Maker:
    """Stands for a model while a step function is made: Keras sets it here, and threads that predict go on with theirs."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        """All else is the model's."""
        return getattr(self._model, name)


def _kind(leaf: Any) -> Any:
    shape = getattr(leaf, "shape", None)
    return type(leaf) if shape is None else (type(leaf), tuple(shape), str(leaf.dtype))


def one_by_one(model: Any, inputs: Any, masks: Sequence[Any], training: bool) -> Any:
    """A batch whose size is not known: a loop over its samples."""
    for x in tree.flatten(inputs):
        if keras.backend.backend() != "tensorflow" or any(n is None for n in x.shape[1:]):
            raise InputError(
                f"{model.name} runs region by region on inputs of known size, got shape {tuple(x.shape)}: only the "
                "batch may be open, on TensorFlow. Call it on arrays, or export it with an input_signature of the size you need"
            )
    import tensorflow as tf

    like = tree.map_structure(_sample, inputs)
    ready = model.prepared(like, [None if m is None else _sample(m) for m in masks], training)
    captured = ready.captured
    if training:
        _refuse_batch_statistics(model, captured.graph)
    losses = [v for _, v in captured.losses]
    wanted = [*captured.outputs, *captured.masks, *losses]
    values = [captured.graph.values[v] for v in wanted if v is not None]
    given = [m for m in masks if m is not None]

    def each(sample: Any) -> Any:
        x, own = tree.map_structure(lambda t: ops.expand_dims(t, 0), sample)
        own = iter(own)
        found = model.run(ready, x, [None if m is None else next(own) for m in masks])
        return [y[0] for y in (*found.outputs, *found.masks) if y is not None] + found.losses

    signature = [tf.TensorSpec(v.shape[1:], v.dtype) for v in values[: len(values) - len(losses)]]
    signature += [tf.TensorSpec(v.shape, v.dtype) for v in values[len(values) - len(losses) :]]
    made = iter(tf.map_fn(each, (inputs, given), fn_output_signature=signature, parallel_iterations=1))
    found = [None if v is None else next(made) for v in wanted]
    outputs = len(captured.outputs)
    means = [ops.mean(loss, axis=0) for loss in found[2 * outputs :]]  # each sample's share is that of a batch of one
    return handed_out(captured, Found(found[:outputs], found[outputs : 2 * outputs], means))


def _sample(x: Any) -> KerasTensor:
    return KerasTensor((1, *x.shape[1:]), dtype=keras.backend.standardize_dtype(x.dtype))


def _refuse_batch_statistics(model: Any, graph: Any) -> None:
    """Samples that run one after the other have no statistics in common."""
    for node in graph.nodes:
        kernel = node.kernel
        if not isinstance(kernel, Reduce) or 0 not in kernel.axis:
            continue
        if isinstance(kernel.monoid, Moments) or "BatchNormalization" in node.where:
            raise InputError(
                f"{node.where or node.name} takes statistics over the batch in training, and the size of the batch is not "
                f"known while TensorFlow traces {model.name} inside of another model or function: samples would run one "
                f"after the other, each with statistics of its own. Call fit on {model.name} itself, or regionalize the "
                "outer model instead (both know the size of every batch); or make it known: "
                "dataset.batch(n, drop_remainder=True), or run_eagerly=True"
            )
