"""Model -> graph: every layer is what its `call` does.

    layer.call(KerasTensors)  ->  the Keras operations that it calls, inner layers among them
    inner layer               ->  the same again
    keras.ops operation       ->  a node with a region rule (`lowering.py`), or an opaque node that reads whole inputs

While a layer's `call` is traced, its Variables are replaced by symbolic tensors, so that what is computed from weights
is part of the graph, and what is assigned to them is an update that the caller carries out once. A layer whose `call`
cannot be traced (it leaves `keras.ops`, or branches on values) stays whole, is called as it is, and is reported. The graph
has the shapes of the inputs that are given, batch included. Enter at `capture`.
"""

from __future__ import annotations

import contextlib
import inspect
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import FunctionType
from typing import Any

import keras
import numpy as np
from keras import KerasTensor, ops, tree

from ranger_nn.core.fuse import fuse
from ranger_nn.core.graph import COMPUTED, CONSTANT, INPUT, NHWC, PARAMETER, Graph, Node, Rule, Value
from ranger_nn.errors import InputError, LayerError, RangerError
from ranger_nn.keras.kernels import Fused, Kernel, Opaque
from ranger_nn.ops.pointwise import opaque

ITEMSIZE = {"bool": 1, "int8": 1, "uint8": 1, "float16": 2, "bfloat16": 2, "int16": 2, "uint16": 2, "float64": 8}
ITEMSIZE |= {"int64": 8, "uint64": 8, "complex64": 8, "complex128": 16}


@dataclass(frozen=True)
class Captured:
    """A graph and where its external values come from.

    `sources[v]`: ("input", position among the flattened inputs), ("variable", keras.Variable) or ("constant", array).
    `outputs`: for each flattened output the value index, or a constant as it is; `pack` puts flattened outputs into the
    model's structure. `updates`: (Variable, value index) to be assigned once after the forward pass.
    """

    graph: Graph
    sources: dict[int, tuple[str, Any]]
    outputs: tuple[Any, ...]
    pack: Callable[[Sequence[Any]], Any]
    updates: tuple[tuple[Any, int], ...] = ()


class Ref(int):
    """A value index among an operator's arguments."""


class _Parameter(KerasTensor):
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
            raise _Untraceable(f"assigns to {self.variable.path}, which is trained")
        if not isinstance(value, KerasTensor):
            raise _Untraceable(f"assigns a number to {self.variable.path}")
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
                inputs, mode = ops.pad(inputs, layer._compute_causal_padding()), "valid"
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


class _Untraceable(Exception):
    """The trace of a layer would not be what the layer does."""


class _Scope(keras.StatelessScope):
    """Nothing is written while tracing, and no Variable's number may enter the trace."""

    def get_current_value(self, variable: Any) -> Any:
        raise _Untraceable(f"reads the value of {variable.path}")

    def add_update(self, update: Any) -> None:
        raise _Untraceable(f"assigns to {update[0].path}")

    def add_loss(self, loss: Any) -> None:
        raise _Untraceable("adds a loss")


