"""Layers: what each does is traced, but for those that draw random numbers and those with a declared rule.

A layer that cannot be traced stays whole. To let it run on regions, say how far it reaches:

    ranger_nn.keras.declare(MyBlur, Local(before=2, after=2))         # a 5 x 5 window, "same" padding
    ranger_nn.keras.declare(MyGate, Local())                          # each place by itself

Enter at `lower_layer` and `declare`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
from keras import KerasTensor, ops

from ranger_nn.core.graph import Rule
from ranger_nn.core.reach import Link, Reach
from ranger_nn.errors import LayerError, RangerError
from ranger_nn.keras import private
from ranger_nn.keras.kernels import Kernel
from ranger_nn.keras.kernels import Local as Function
from ranger_nn.keras.kernels_random import NOISE, Noise, shared_over_space
from ranger_nn.keras.lower import Lower, Ref, bound
from ranger_nn.keras.trace import config_of, reason_of

WHOLE = (keras.layers.RNN, keras.layers.Bidirectional, keras.layers.TimeDistributed)
SPATIAL = (keras.layers.SpatialDropout1D, keras.layers.SpatialDropout2D, keras.layers.SpatialDropout3D)
DECLARED: dict[type, Local] = {}
REGIONAL: list[type] = []
"""Wrappers, in place of which the model in them is lowered (`model.py` adds its own)."""
LIBRARIES = ("keras.", "torch.", "tensorflow.", "flax.", "builtins")
"""Where classes come from whose `__call__` is Keras's."""


@dataclass(frozen=True)
class Local:
    """How far a layer of one input and one output of the same size reaches along space (or time).

    Output index o depends on the input's indices o - before ... o + after; those outside count as `fill`, which is what
    the layer itself pads with. Channels and the batch are read as they come.
    """

    before: int = 0
    after: int = 0
    fill: float = 0.0

    def __post_init__(self) -> None:
        """Refuse a reach that cannot be."""
        if self.before < 0 or self.after < 0:
            raise ValueError(
                f"before and after count indices, so they are not negative; got {self.before}, {self.after}"
            )


def declare(layer_class: type, rule: Local) -> None:
    """Let layers of `layer_class` (not of its subclasses) run on regions by `rule`.

    Args:
        layer_class: a `keras.layers.Layer` whose `call` takes one tensor and gives one of the same spatial size.
        rule: how far it reaches. It is believed: a wrong one gives wrong numbers.
    """
    if not (isinstance(layer_class, type) and issubclass(layer_class, keras.Layer)):
        raise ValueError(f"declare() takes a class of layers, a subclass of keras.layers.Layer; got {layer_class!r}")
    if not isinstance(rule, Local):
        raise ValueError(f"declare() takes a ranger_nn.keras.Local(before=, after=, fill=) as rule; got {rule!r}")
    DECLARED[layer_class] = rule


class Declared(Kernel):
    """A layer called on the rows that it reaches; what its own padding touched is dropped."""

    def __init__(self, function: Any, rule: Local) -> None:
        """`function`: the layer."""
        super().__init__(function)
        self.rule, self.given = rule, rule.fill if rule.before or rule.after else None

    def region(self, dim: int | None, rows: int, start: int = 0) -> Function:
        """The layer on rows and halo, without the halo's results."""
        first, function = self.rule.before, self.function
        if dim is None or not (first or self.rule.after):
            return function
        kept = (*(slice(None),) * dim, slice(first, first + rows))
        return lambda *xs: function(*xs)[kept]


def lower_layer(lower: Lower, layer: Any, args: Any, kwargs: Any, outs: Sequence[Any], training: Any) -> list[Any]:
    """What stands for each flattened output of a call of `layer`."""
    layer = getattr(layer, "untouched", layer) if isinstance(layer, tuple(REGIONAL)) else layer
    refusal = _refusal(layer)
    found, traced = _lowered(lower, layer, args, kwargs, outs, training, refusal)
    if layer.activity_regularizer is None or not traced:
        return found
    try:
        regularised(lower, layer, [v for v in found if isinstance(v, Ref)])
    except Exception as error:
        refusal = f"has an activity regulariser that {reason_of(error)}"
        return _lowered(lower, layer, args, kwargs, outs, training, refusal)[0]
    return found


def _lowered(
    lower: Lower, layer: Any, args: Any, kwargs: Any, outs: Sequence[Any], training: Any, refusal: str | None
) -> tuple[list[Any], bool]:
    """What stands for the outputs; whether Keras's own `__call__`, with what it does around `call`, is left out.
    `refusal`: why the layer must stay whole.
    """
    rule = DECLARED.get(type(layer))
    if rule is not None and refusal is None and layer.activity_regularizer is None:
        return _placed(lower, layer, lambda: _declared(lower, layer, rule, args, kwargs, outs, training)), False
    if training and type(layer) in NOISE and refusal is None:
        return _placed(lower, layer, lambda: _noise(lower, layer, args)), True
    if refusal is None:
        try:
            leaves, _ = lower.layer(layer, args, kwargs, training)
            return [lower.resolve(leaf) for leaf in leaves], True
        except RangerError:
            raise
        except Exception as error:
            refusal = reason_of(error)
    kwargs = called_with(kwargs, training)
    name, reason = type(layer).__name__.lower(), f"its call {refusal}"
    random = any("seed_generator" in v.path for v in layer.variables)
    found = _placed(lower, layer, lambda: lower.whole(name, layer, args, kwargs, outs, reason, random))
    return found, False


