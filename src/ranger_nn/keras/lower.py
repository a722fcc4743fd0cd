"""State of one capture: values and nodes made so far, and what each symbolic tensor stands for.

Rules of operations (`lowering.py`) and layers (`lowering_layers.py`) add nodes through it. Enter at `Lower`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
from keras import KerasTensor, ops, tree

from ranger_nn.core.graph import COMPUTED, CONSTANT, PARAMETER, Node, Rule, Value
from ranger_nn.keras import private
from ranger_nn.keras.kernels import Kernel, Opaque
from ranger_nn.keras.trace import Parameter, Untraceable, masked, seen_dtype, trace
from ranger_nn.ops.pointwise import opaque, pointwise

ITEMSIZE = {"bool": 1, "int8": 1, "uint8": 1, "float16": 2, "bfloat16": 2, "int16": 2, "uint16": 2, "float64": 8}
ITEMSIZE |= {"int64": 8, "uint64": 8, "complex64": 8, "complex128": 16}


class Ref(int):
    """A value index among an operator's arguments."""


@dataclass
class Lower:
    """State of one capture: values and nodes made so far, and what each KerasTensor stands for.

    `lower_operation`, `lower_layer`: what adds the nodes of a call; see `lowering.py` and `lowering_layers.py`.
    """

    training: bool
    lower_operation: Callable[..., list[Any]]
    lower_layer: Callable[..., Sequence[Any]]
    values: list[Value] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    sources: dict[int, tuple[str, Any]] = field(default_factory=dict)
    env: dict[int, tuple[Any, Any]] = field(default_factory=dict)
    parameters: dict[tuple[int, str], int] = field(default_factory=dict)
    current: dict[int, int] = field(default_factory=dict)
    updated: dict[int, tuple[Any, int]] = field(default_factory=dict)
    losses: list[tuple[Any, int]] = field(default_factory=list)
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
        dtype = dtype or seen_dtype(variable, self.stack[-1] if self.stack else None)
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
        shape = self.shape(v)
        kernel = Kernel(lambda x: ops.cast(x, dtype), tame=True)
        return self.emit("cast", [v], [(shape, dtype)], pointwise([shape], shape), kernel)[0]

    def resolve(self, leaf: Any) -> Any:
        """Value index of a symbolic tensor, Variable or array; anything else as it is."""
        if isinstance(leaf, Parameter) and id(leaf) not in self.env:
            return Ref(self.variable(leaf.variable, leaf.dtype))
        if isinstance(leaf, KerasTensor):
            known = self.env[id(leaf)][1]
            return Ref(known) if isinstance(known, int) and not isinstance(known, bool) else known
        if isinstance(leaf, keras.Variable):
            return Ref(self.variable(leaf))
        if isinstance(leaf, np.ndarray) and leaf.ndim:
            return Ref(self.constant(leaf))
        if _holds_number(leaf) or (ops.is_tensor(leaf) and len(leaf.shape)):
            return Ref(self.tensor(leaf) if may_change(leaf) else self.constant(leaf))
        if ops.is_tensor(leaf):
            return Ref(self.tensor(leaf)) if _trained(leaf) else np.asarray(ops.convert_to_numpy(leaf))
        return leaf

    def tensor(self, tensor: Any) -> int:
        """A tensor of the back end that the model holds: read when the plan runs, so that it is as it is then, with a
        gradient where it asks for one.
        """
        if _trained(tensor) and not getattr(tensor, "is_leaf", True):
            raise Untraceable("computes with a tensor that is trained and no Variable")
        dtype = str(keras.backend.standardize_dtype(tensor.dtype))
        key = (id(tensor), dtype)
        if key not in self.parameters:
            kind = PARAMETER if _trained(tensor) else CONSTANT
            self.parameters[key] = self.external("tensor", tensor.shape, dtype, kind, ("tensor", tensor))
        return self.parameters[key]

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
        known = self.specs(function, args, kwargs, outs) if random else self.inferred(function, args, kwargs, outs)
        specs = [(o.shape, keras.backend.standardize_dtype(o.dtype)) for o in known]
        return self.emit(name, inputs, specs, rule, kernel, random=random)

    def specs(self, function: Any, args: Any, kwargs: Any, outs: Sequence[Any]) -> Sequence[Any]:
        """Shapes and dtypes of outputs, where Keras's own inference leaves them open or takes float64 for float32."""
        known = [self.resolve(t) for t in tree.flatten((args, kwargs)) if isinstance(t, (KerasTensor, keras.Variable))]
        wide = any(isinstance(v, Ref) and self.values[v].dtype == "float64" for v in known)
        doubtful = wide and keras.backend.backend() != "tensorflow" and all(o.dtype != "float64" for o in outs)
        if not doubtful and not any(n is None for o in outs for n in o.shape):
            return outs
        a, kw = tree.map_structure(self._like, (args, kwargs))
        found = tree.flatten(inferred(function, *a, **kw))
        return [KerasTensor(f.shape, dtype=f.dtype) for f in found]

    def inferred(self, function: Any, args: Any, kwargs: Any, outs: Sequence[Any]) -> Sequence[Any]:
        """Shapes and dtypes as the back end infers them: what Keras declares is at times another."""
        try:
            a, kw = tree.map_structure(self._like, (args, kwargs))
            found = tree.flatten(inferred(function, *a, **kw))
        except Exception:  # a function that works on numbers only
            found = self.specs(function, args, kwargs, outs)
        shapes = [tuple(o.shape) for o in found]
        if len(found) != len(outs) or any(not isinstance(n, int) for shape in shapes for n in shape):
            raise Untraceable(
                f"uses {getattr(function, '__qualname__', type(function).__name__)}, whose result's size depends on the numbers"
            )
        return found

    def _like(self, leaf: Any) -> Any:
        v = self.resolve(leaf) if isinstance(leaf, (KerasTensor, keras.Variable)) else leaf
        return KerasTensor(self.shape(v), dtype=self.values[v].dtype) if isinstance(v, Ref) else v

    # --------------------------------------------------------------------------------- layers

    def layer(self, layer: Any, args: Any, kwargs: Any, training: Any) -> tuple[list[Any], Any]:
        """Lower a call of a layer: its flattened outputs (KerasTensors that are known), and their structure."""
        self.stack.append(layer)
        try:
            args, kwargs = tree.map_structure(self._fresh, (args, kwargs))
            traced = trace(layer, args, kwargs, training, self.env)
            for node, mode in traced.calls:
                self.node(node, mode)
            for variable, value in traced.updates:
                found = self.resolve(value)
                index = self.cast(found, keras.backend.standardize_dtype(variable.dtype))
                self.current[id(variable)] = index
                self.updated[id(variable)] = (variable, index)
            result = traced.result
            return tree.flatten(result), result
        finally:
            self.stack.pop()

    def _fresh(self, leaf: Any) -> Any:
        """A symbolic tensor without history, of the concrete shape that the capture knows."""
        if not isinstance(leaf, KerasTensor):
            return leaf
        known = self.resolve(leaf)
        if not isinstance(known, Ref):
            return known
        value = self.values[known]
        tensor = KerasTensor(value.shape, dtype=value.dtype, name=value.name.replace("/", "_"))
        self.env[id(tensor)] = (tensor, int(known))
        mask = private.get_mask(leaf)
        if mask is not None and id(mask) in self.env:
            private.set_mask(tensor, self._fresh(mask))
        return tensor

    def node(self, node: Any, training: Any) -> None:
        """Lower one recorded call of a layer, in this mode, or of an operation."""
        operation, args, kwargs = node.operation, node.arguments.args, node.arguments.kwargs
        if isinstance(operation, keras.Layer):
            kwargs = {**kwargs, **masked(node)}
            found = self.lower_layer(self, operation, args, kwargs, node.outputs, training)
        else:
            found = self.lower_operation(self, operation, args, kwargs, node.outputs)
        for tensor, known in zip(node.outputs, found, strict=True):
            self.env[id(tensor)] = (tensor, known)


class _Inferred(keras.Operation):
    """Any function, as an operation of Keras."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """The function."""
        return self.function(*args, **kwargs)


def inferred(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Symbolic results of a function on symbolic tensors, as the back end infers them."""
    return _Inferred(function).compute_output_spec(*args, **kwargs)


def _holds_number(leaf: Any) -> bool:
    """A Variable of TensorFlow's own, which Keras does not know."""
    return keras.backend.backend() == "tensorflow" and hasattr(leaf, "assign") and hasattr(leaf, "handle")


def may_change(tensor: Any) -> bool:
    """Whether a tensor may have other numbers at the next call."""
    return keras.backend.backend() == "torch" or _holds_number(tensor)


def _trained(tensor: Any) -> bool:
    """Whether a tensor asks for a gradient."""
    return bool(getattr(tensor, "requires_grad", False) or (_holds_number(tensor) and tensor.trainable))


def _one(found: list[Any]) -> Any:
    return found[0] if len(found) == 1 else tuple(found)


def _dtype_name(array: Any) -> str:
    return str(keras.backend.standardize_dtype(array.dtype))


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