@dataclass
class Lower:
    """State of one capture: values and nodes made so far, and what each KerasTensor stands for."""

    training: bool
    values: list[Value] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    sources: dict[int, tuple[str, Any]] = field(default_factory=dict)
    env: dict[int, tuple[Any, Any]] = field(default_factory=dict)
    parameters: dict[tuple[int, str], int] = field(default_factory=dict)
    current: dict[int, int] = field(default_factory=dict)
    updated: dict[int, tuple[Any, int]] = field(default_factory=dict)
    stack: list[Any] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    channels_last: bool = field(default_factory=lambda: keras.config.image_data_format() == "channels_last")

    # --------------------------------------------------------------------------------- values

    def value(self, name: str, shape: Sequence[int], dtype: str, kind: str) -> int:
        """A new value."""
        index = len(self.values)
        flows = dtype.startswith(("float", "bfloat", "complex"))
        item = ITEMSIZE.get(dtype, 4)
        self.values.append(
            Value(index, name, tuple(int(n) for n in shape), dtype, item, kind, flows and kind != CONSTANT)
        )
        return index

    def external(self, name: str, shape: Sequence[int], dtype: str, kind: str, source: tuple[str, Any]) -> int:
        """A value that the caller, a Variable or the capture provides."""
        index = self.value(name, shape, dtype, kind)
        self.sources[index] = source
        return index

    def shape(self, v: int) -> tuple[int, ...]:
        """Shape of a value."""
        return self.values[v].shape

    def constant(self, array: Any) -> int:
        """A value for an array that the model holds."""
        array = np.asarray(ops.convert_to_numpy(array)) if not isinstance(array, np.ndarray) else array
        return self.external("constant", array.shape, _dtype_name(array), CONSTANT, ("constant", array))

    def variable(self, variable: Any, dtype: str | None = None) -> int:
        """The value of a Variable, in the dtype in which the layer sees it."""
        dtype = dtype or _seen_dtype(variable, self.stack[-1] if self.stack else None)
        if id(variable) in self.current:
            return self.cast(self.current[id(variable)], dtype)
        key = (id(variable), dtype)
        if key not in self.parameters:
            source = ("variable", variable)
            self.parameters[key] = self.external(variable.path, variable.shape, dtype, PARAMETER, source)
        return self.parameters[key]

    def cast(self, v: int, dtype: str) -> int:
        """The value in another dtype."""
        if self.values[v].dtype == dtype:
            return v
        from ranger_nn.ops.pointwise import pointwise

        shape = self.shape(v)
        kernel = Kernel(lambda x: ops.cast(x, dtype))
        return self.emit("cast", [v], [(shape, dtype)], pointwise([shape], shape), kernel)[0]

    def resolve(self, leaf: Any) -> Any:
        """Value index of a symbolic tensor, Variable or array; anything else as it is."""
        if isinstance(leaf, _Parameter) and id(leaf) not in self.env:
            return Ref(self.variable(leaf.variable, leaf.dtype))
        if isinstance(leaf, KerasTensor):
            known = self.env[id(leaf)][1]
            return Ref(known) if isinstance(known, int) and not isinstance(known, bool) else known
        if isinstance(leaf, keras.Variable):
            return Ref(self.variable(leaf))
        if ops.is_tensor(leaf) or (isinstance(leaf, np.ndarray) and leaf.ndim):
            return Ref(self.constant(leaf)) if len(leaf.shape) else np.asarray(ops.convert_to_numpy(leaf))
        return leaf

    # ---------------------------------------------------------------------------------- nodes

    def emit(
        self,
        op: str,
        inputs: Sequence[int],
        outs: Sequence[tuple[Sequence[int], str]],
        rule: Rule,
        kernel: Kernel,
        *,
        macs: int = 0,
        random: bool = False,
    ) -> list[int]:
        """Add a node; `outs`: shape and dtype of each output. Gives the output values."""
        layer = self.stack[-1] if self.stack else None
        place = f"{layer.name}/{op}" if layer is not None else op
        count = self.counts.get(place, 0)
        self.counts[place] = count + 1
        name = f"{place}_{count}" if count else place
        made = [self.value(name, shape, dtype, COMPUTED) for shape, dtype in outs]
        where = f"{layer.name} ({type(layer).__name__})" if layer is not None else ""
        self.nodes.append(
            Node(
                name,
                op,
                tuple(inputs),
                tuple(made),
                rule,
                kernel,
                macs,
                vjp_reads=tuple(range(len(inputs))),
                random=random,
                where=where,
            )
        )
        return made

    def whole(
        self,
        name: str,
        function: Callable[..., Any],
        args: Any,
        kwargs: Any,
        outs: Any,
        reason: str,
        random: bool = False,
    ) -> list[int]:
        """An opaque node: `function` called with whole inputs; `outs`: KerasTensors."""
        call, inputs = bound(self, function, args, kwargs)
        kernel = Opaque(lambda *xs: _one(tree.flatten(call(*xs))))
        rule = opaque([self.shape(i) for i in inputs], reason)
        specs = [(o.shape, keras.backend.standardize_dtype(o.dtype)) for o in self.specs(function, args, kwargs, outs)]
        return self.emit(name, inputs, specs, rule, kernel, random=random)

    def specs(self, function: Any, args: Any, kwargs: Any, outs: Sequence[Any]) -> Sequence[Any]:
        """Shapes and dtypes of outputs, where Keras's own inference leaves them open or takes float64 for float32."""
        known = [self.resolve(t) for t in tree.flatten((args, kwargs)) if isinstance(t, (KerasTensor, keras.Variable))]
        wide = any(isinstance(v, Ref) and self.values[v].dtype == "float64" for v in known)
        doubtful = wide and keras.backend.backend() != "tensorflow" and all(o.dtype != "float64" for o in outs)
        if not doubtful and not any(n is None for o in outs for n in o.shape):
            return outs
        a, kw = tree.map_structure(self._like, (args, kwargs))
        found = tree.flatten(keras.src.backend.compute_output_spec(function, *a, **kw))
        return [KerasTensor(f.shape, dtype=f.dtype) for f in found]

    def _like(self, leaf: Any) -> Any:
        v = self.resolve(leaf) if isinstance(leaf, (KerasTensor, keras.Variable)) else leaf
        return KerasTensor(self.shape(v), dtype=self.values[v].dtype) if isinstance(v, Ref) else v

    # --------------------------------------------------------------------------------- layers

    def layer(self, layer: Any, args: Any, kwargs: Any, training: bool) -> tuple[list[Any], Any]:
        """Lower a call of a layer: its flattened outputs (KerasTensors that are known), and their structure."""
        self.stack.append(layer)
        try:
            traced, result, updates = _trace(self, layer, args, kwargs, training)
            for node in traced:
                self.node(node, training)
            for variable, value in updates:
                found = self.resolve(value)
                index = self.cast(found, keras.backend.standardize_dtype(variable.dtype))
                self.current[id(variable)] = index
                self.updated[id(variable)] = (variable, index)
            return tree.flatten(result), result
        finally:
            self.stack.pop()

    def node(self, node: Any, training: bool) -> None:
        """Lower one recorded call of a layer or of an operation."""
        from ranger_nn.keras.lowering import lower_operation
        from ranger_nn.keras.lowering_layers import lower_layer

        operation, args, kwargs = node.operation, node.arguments.args, node.arguments.kwargs
        if isinstance(operation, keras.Layer):
            kwargs = {**kwargs, **masked(node)}
            found = lower_layer(self, operation, args, kwargs, node.outputs, training)
        else:
            found = lower_operation(self, operation, args, kwargs, node.outputs)
        for tensor, known in zip(node.outputs, found, strict=True):
            self.env[id(tensor)] = (tensor, known)


