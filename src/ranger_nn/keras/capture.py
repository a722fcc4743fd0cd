"""Model -> graph: every layer is what its `call` does.

    layer.call(symbolic)    ->  the operations and inner layers that it calls                           (`trace.py`)
    inner layer             ->  the same again                                                (`lowering_layers.py`)
    keras.ops operation     ->  a node with a region rule, or an opaque node that reads whole inputs (`lowering.py`)

What is computed from weights is part of the graph; what is assigned to Variables is an update that the caller carries
out once. A layer whose `call` cannot be traced (it leaves `keras.ops`, or branches on values) stays whole, is called as
it is, and is reported. The graph has the shapes of the inputs that are given, batch included. Enter at `capture`.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import keras
from keras import tree

from ranger_nn.bounds.scans import settled
from ranger_nn.core.fuse import fuse
from ranger_nn.core.graph import INPUT, NHWC, Graph
from ranger_nn.errors import InputError, LayerError, RangerError
from ranger_nn.keras import private
from ranger_nn.keras.kept import Kept
from ranger_nn.keras.kernels import Fused
from ranger_nn.keras.lower import Lower, Ref
from ranger_nn.keras.lowering import lower_operation
from ranger_nn.keras.lowering_layers import lower_layer, regularised
from ranger_nn.keras.private import get_mask
from ranger_nn.keras.trace import Untraceable, config_of, draw_again, drawn_so_far, own_mode, reason_of


@dataclass(frozen=True)
class Captured:
    """A graph and where its external values come from.

    `sources[v]`: ("input", position among the flattened inputs, then their masks), ("variable", keras.Variable),
    ("constant", array) or ("tensor", the back end's own, read when the plan runs).
    `outputs`: for each flattened output the value index, or a constant as it is; `pack` puts flattened outputs into the
    model's structure. `updates`: (Variable, value index) to be assigned once after the forward pass. `masks`: the value of
    the mask that Keras attaches to each output, for the loss; None where there is none. `losses`: (layer, value index) that
    the layer's activity regulariser adds.
    """

    graph: Graph
    sources: dict[int, tuple[str, Any]]
    outputs: tuple[Any, ...]
    pack: Callable[[Sequence[Any]], Any]
    updates: tuple[tuple[Any, int], ...] = ()
    masks: tuple[int | None, ...] = ()
    losses: tuple[tuple[Any, int], ...] = ()


def capture(model: keras.Model, inputs: Any, training: Any = None) -> Captured:
    """Graph of `model` for inputs of these shapes.

    Args:
        model: a built functional, Sequential or subclassed model.
        inputs: what the model takes, with a `keras.KerasTensor` (concrete shape, batch included) for each tensor; one
            that has a mask has one attached.
        training: the mode that is captured; None where nobody chose one.

    Raises LayerError where the model's own `call` cannot be traced, InputError where the model refuses such inputs.
    """
    training = own_mode(model, training)
    lower = Lower(bool(training), lower_operation, lower_layer)
    flat = tree.flatten(inputs)
    found = []
    for position, like in enumerate(flat):
        dtype = keras.backend.standardize_dtype(like.dtype)
        found.append(lower.external(like.name, like.shape, dtype, INPUT, ("input", position)))
        lower.env[id(like)] = (like, found[-1])
    masks_given = []
    for position, mask in enumerate(map(get_mask, flat)):
        if mask is not None:
            source = ("input", len(flat) + position)
            masks_given.append(lower.external(f"{flat[position].name}_mask", mask.shape, "bool", INPUT, source))
            lower.env[id(mask)] = (mask, masks_given[-1])
    with _eagerly(), private.readable(model.variables), private.shapes_of_repeat():
        leaves, structure = _lower_model(lower, model, inputs, training)
    if lower.channels_last:
        for v in found:
            lower.values[v] = replace(lower.values[v], layout=NHWC)
    outputs = tuple(None if leaf is None else int(lower.resolve(leaf)) for leaf in leaves)
    updates = tuple(lower.updated.values())
    masks = tuple(None if get_mask(leaf) is None else int(lower.resolve(get_mask(leaf))) for leaf in leaves)
    kept = dict.fromkeys([v for v in (*outputs, *masks) if v is not None] + [v for _, v in (*updates, *lower.losses)])
    graph = Graph(model.name, tuple(lower.values), tuple(lower.nodes), (*found, *masks_given), tuple(kept))
    graph = settled(fuse(_pruned(graph), Fused), carries=False)

    def pack(given: Sequence[Any]) -> Any:
        return tree.pack_sequence_as(structure, list(given))

    return Captured(graph, lower.sources, outputs, pack, updates, masks, tuple(lower.losses))


def _lower_model(lower: Lower, model: Any, inputs: Any, training: Any) -> tuple[list[Any], Any]:
    with _explained(model, inputs):
        if not model.built:
            model(inputs)
    before, drawn, kept = [private.recorded(op) for op in _operations(model)], drawn_so_far(), Kept(model)
    try:
        with private.as_they_were(private.layers_of(model)), _explained(model, inputs):
            return _layer(lower, model, inputs, training)
    finally:
        for each in before:
            private.forget(*each)
        kept.restore()
        draw_again(drawn)


def _layer(lower: Lower, model: Any, inputs: Any, training: Any) -> tuple[list[Any], Any]:
    masks = tree.map_structure(get_mask, inputs)
    given = any(m is not None for m in tree.flatten(masks)) and "mask" in inspect.signature(model.call).parameters
    if private.hooked(model):
        raise Untraceable("has hooks, which may change what it gives")
    leaves, structure = lower.layer(model, (inputs,), {"mask": masks} if given else {}, training)
    if model.activity_regularizer is not None:
        regularised(lower, model, [v for leaf in leaves if isinstance(v := lower.resolve(leaf), Ref)])
    return leaves, structure


@contextlib.contextmanager
def _explained(model: Any, inputs: Any) -> Iterator[None]:
    """Whatever goes wrong inside is the model's or the input's fault, and says so."""
    try:
        yield
    except RangerError:
        raise
    except Exception as error:
        _refuse_input(model, inputs)
        raise LayerError(
            f"{type(model).__name__} {model.name!r} cannot be captured: its call {reason_of(error)}. A region-wise program "
            "needs a graph of Keras operations that does not depend on the data: call keras.ops and keras.layers only, "
            "replace a Python branch on tensor values by keras.ops.where or keras.ops.cond, or put what cannot be "
            f"traced into a layer of its own, which then stays whole. Config: {config_of(model)}"
        ) from error


def _operations(model: Any) -> list[Any]:
    """Every layer inside, and every operation of the functional models among them."""
    found = {id(layer): layer for layer in private.layers_of(model)}
    for layer in list(found.values()):
        found.update({id(op): op for op in getattr(layer, "operations", [])})
    return list(found.values())


def _refuse_input(model: Any, inputs: Any) -> None:
    """Keras's own refusal of inputs that the model cannot take, with the config of the layer that it names."""
    try:
        model.compute_output_spec(inputs)
    except ValueError as error:
        text = str(error).strip()
        named = [layer for layer in private.layers_of(model) if f'"{layer.name}"' in text or f"'{layer.name}'" in text]
        layer = named[-1] if named else model
        shapes = ", ".join(str(tuple(x.shape)) for x in tree.flatten(inputs))
        raise InputError(
            f"{model.name} refuses inputs of shape {shapes}: {text.rstrip('.')}. Config of {layer.name}: {config_of(layer)}"
        ) from error
    except Exception:  # not the input's fault: the caller says what is
        return


@contextlib.contextmanager
def _eagerly() -> Iterator[None]:
    """What is computed from constants while tracing is computed at once, also where the caller is being traced."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        with tf.init_scope():
            yield
    elif backend == "jax":
        import jax

        with jax.ensure_compile_time_eval():
            yield
    else:
        with private.torch_device():
            yield


def _pruned(graph: Graph) -> Graph:
    """Without the nodes that no output needs."""
    needed = set(graph.outputs)
    kept = []
    for node in reversed(graph.nodes):
        if needed & set(node.outputs):
            kept.append(node)
            needed.update(node.inputs)
    return replace(graph, nodes=tuple(reversed(kept)))
