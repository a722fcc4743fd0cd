"""What a layer's `call` does, recorded: the calls of inner layers and operations that it makes on symbolic tensors.

Variables are replaced by symbolic tensors while a layer is traced, so that what is computed from weights is recorded as
well. Nothing is written: assignments are given as updates, and a trace that would depend on a Variable's number is
refused. What Keras itself cannot do on symbolic tensors is worked around here. Enter at `trace`.
"""

from __future__ import annotations

import contextlib
import inspect
import random
import traceback
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

import keras
import numpy as np
from keras import KerasTensor, ops, tree

from ranger_nn.keras import private
from ranger_nn.keras.identity import walked
from ranger_nn.keras.kept import Kept, mark
from ranger_nn.keras.private import get_mask


class Parameter(KerasTensor):
    """A Variable while its layer is traced; `assign` is recorded."""

    def bind(self, variable: Any, dtype: str, record: Callable[[Any, Any], None]) -> None:
        """`record(parameter, value)` is called by `assign`."""
        self.variable, self.seen, self._record = variable, dtype, record

    @property
    def value(self) -> Any:
        """The tensor itself."""
        return self

    def assign(self, value: Any) -> None:
        """Record the update."""
        if self.variable.trainable:
            raise Untraceable(f"assigns to {self.variable.path}, which is trained")
        if not isinstance(value, KerasTensor):
            raise Untraceable(f"assigns a number to {self.variable.path}")
        self._record(self, value)

    def assign_add(self, value: Any) -> None:
        """Record the update."""
        self.assign(self + value)

    def assign_sub(self, value: Any) -> None:
        """Record the update."""
        self.assign(self - value)


class Conv(keras.Operation):
    """A convolution in groups: the operation of `keras.ops` refuses these on symbolic tensors."""

    def __init__(
        self, strides: Any, padding: str, data_format: str, dilation_rate: Any, out: Callable[[Any], Any]
    ) -> None:
        """As in `keras.ops.conv`; `out`: shape of the result."""
        super().__init__()
        self.strides, self.padding, self.data_format, self.dilation_rate = strides, padding, data_format, dilation_rate
        self.out = out

    @classmethod
    def of(cls, layer: Any) -> Callable[[Any, Any], Any]:
        """What the layer's own `convolution_op` does."""

        def run(inputs: Any, kernel: Any) -> Any:
            shape = tuple(layer.compute_output_shape(inputs.shape))
            mode = layer.padding
            if mode == "causal":
                before = (layer.dilation_rate[0] * (layer.kernel_size[0] - 1), 0)
                time = 1 if layer.data_format == "channels_last" else 2
                inputs, mode = ops.pad(inputs, [before if d == time else (0, 0) for d in range(3)]), "valid"
            return cls(layer.strides, mode, layer.data_format, layer.dilation_rate, lambda _: shape)(inputs, kernel)

        return run

    def call(self, inputs: Any, kernel: Any) -> Any:
        """The convolution."""
        return ops.conv(inputs, kernel, self.strides, self.padding, self.data_format, self.dilation_rate)

    def compute_output_spec(self, inputs: Any, kernel: Any) -> Any:
        """Shape and dtype."""
        return KerasTensor(self.out(inputs), dtype=inputs.dtype)


class _Functions:
    """`keras.ops` under the names by which preprocessing layers call their back end."""

    def __getattr__(self, name: str) -> Any:
        return getattr(ops, name, self)


ACTIVATIONS: dict[Any, Any] = {
    keras.activations.hard_silu: ops.hard_silu,
    keras.activations.sparsemax: ops.sparsemax,
    keras.activations.mish: lambda x: x * ops.tanh(ops.softplus(x)),
}
"""Activations that Keras itself cannot apply to symbolic tensors, in its operations."""


class Untraceable(Exception):
    """The trace of a layer would not be what the layer does."""


class _Scope(keras.StatelessScope):
    """Nothing is written while tracing, and no Variable's number may enter the trace."""

    def get_current_value(self, variable: Any) -> Any:
        raise Untraceable(f"reads the value of {variable.path}")

    def add_update(self, update: Any) -> None:
        raise Untraceable(f"assigns to {update[0].path}")

    def add_loss(self, loss: Any) -> None:
        raise Untraceable("adds a loss")


_BUILT = (keras.Layer, keras.Variable)
"""What a first call may make for good."""

_TRACKED = {"_trainable_variables", "_non_trainable_variables", "_tracker", "_torch_params", "_metrics", "_parameters"}
"""Where Keras keeps Variables beside the attributes that a layer reads."""