def _one(found: list[Any]) -> Any:
    return found[0] if len(found) == 1 else tuple(found)


def _dtype_name(array: Any) -> str:
    return str(keras.backend.standardize_dtype(array.dtype))


def _seen_dtype(variable: Any, layer: Any) -> str:
    """The dtype in which a layer's `call` sees a Variable: cast to the compute dtype of a mixed policy."""
    own = keras.backend.standardize_dtype(variable.dtype)
    if layer is None or not layer.autocast or not variable._autocast or not own.startswith(("float", "bfloat")):
        return str(own)
    compute = layer.compute_dtype
    return str(compute if compute is not None and compute.startswith(("float", "bfloat")) else own)


def bound(lower: Lower, function: Any, args: Any, kwargs: Any) -> tuple[Callable[..., Any], list[int]]:
    """`function` with every constant bound: a function of the tensor values, and these values in order."""
    leaves = [lower.resolve(leaf) for leaf in tree.flatten((args, kwargs))]
    slots = [k for k, leaf in enumerate(leaves) if isinstance(leaf, Ref)]
    inputs = [int(leaves[k]) for k in slots]
    template = [None if isinstance(leaf, Ref) else leaf for leaf in leaves]
    if not kwargs and len(leaves) == len(args) and slots == list(range(len(leaves))):
        return function, inputs

    def call(*xs: Any) -> Any:
        filled = list(template)
        for k, x in zip(slots, xs, strict=True):
            filled[k] = x
        a, kw = tree.pack_sequence_as((args, kwargs), filled)
        return function(*a, **kw)

    return call, inputs