class _Regularises(keras.Layer):
    """What Keras adds to the loss for each output of a layer with an activity regulariser."""

    def __init__(self, regulariser: Any) -> None:
        super().__init__(autocast=False)
        self.regulariser = copy.copy(regulariser)
        if keras.backend.backend() == "jax":  # whose arrays cannot be multiplied by a symbolic tensor
            held = vars(self.regulariser) if isinstance(regulariser, keras.Regularizer) else {}
            held.update({k: float(v) for k, v in held.items() if ops.is_tensor(v) and not v.shape})

    def call(self, output: Any) -> Any:
        """The share of one sample."""
        found = self.regulariser(output)
        return ops.divide_no_nan(found, ops.cast(output.shape[0], found.dtype)) if len(output.shape) else found


def regularised(lower: Lower, layer: Any, outputs: Sequence[Ref]) -> None:
    """Note the loss that a layer's activity regulariser adds for each output."""
    for v in outputs:
        like = KerasTensor(lower.shape(v), dtype=lower.values[v].dtype)
        lower.env[id(like)] = (like, int(v))
        leaves, _ = lower.layer(_Regularises(layer.activity_regularizer), (like,), {}, None)
        lower.losses.append((layer, int(lower.resolve(leaves[0]))))


def called_with(kwargs: dict[str, Any], training: Any) -> dict[str, Any]:
    """Arguments of a call of a layer itself, which hands the mode on to layers inside whether or not it takes it."""
    rest = {k: v for k, v in kwargs.items() if k != "training"}
    return rest if training is None else {**rest, "training": training}


def _placed(lower: Lower, layer: Any, made: Callable[[], list[Any]]) -> list[Any]:
    lower.stack.append(layer)
    try:
        return list(made())
    finally:
        lower.stack.pop()


def _refusal(layer: Any) -> str | None:
    """Why a layer is not traced, or None."""
    if isinstance(layer, WHOLE):
        return "is a loop over time"
    if layer.quantization_mode is not None:
        return "is quantised"
    if private.hooked(layer):
        return "has hooks, which may change what it gives"
    if "__call__" in {
        name for cls in type(layer).__mro__ if not cls.__module__.startswith(LIBRARIES) for name in vars(cls)
    }:
        return "is not all: its class has a __call__ of its own"
    return None


def _declared(
    lower: Lower, layer: Any, rule: Local, args: Any, kwargs: Any, outs: Sequence[Any], training: Any
) -> list[int]:
    function, inputs = bound(lower, layer, args, called_with(kwargs, training))
    if len(inputs) != 1 or len(outs) != 1:
        raise LayerError(
            f"{type(layer).__name__} {layer.name!r} is declared with {rule}, which is for one input and one output; it is "
            f"called with {len(inputs)} inputs and gives {len(outs)}. Leave the declaration out: the layer then stays whole. "
            f"Config: {config_of(layer)}"
        )
    shape, specs = lower.shape(inputs[0]), lower.specs(layer.call, args, kwargs, outs)
    out = tuple(specs[0].shape)
    last = lower.channels_last
    space = range(1, max(2, len(shape) - 1)) if last else range(2, len(shape))
    if len(out) != len(shape) or any(out[d] != shape[d] for d in space):
        raise LayerError(
            f"{type(layer).__name__} {layer.name!r} is declared with {rule}, which is for results of the input's size; it "
            f"makes {out} of {shape}. Config: {config_of(layer)}"
        )
    reach = Reach(1, -rule.before, rule.after)
    row = tuple(Link(d, reach) if d in space else Link(d) if d == 0 else None for d in range(len(shape)))
    dtype = str(keras.backend.standardize_dtype(specs[0].dtype))
    return lower.emit(type(layer).__name__.lower(), inputs, [(out, dtype)], Rule((row,)), Declared(function, rule))


def _noise(lower: Lower, layer: Any, args: Any) -> list[Any]:
    x = lower.resolve(args[0])
    if not isinstance(x, Ref) or not getattr(layer, "rate", getattr(layer, "stddev", 0)):
        return [x]
    if lower.values[x].dtype.startswith(("float", "bfloat")):
        x = Ref(lower.cast(x, layer.compute_dtype))
    shape, dtype = lower.shape(x), lower.values[x].dtype
    generator = layer.seed_generator
    like = str(keras.backend.standardize_dtype(generator.state.dtype))
    seed = lower.emit("seed", [], [((2,), like)], Rule(()), Kernel(generator.next), random=True)[0]
    shared = layer.noise_shape if isinstance(layer, keras.layers.Dropout) and layer.noise_shape else ()
    if isinstance(layer, SPATIAL):
        shared = shared_over_space(layer, shape)
    same = [d for d, n in enumerate(shared) if n == 1 and shape[d] > 1]
    row = tuple(Link(d) for d in range(len(shape)))
    return lower.emit("noise", [x, seed], [(shape, dtype)], Rule((row, (None,))), Noise(layer, same))