def seen_dtype(variable: Any, layer: Any) -> str:
    """The dtype in which a layer's `call` sees a Variable: cast to the compute dtype of a mixed policy."""
    own = keras.backend.standardize_dtype(variable.dtype)
    if layer is None or not layer.autocast or not private.casts(variable) or not own.startswith(("float", "bfloat")):
        return str(own)
    compute = layer.compute_dtype
    return str(compute if compute is not None and compute.startswith(("float", "bfloat")) else own)


@dataclass(frozen=True)
class Traced:
    """What a call of a layer does: the calls that it makes, in order, each with the mode that Keras hands on to it; what it
    gives; updates (Variable, symbolic value).
    """

    calls: list[tuple[Any, Any]]
    result: Any
    updates: list[tuple[Any, Any]]


def trace(layer: Any, args: Any, kwargs: Any, training: Any, known: Container[int]) -> Traced:
    """What `layer.call` does.

    Args:
        args, kwargs: of the call, with symbolic tensors.
        training: the mode, None where nobody chose one.
        known: ids of the symbolic tensors at which the calls begin.

    Raises Untraceable, or what the layer itself raises, where the trace would not be what the layer does.
    """
    kept = Kept(layer)
    try:
        first, left = _once(layer, args, kwargs, training, known, kept, {})
        _refuse_memory(layer, kept, first, left, lambda: _once(layer, args, kwargs, training, known, kept, left))
        _refuse_derived(layer, first)
    finally:
        kept.restore()
    return first


def _refuse_derived(layer: Any, traced: Traced) -> None:
    """What is computed while tracing is frozen: not from a tensor that may be another at the next call."""
    if hasattr(layer, "operations"):  # a functional model computes nothing of its own
        return
    walk = walked(layer, alone=True)
    held = set(map(id, walk.tensors))
    for node, _ in traced.calls if walk.loose else ():
        for leaf in tree.flatten((node.arguments.args, node.arguments.kwargs)):
            own = isinstance(leaf, (KerasTensor, keras.Variable)) or id(leaf) in held
            if ops.is_tensor(leaf) and not own:
                raise Untraceable("computes from a tensor that is no Variable: keep it in one (add_weight)")


def _refuse_memory(layer: Any, kept: Kept, first: Traced, left: Any, again: Callable[[], Any]) -> None:
    """A call that writes in Python is traced a second time, from what the first one left: notes and caches leave the same
    again and change nothing.
    """
    names = kept.changed()
    names |= {k: mark(v) for k, v in left.items()}
    if not names:
        return
    try:
        second, left_then = again()
    except Exception:
        second, left_then = None, {}
    after = kept.changed()
    after |= {k: mark(v) for k, v in (left | left_then).items()}
    if second is None or after != names or _doing(first) != _doing(second):
        named = ", ".join(dict.fromkeys(n.partition("#")[0] for n in names))
        raise Untraceable(
            f"changes {named} of {type(layer).__name__} or of what it reads: its next call depends on its last; keep it in a "
            "Variable (add_weight(trainable=False)), which call assigns"
        )


def _doing(traced: Traced) -> Any:
    """What two traces alike have in common: their calls with all arguments, symbolic tensors by where they come from."""
    numbers: dict[int, int] = {}

    def leaf(x: Any) -> Any:
        if isinstance(x, Parameter):
            return "weight", id(x.variable), x.seen
        if isinstance(x, KerasTensor):
            return "tensor", numbers.get(id(x), x if private.history(x) is None else "unknown")
        return mark(x)

    found = []
    for node, mode in traced.calls:
        op = node.operation
        held = (
            {} if isinstance(op, keras.Layer) else {k: v for k, v in vars(op).items() if k not in private.BOOKKEEPING}
        )
        kind = id(op) if isinstance(op, keras.Layer) else type(op)
        given = [leaf(x) for x in tree.flatten((node.arguments.args, node.arguments.kwargs))]
        found.append((kind, [(k, mark(v)) for k, v in held.items() if not k.startswith("_")], given, mode))
        for t in node.outputs:
            numbers[id(t)] = len(numbers)
    return found, [leaf(x) for x in tree.flatten(traced.result)], [(id(v), leaf(x)) for v, x in traced.updates]