# ------------------------------------------------------------------------------------------- trace


@contextlib.contextmanager
def _symbolic(layer: Any, lower: Lower, updates: list[tuple[Any, Any]]) -> Iterator[None]:
    """The layer's own Variables are symbolic tensors while this is open."""
    made: dict[int, _Parameter] = {}

    def stand_in(leaf: Any) -> Any:
        if not isinstance(leaf, keras.Variable) or leaf.dtype == "string":
            return leaf
        if id(leaf) not in made:
            tensor = _Parameter(tuple(leaf.shape), dtype=_seen_dtype(leaf, layer), name=leaf.name)
            tensor.bind(leaf, _seen_dtype(leaf, layer), record)
            made[id(leaf)] = tensor
        return made[id(leaf)]

    def record(parameter: _Parameter, value: Any) -> None:
        places = [key for key, attribute in held.items() if attribute is parameter]
        if not places:
            raise _Untraceable(f"assigns to {parameter.variable.path}, which it holds in a list")
        if keras.backend.backend() != "jax":  # what is assigned is a number there, and no gradient comes back from it
            value = ops.stop_gradient(value)
        updates.append((parameter.variable, value))
        for key in places:  # from here on the layer reads the new value
            held[key] = ops.cast(value, parameter.seen)

    held = vars(layer)
    swapped = {}
    if "backend" in held:  # preprocessing layers: the back end's functions under the names of keras.ops
        swapped["backend"], held["backend"] = held["backend"], _Functions()
    if isinstance(held.get("activation"), FunctionType) and held["activation"] in ACTIVATIONS:
        swapped["activation"], held["activation"] = held["activation"], ACTIVATIONS[held["activation"]]
    if isinstance(layer, keras.layers.BatchNormalization) and layer.center and not layer.scale:
        # Keras refuses a shift without a scale on symbolic tensors; a scale of one gives the same numbers
        swapped |= {"scale": layer.scale, "gamma": layer.gamma}
        held |= {"scale": True, "gamma": np.ones(layer.beta.shape, "float32")}
    grouped = getattr(layer, "groups", 1) != 1 and isinstance(
        getattr(type(layer), "convolution_op", None), FunctionType
    )
    if grouped:
        held["convolution_op"] = lambda inputs, kernel: Conv.of(layer)(inputs, kernel)
    for key, attribute in list(held.items()):
        if key in _TRACKED:
            continue
        if isinstance(attribute, keras.Variable):
            swapped[key], held[key] = attribute, stand_in(attribute)
        elif isinstance(attribute, (list, tuple)) and any(isinstance(a, keras.Variable) for a in attribute):
            swapped[key], held[key] = attribute, type(attribute)([stand_in(a) for a in attribute])
        elif isinstance(attribute, dict) and any(isinstance(a, keras.Variable) for a in attribute.values()):
            swapped[key], held[key] = attribute, {k: stand_in(a) for k, a in attribute.items()}
    try:
        yield
    finally:
        held.update(swapped)
        if grouped:
            del held["convolution_op"]


_TRACKED = {"_trainable_variables", "_non_trainable_variables", "_tracker", "_torch_params", "_metrics", "_parameters"}


def _trace(lower: Lower, layer: Any, args: Any, kwargs: Any, training: bool) -> tuple[list[Any], Any, list[Any]]:
    """Recorded calls in order, outputs, updates. Raises where the trace would not be the layer."""
    updates: list[tuple[Any, Any]] = []
    args, kwargs = tree.map_structure(lambda leaf: _fresh(lower, leaf), (args, kwargs))
    policy = layer.dtype_policy
    cast_scope = keras.src.backend.AutocastScope(layer.compute_dtype) if _mixed(layer) else contextlib.nullcontext()
    with _Scope(), _symbolic(layer, lower, updates), cast_scope:
        if layer._convert_input_args:
            args, kwargs = tree.map_structure(
                lambda leaf: (
                    policy.convert_input(leaf, layer.autocast, layer.input_dtype)
                    if isinstance(leaf, KerasTensor)
                    else leaf
                ),
                (args, kwargs),
            )
        kwargs = with_training(layer, kwargs, training)
        result = layer.call(*args, **kwargs)
    leaves = tree.flatten(result)
    for leaf in leaves:
        if not isinstance(leaf, KerasTensor) and leaf is not None:
            raise _Untraceable("gives something that does not depend on its inputs")
    roots = [leaf for leaf in leaves if leaf is not None] + [value for _, value in updates]
    return _recorded(lower, roots), result, updates


def with_training(layer: Any, kwargs: Any, training: bool) -> dict[str, Any]:
    """Arguments of `layer.call`, with the mode where it takes one."""
    rest = {k: v for k, v in kwargs.items() if k != "training"}
    return {**rest, "training": training} if "training" in inspect.signature(layer.call).parameters else rest


def _mixed(layer: Any) -> bool:
    return bool(layer.autocast and layer.compute_dtype != layer.variable_dtype and "float" in layer.compute_dtype)


def _fresh(lower: Lower, leaf: Any) -> Any:
    """A symbolic tensor without history, of the concrete shape that the capture knows."""
    if not isinstance(leaf, KerasTensor):
        return leaf
    known = lower.resolve(leaf)
    if not isinstance(known, Ref):
        return known
    value = lower.values[known]
    tensor = KerasTensor(value.shape, dtype=value.dtype, name=value.name.replace("/", "_"))
    lower.env[id(tensor)] = (tensor, int(known))
    return tensor


def _recorded(lower: Lower, roots: Sequence[Any]) -> list[Any]:
    """The calls that made `roots`, in order; what they left on the layers is taken away again."""
    order: list[Any] = []
    seen: set[int] = set()
    pending = [(root, False) for root in reversed(roots)]
    while pending:
        tensor, done = pending.pop()
        if id(tensor) in lower.env or isinstance(tensor, _Parameter):
            continue
        history = getattr(tensor, "_keras_history", None)
        if history is None or history.operation is None:
            raise _Untraceable("uses a tensor that is neither an input nor a weight")
        node = history.operation._inbound_nodes[history.node_index]
        if id(node) in seen:
            continue
        if done:
            seen.add(id(node))
            order.append(node)
            continue
        pending.append((tensor, True))
        pending += [(t, False) for t in reversed([*node.arguments.keras_tensors, *_masks(node)])]
    return order


def _masks(node: Any) -> list[Any]:
    """Masks that the called layer takes from its inputs."""
    return [m for m in tree.flatten(masked(node)) if isinstance(m, KerasTensor)]


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


def get_mask(tensor: Any) -> Any:
    """The mask that Keras attached to a tensor."""
    return getattr(tensor, "_keras_mask", None)


# ----------------------------------------------------------------------------------------- capture