def _once(
    layer: Any, args: Any, kwargs: Any, training: Any, known: Container[int], kept: Kept, left: dict[str, Any]
) -> tuple[Traced, dict[str, Any]]:
    """One trace of a layer in whose attributes an earlier one left something, and what this one leaves there."""
    updates: list[tuple[Any, Any]] = []

    def before() -> Any:
        return drawn_so_far(), kept.now()

    def after(found: Any) -> None:
        draw_again(found[0])
        kept.restore(found[1])

    context = private.Context(training, before, after)
    drawn = drawn_so_far()
    cast_scope = private.cast_to(layer.compute_dtype) if _mixed(layer) else contextlib.nullcontext()
    with _Scope(), private.calling(context), cast_scope:
        if private.converts_inputs(layer):
            args, kwargs = tree.map_structure(lambda leaf: _converted(layer, leaf), (args, kwargs))
        kwargs = with_training(layer, kwargs, training)
        double = _symbolic(layer, updates)
        vars(double).update(left)
        held = dict(vars(double))
        result = double.call(*args, **kwargs)
    if not _as_drawn(drawn):
        draw_again(drawn)
        raise Untraceable("draws from a generator of Python's or NumPy's, which a graph would do once and for all")
    written = {
        k: v for k, v in vars(double).items() if v is not held.get(k, held) and not isinstance(held.get(k), Parameter)
    }
    written = {k: v for k, v in written.items() if k not in private.BOOKKEEPING and not isinstance(v, _BUILT)}
    return _traced(context, args, kwargs, known, updates, result), written


def _traced(
    context: Any, args: Any, kwargs: Any, known: Container[int], updates: list[tuple[Any, Any]], result: Any
) -> Traced:
    """The calls that made the result, each checked."""
    leaves = tree.flatten(result)
    for leaf in tree.flatten((args, kwargs)):
        if id(leaf) in known and private.history(leaf) is not None:
            raise Untraceable(f"uses {private.history(leaf).operation.name}, which gives what it reads")
    for leaf in leaves:
        if not isinstance(leaf, KerasTensor) and leaf is not None:
            raise Untraceable("gives something that does not depend on its inputs")
    roots = [leaf for leaf in leaves if leaf is not None] + [value for _, value in updates]
    roots += [get_mask(leaf) for leaf in leaves if get_mask(leaf) is not None]
    calls = [
        (n, private.mode_of(context, n) if isinstance(n.operation, keras.Layer) else None)
        for n in _recorded(known, roots)
    ]
    return Traced(calls, result, updates)


def drawn_so_far() -> tuple[Any, Any]:
    """State of the generators that a `call` may draw from without Keras."""
    return random.getstate(), np.random.get_state()


def _as_drawn(before: tuple[Any, Any]) -> bool:
    now = drawn_so_far()
    return bool(now[0] == before[0] and all(np.array_equal(a, b) for a, b in zip(now[1], before[1], strict=True)))


def draw_again(before: tuple[Any, Any]) -> None:
    """Set the generators back."""
    random.setstate(before[0])
    np.random.set_state(before[1])


def _converted(layer: Any, leaf: Any) -> Any:
    """An argument in the dtype in which the layer takes it, with its mask."""
    if not isinstance(leaf, KerasTensor):
        return leaf
    found = layer.dtype_policy.convert_input(leaf, layer.autocast, layer.input_dtype)
    if found is not leaf and get_mask(leaf) is not None:
        private.set_mask(found, get_mask(leaf))
    return found


def _symbolic(layer: Any, updates: list[tuple[Any, Any]]) -> Any:
    """A layer that is `layer`, but for its own Variables, which are symbolic tensors. `layer` is left alone: another thread
    may be calling it.
    """
    made: dict[int, Parameter] = {}

    def stand_in(leaf: Any) -> Any:
        if not isinstance(leaf, keras.Variable) or leaf.dtype == "string":
            return leaf
        if id(leaf) not in made:
            tensor = Parameter(tuple(leaf.shape), dtype=seen_dtype(leaf, layer), name=leaf.name)
            tensor.bind(leaf, seen_dtype(leaf, layer), record)
            made[id(leaf)] = tensor
        return made[id(leaf)]

    def record(parameter: Parameter, value: Any) -> None:
        places = [key for key, attribute in held.items() if attribute is parameter]
        if not places:
            raise Untraceable(f"assigns to {parameter.variable.path}, which it holds in a list")
        if keras.backend.backend() != "jax":  # what is assigned is a number there, and no gradient comes back from it
            value = ops.stop_gradient(value)
        updates.append((parameter.variable, value))
        for key in places:  # from here on the layer reads the new value
            held[key] = ops.cast(value, parameter.seen)

    double = object.__new__(type(layer))
    held = vars(double)
    held.update(vars(layer))
    for key, attribute in list(held.items()):
        if isinstance(attribute, MethodType) and attribute.__self__ is layer:
            held[key] = MethodType(attribute.__func__, double)
        elif key in _TRACKED:
            continue
        elif isinstance(attribute, keras.Variable):
            held[key] = stand_in(attribute)
        elif isinstance(attribute, (list, tuple)) and any(isinstance(a, keras.Variable) for a in attribute):
            held[key] = type(attribute)([stand_in(a) for a in attribute])
        elif isinstance(attribute, dict) and any(isinstance(a, keras.Variable) for a in attribute.values()):
            held[key] = {k: stand_in(a) for k, a in attribute.items()}
    _worked_around(layer, held)
    return double


def _worked_around(layer: Any, held: dict[str, Any]) -> None:
    """Attributes in place of those with which Keras itself fails on symbolic tensors."""
    if "backend" in held:  # preprocessing layers: the back end's functions under the names of keras.ops
        held["backend"] = _Functions()
    for key, attribute in list(held.items()):
        if isinstance(attribute, FunctionType) and attribute in ACTIVATIONS:
            held[key] = ACTIVATIONS[attribute]
    if isinstance(layer, keras.layers.BatchNormalization) and layer.center and not layer.scale:
        # Keras refuses a shift without a scale on symbolic tensors; a scale of one gives the same numbers
        held |= {"scale": True, "gamma": np.ones(layer.beta.shape, "float32")}
    if getattr(layer, "groups", 1) != 1 and isinstance(getattr(type(layer), "convolution_op", None), FunctionType):
        held["convolution_op"] = lambda inputs, kernel: Conv.of(layer)(inputs, kernel)


def with_training(layer: Any, kwargs: Any, training: Any) -> dict[str, Any]:
    """Arguments of `layer.call`, with the mode where there is one and it takes one."""
    rest = {k: v for k, v in kwargs.items() if k != "training"}
    takes = training is not None and "training" in inspect.signature(layer.call).parameters
    return {**rest, "training": training} if takes else rest


def own_mode(layer: Any, training: Any) -> Any:
    """The mode of a layer that no other one is around: as it is called, else the default of its `call`."""
    parameter = inspect.signature(layer.call).parameters.get("training")
    if training is not None or parameter is None or parameter.default is inspect.Parameter.empty:
        return training
    return parameter.default


def _mixed(layer: Any) -> bool:
    return bool(layer.autocast and layer.compute_dtype != layer.variable_dtype and "float" in layer.compute_dtype)


def _recorded(known: Container[int], roots: Sequence[Any]) -> list[Any]:
    """The calls that made `roots`, in order; those before `known` tensors are left out."""
    order: list[Any] = []
    seen: set[int] = set()
    begun: set[int] = set()
    pending = [(root, False) for root in reversed(roots)]
    while pending:
        tensor, done = pending.pop()
        if id(tensor) in known or isinstance(tensor, Parameter):
            continue
        node = private.history(tensor)
        if node is None:
            raise Untraceable("uses a tensor that is neither an input nor a weight")
        if id(node) in seen:
            continue
        if done:
            seen.add(id(node))
            order.append(node)
            continue
        if id(node) in begun:
            raise Untraceable(f"uses {node.operation.name}, which gives what it reads")
        begun.add(id(node))
        pending.append((tensor, True))
        pending += [(t, False) for t in reversed([*node.arguments.keras_tensors, *_masks(node)])]
    return order


def _masks(node: Any) -> list[Any]:
    """Masks of what a layer is called with: it, or a layer inside, may take them."""
    if not isinstance(node.operation, keras.Layer):
        return []
    return [m for m in map(get_mask, node.arguments.keras_tensors) if isinstance(m, KerasTensor)]


def masked(node: Any) -> dict[str, Any]:
    """Masks that Keras hands to a layer beside its inputs."""
    layer, args, kwargs = node.operation, node.arguments.args, node.arguments.kwargs
    if not isinstance(layer, keras.Layer) or not any(get_mask(t) is not None for t in node.arguments.keras_tensors):
        return {}
    parameters = inspect.signature(layer.call).parameters
    given = inspect.signature(layer.call).bind_partial(*args, **{k: v for k, v in kwargs.items() if k in parameters})
    tensors = {k: v for k, v in given.arguments.items() if any(isinstance(t, KerasTensor) for t in tree.flatten(v))}
    single = len(tensors) == 1
    names = {k: "mask" if single else f"{k}_mask" for k in tensors}
    return {
        name: tree.map_structure(get_mask, tensors[k])
        for k, name in names.items()
        if name in parameters and given.arguments.get(name) is None
    }


def config_of(layer: Any) -> str:
    """The layer's config, as far as it has one."""
    try:
        return str(layer.get_config())
    except Exception:  # subclassed models need not have one
        return f"{type(layer).__name__} has none"


def reason_of(error: BaseException) -> str:
    if isinstance(error, Untraceable):
        return str(error)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not _inside(f.filename)]
    line = f" at {frames[-1].filename}:{frames[-1].lineno} ({frames[-1].line})" if frames else ""
    text = str(error).strip().splitlines()
    return f"fails on symbolic tensors{line}: {type(error).__name__}: {text[0] if text else ''}"


def _inside(filename: str) -> bool:
    return any(
        part in filename for part in ("/keras/src/", "/tensorflow/", "/jax/", "/torch/", "/ranger_nn/", "/optree/")
    )