def capture(model: keras.Model, inputs: Any, training: bool = False) -> Captured:
    """Graph of `model` for inputs of these shapes.

    Args:
        model: a built functional, Sequential or subclassed model.
        inputs: what the model takes, with a `keras.KerasTensor` (concrete shape, batch included) for each tensor.
        training: the mode that is captured.

    Raises LayerError where the model's own `call` cannot be traced, InputError where the model refuses such inputs.
    """
    lower = Lower(training)
    flat = tree.flatten(inputs)
    found = []
    for position, like in enumerate(flat):
        dtype = keras.backend.standardize_dtype(like.dtype)
        found.append(lower.external(like.name, like.shape, dtype, INPUT, ("input", position)))
        lower.env[id(like)] = (like, found[-1])
    with _eagerly():
        leaves, structure = _lower_model(lower, model, inputs, training)
    if lower.channels_last:
        for v in found:
            lower.values[v] = replace(lower.values[v], layout=NHWC)
    outputs = tuple(None if leaf is None else int(lower.resolve(leaf)) for leaf in leaves)
    updates = tuple(lower.updated.values())
    kept = dict.fromkeys([o for o in outputs if o is not None] + [v for _, v in updates])
    graph = Graph(model.name, tuple(lower.values), tuple(lower.nodes), tuple(found), tuple(kept))
    graph = fuse(_pruned(graph), Fused)
    return Captured(graph, lower.sources, outputs, lambda given: tree.pack_sequence_as(structure, list(given)), updates)


def _lower_model(lower: Lower, model: Any, inputs: Any, training: bool) -> tuple[list[Any], Any]:
    if not model.built:
        model(inputs)
    operations = _operations(model)
    before = [(op, len(op._inbound_nodes), len(op._outbound_nodes)) for op in operations]
    try:
        return lower.layer(model, (inputs,), {}, training)
    except RangerError:
        raise
    except Exception as error:
        _refuse_input(model, inputs)
        raise LayerError(
            f"{type(model).__name__} {model.name!r} cannot be captured: its call {_reason(error)}. A region-wise program "
            "needs a graph of Keras operations that does not depend on the data: call keras.ops and keras.layers only, "
            "replace a Python branch on tensor values by keras.ops.where or keras.ops.cond, or put what cannot be "
            f"traced into a layer of its own, which then stays whole. Config: {config_of(model)}"
        ) from error
    finally:
        for op, inbound, outbound in before:
            del op._inbound_nodes[inbound:]
            del op._outbound_nodes[outbound:]


def _operations(model: Any) -> list[Any]:
    """Every layer inside, and every operation of the functional models among them."""
    found = {id(layer): layer for layer in model._flatten_layers()}
    for layer in list(found.values()):
        found.update({id(op): op for op in getattr(layer, "operations", [])})
    return list(found.values())


def _refuse_input(model: Any, inputs: Any) -> None:
    """Keras's own refusal of inputs that the model cannot take, with the config of the layer that it names."""
    try:
        model.compute_output_spec(inputs)
    except ValueError as error:
        text = str(error).strip()
        named = [layer for layer in model._flatten_layers() if f'"{layer.name}"' in text or f"'{layer.name}'" in text]
        layer = named[-1] if named else model
        shapes = ", ".join(str(tuple(x.shape)) for x in tree.flatten(inputs))
        raise InputError(
            f"{model.name} refuses inputs of shape {shapes}: {text.rstrip('.')}. Config of {layer.name}: {config_of(layer)}"
        ) from error
    except Exception:  # not the input's fault: the caller says what is
        return


def config_of(layer: Any) -> str:
    """The layer's config, as far as it has one."""
    try:
        return str(layer.get_config())
    except Exception:  # subclassed models need not have one
        return f"{type(layer).__name__} has none"


def _reason(error: BaseException) -> str:
    if isinstance(error, _Untraceable):
        return str(error)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not _inside(f.filename)]
    line = f" at {frames[-1].filename}:{frames[-1].lineno} ({frames[-1].line})" if frames else ""
    text = str(error).strip().splitlines()
    return f"fails on symbolic tensors{line}: {type(error).__name__}: {text[0] if text else ''}"


def _inside(filename: str) -> bool:
    return any(
        part in filename for part in ("/keras/src/", "/tensorflow/", "/jax/", "/torch/", "/ranger_nn/", "/optree/")
    )


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
        from keras.src.backend.torch import core

        with core.device_scope(core.DEFAULT_DEVICE):  # Keras may be on the meta device, where it only builds
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
