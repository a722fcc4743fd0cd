"""`regionalize`: a `keras.Model` that runs another one region by region, with the very same Variables.

The wrapper holds the untouched model as its only layer, so that weights, optimisers, `.keras` files and exports see it
as it is. Plans are made per input shape, dtype and mode, and cached (`batches.py`: how TensorFlow gets to know shapes).
Enter at `regionalize` and `plan`.
"""

from __future__ import annotations

import inspect
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import keras
import numpy as np
from keras import KerasTensor, ops, tree

from ranger_nn.bounds.axes import find_axes
from ranger_nn.core.graph import Graph
from ranger_nn.errors import InputError, VerificationError
from ranger_nn.keras import batches, exporting, private
from ranger_nn.keras.capture import Captured, capture
from ranger_nn.keras.execute import Runner
from ranger_nn.keras.identity import identity
from ranger_nn.keras.loops import tracing
from ranger_nn.keras.lower import ITEMSIZE, inferred
from ranger_nn.keras.lowering_layers import DECLARED, REGIONAL
from ranger_nn.keras.ready import Found, Ready, handed_out
from ranger_nn.keras.trace import own_mode
from ranger_nn.planning.budget import parse_memory
from ranger_nn.planning.report import Plan
from ranger_nn.planning.rolled_search import make_rolled
from ranger_nn.planning.search import Options

Memory = int | str | None


def regionalize(
    model: keras.Model,
    memory: Memory = None,
    *,
    regions: Sequence[int] | None = None,
    schedule: str | None = None,
    verify: bool = False,
) -> Regional:
    """A Keras model that computes what `model` computes, region by region, inside `memory`.

    Args:
        model: functional, Sequential or subclassed; its Variables are shared, not copied.
        memory: bytes, or "512MB" / "2GiB": allowed peak of activations, carried rows, materialised values, operator
            workspace and (training) gradients of activations; Variables, the caller's input and the final output do not
            count. None: the fastest plan, which says what it needs.
        regions: input rows (steps of a series, slices of a volume) of one region, such as (256,), or all rows and some
            columns, such as (4096, 256); overrides the planner.
        schedule: "slide", the only one.
        verify: compare the first result of each plan for inference with the untouched model's, where the model is called
            eagerly; this once it needs the untouched model's memory.

    Raises:
        BudgetError: `memory` is not a positive amount, or nothing fits: it names the least that does.
        CaptureError: the model's `call` cannot be traced; it names the line.
        InputError: not a Keras model, an unknown size of an input, or options that do not suit it.
    """
    return Regional(model, memory, regions=regions, schedule=schedule, verify=verify)


def plan(
    model: keras.Model,
    x: Any,
    memory: Memory = None,
    *,
    regions: Sequence[int] | None = None,
    schedule: str | None = None,
    training: bool = False,
) -> Plan:
    """The plan for `model` on `x` (arrays in the model's structure, or a shape with its batch); nothing is run.

    `training`: plan forward and backward together, as `fit` does.
    """
    options, model = Options.checked(parse_memory(memory), regions, schedule), untouched(model)
    shape = isinstance(x, tuple | list) and all(isinstance(n, int) or n is None for n in x)
    if shape and any(n is None or n < 1 for n in x):
        raise InputError(
            f"a plan is for one shape, and its sizes are positive integers, the batch's too: got {tuple(x)}"
        )
    given = KerasTensor(tuple(x), dtype=input_dtype(model)) if shape else x
    with _LOCK:
        return make_rolled(captured_for(model, given, training).graph, options, training).plan


def untouched(model: Any) -> Any:
    """The model itself, of one that is regional already."""
    return model.untouched if isinstance(model, Regional) else model


def input_dtype(model: keras.Model) -> str:
    inputs = tree.flatten(getattr(model, "inputs", None) or [])
    return inputs[0].dtype if inputs else keras.config.floatx()


PLANS = 64
"""Plans that a model keeps: one for each shape, mode and state of its layers; above it the one not used for longest goes."""

_LOCK = threading.RLock()
"""Captures write down calls on the layers, which wrappers may share, and take them away again: one at a time."""


@keras.saving.register_keras_serializable(package="ranger_nn")
class Regional(keras.Model):
    """`untouched`, region by region. Use `regionalize`."""

    def __init__(
        self,
        model: keras.Model,
        memory: Memory = None,
        *,
        regions: Sequence[int] | None = None,
        schedule: str | None = None,
        verify: bool = False,
        **kwargs: Any,
    ) -> None:
        if not isinstance(model, keras.Layer):
            raise InputError(f"regionalize takes a keras.Model, got {type(model).__name__}")
        model = untouched(model)
        options = Options.checked(parse_memory(memory), regions, schedule)
        super().__init__(**{"name": model.name, "dtype": model.dtype_policy, "trainable": model.trainable, **kwargs})
        self.untouched = model
        self._given = _Quiet({"memory": memory, "regions": options.regions, "schedule": schedule, "verify": verify})
        self._options = _Quiet(options)
        self._plans = _Quiet(OrderedDict())
        self._unrolled = _Quiet(False)
        self._first = _Quiet(None)
        self.built = model.built

    # ---- as the untouched model ---------------------------------------------------------------------------

    def build(self, input_shape: Any) -> None:
        """Builds the untouched model."""
        if not self.untouched.built:
            self.untouched.build(input_shape)
        self.built = True

    def compute_output_spec(self, inputs: Any, training: Any = None, mask: Any = None) -> Any:
        """As the untouched model."""
        return self.untouched.compute_output_spec(inputs, **_accepted(self.untouched, training, None))

    def compute_output_shape(self, input_shape: Any) -> Any:
        """As the untouched model."""
        return self.untouched.compute_output_shape(input_shape)

    def get_config(self) -> dict[str, Any]:
        """The untouched model and the options."""
        given = dict(self._given.value)
        return {"name": self.name, "model": keras.saving.serialize_keras_object(self.untouched), **given}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Regional:
        """From `get_config`."""
        config = dict(config)
        model = keras.saving.deserialize_keras_object(config.pop("model"), custom_objects)
        return cls(model, **config)

    def export(self, filepath: Any, format: str = "tf_saved_model", verbose: Any = None, **kwargs: Any) -> None:
        """As `keras.Model.export`; without an `input_signature` for the size of the first call: with any batch in a
        SavedModel from TensorFlow, else with a batch of one.
        """
        exporting.check(self, format)
        like = exporting.signature(self, self._first.value, format)
        if like is not None:
            kwargs.setdefault("input_signature", like)
        with exporting.exporting(self, self._unrolled, format):
            super().export(filepath, format, verbose, **kwargs)

    def plan_for(self, inputs: Any, training: bool = False) -> Plan:
        """The plan used for inputs like these."""
        inputs = tree.map_structure(ops.convert_to_tensor, inputs)
        masks = [private.get_mask(x) for x in tree.flatten(inputs)]
        return self.prepared(inputs, masks, training).runner.rolled.plan

    # ---- running ------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the untouched model."""
        _check_arguments(self, args, kwargs)
        self._dtype_policy = self.untouched.dtype_policy  # it converts what is given
        return super().__call__(*args, **kwargs)

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        """As the untouched model."""
        training = _mode(self, training)
        if keras.backend.backend() == "tensorflow":
            import tensorflow as tf  # whose conversion of Python branches would go through all of the executor

            return tf.autograph.experimental.do_not_convert(self._call)(inputs, training, mask)
        return self._call(inputs, training, mask)

    def _call(self, inputs: Any, training: Any, mask: Any) -> Any:
        if self._first.value is None:  # what `export` goes by
            self._first.value = tree.map_structure(lambda x: tuple(x.shape), inputs)
        masks = tree.flatten(mask) if mask is not None else [None] * len(tree.flatten(inputs))
        if any(not isinstance(n, int) for x in tree.flatten(inputs) for n in x.shape):
            return batches.one_by_one(self, inputs, masks, training)
        ready = self.prepared(inputs, masks, training)
        found = self.run(ready, inputs, masks)
        if self._given.value["verify"] and not training:
            _check(self, ready, inputs, masks, found.outputs)
        return handed_out(ready.captured, found)

    def prepared(self, inputs: Any, masks: Sequence[Any], training: Any) -> Ready:
        """The plan for inputs like these and the model as it is now, made once. At most `PLANS` are kept: those used last."""
        with _LOCK:
            key, plans = self._key(inputs, masks, training), self._plans.value
            found = plans.get(key)
            if found is None:
                captured = captured_for(self.untouched, inputs, training, masks)
                rolled = make_rolled(captured.graph, self._options.value, bool(training))
                found = Ready(captured, Runner(rolled, exporting.unrolled() if self._unrolled.value else None))
                plans[key] = found
                while len(plans) > PLANS:
                    plans.popitem(last=False)
            plans.move_to_end(key)
            return found

    def _key(self, inputs: Any, masks: Sequence[Any], training: Any) -> tuple[Any, ...]:
        leaves = tree.flatten(inputs)
        return (
            tuple((tuple(x.shape), keras.backend.standardize_dtype(x.dtype)) for x in leaves),
            str(tree.map_structure(lambda _: 0, inputs)),
            tuple(m is not None for m in masks),
            (type(training), training),
            self._unrolled.value,
            tuple(DECLARED.items()),
            identity(self.untouched),
        )

    def run(self, ready: Ready, inputs: Any, masks: Sequence[Any]) -> Found:
        """Flattened outputs, their masks and losses; what is assigned to Variables is assigned."""
        captured = ready.captured
        leaves = [*tree.flatten(inputs), *masks]
        known = {v: _external(captured.graph, v, *source, leaves) for v, source in captured.sources.items()}
        external = {v: known[v] for v in captured.graph.outputs if v in known}
        found = external | ready.runner(known)
        for variable, v in captured.updates:
            variable.assign(found[v])
        outputs, masks = ([None if v is None else found[v] for v in vs] for vs in (captured.outputs, captured.masks))
        return Found(outputs, masks, [found[v] for _, v in captured.losses])

    # ---- steps of training and inference, traced for each shape --------------------------------------------

    def train_step(self, *args: Any) -> Any:
        """Keras's own."""
        with self._tracing(gradients=True):
            return super().train_step(*args)

    def predict_step(self, *args: Any) -> Any:
        """Keras's own, in which nothing is saved for gradients."""
        with self._tracing(gradients=False):
            return super().predict_step(*args)

    def test_step(self, *args: Any) -> Any:
        """Keras's own, in which nothing is saved for gradients."""
        with self._tracing(gradients=False):
            return super().test_step(*args)

    def _tracing(self, gradients: bool) -> Any:
        return tracing(gradients, executor=not self.jit_compile)

    def make_train_function(self, force: bool = False) -> None:
        """As `keras.Model.make_train_function`."""
        batches.by_shape(self, "train_function", super().make_train_function, force)

    def make_test_function(self, force: bool = False) -> None:
        """As `keras.Model.make_test_function`."""
        batches.by_shape(self, "test_function", super().make_test_function, force)

    def make_predict_function(self, force: bool = False) -> None:
        """As `keras.Model.make_predict_function`."""
        batches.by_shape(self, "predict_function", super().make_predict_function, force)


REGIONAL.append(Regional)


class _Quiet:
    """Something that Keras's tracking of attributes must not look into."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __deepcopy__(self, memo: Any) -> _Quiet:
        """Plans hold closures: a copy makes its own."""
        return _Quiet(OrderedDict() if isinstance(self.value, OrderedDict) else self.value)


def _mode(model: Regional, training: Any) -> Any:
    """The mode as a number, where it is given as a tensor."""
    if training is None or isinstance(training, (bool, int, float, str)):
        return training
    if np.shape(training) == () and _eager([training]):
        return bool(ops.convert_to_numpy(training))
    raise InputError(
        f"training= of {model.name} is {training!r}: a plan is for one mode, so it is True, False or a tensor of one such "
        "number that is known, not one that a graph computes. Several inputs go into one list"
    )


def _check_arguments(model: Regional, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Refuse what the untouched model may take and a plan does not."""
    more = [k for k in kwargs if k not in ("inputs", "training", "mask")]
    if len(args) + ("inputs" in kwargs) != 1 or more:
        raise InputError(
            f"{model.name} takes its inputs as one argument (a tensor, or a list, tuple or dictionary of tensors), and training= "
            f"and mask= by name; got {len(args)} positional arguments and {sorted(kwargs)}. Put several inputs into one list, "
            "as keras.Model([a, b], y) does"
        )
    wrong = [
        x for x in tree.flatten([*args, kwargs.get("inputs", ())]) if not hasattr(x, "shape") or not hasattr(x, "dtype")
    ]
    if wrong:
        raise InputError(
            f"{model.name} takes tensors or NumPy arrays, got {type(wrong[0]).__name__}: {str(wrong[0])[:40]!r}. Call "
            "keras.ops.convert_to_tensor first"
        )
    if "training" in kwargs and kwargs["training"] is None and own_mode(model.untouched, None) is not None:
        raise InputError(
            f"training=None, given to {model.name}, whose call has training={own_mode(model.untouched, None)} by default: "
            "leave it out for the default, or give True or False"
        )


def _accepted(model: Any, training: Any, mask: Any) -> dict[str, Any]:
    names = inspect.signature(model.call).parameters
    return {k: v for k, v in (("training", training), ("mask", mask)) if k in names and v is not None}


def captured_for(model: keras.Model, inputs: Any, training: Any, masks: Sequence[Any] = ()) -> Captured:
    """The graph, with the dtypes that the back end really gives where double precision is about (Keras's symbolic
    tensors know 32 bits only).
    """
    specs = tree.map_structure(_symbolic, inputs)
    for spec, mask in zip(tree.flatten(specs), masks, strict=False):
        if mask is not None:
            private.set_mask(spec, _symbolic(mask))
    captured = capture(model, specs, training)
    if all(v.dtype != "float64" for v in captured.graph.values):
        return captured
    dtypes = _real_dtypes(captured.graph)
    values = tuple(
        replace(v, dtype=dtypes.get(v.index, v.dtype), itemsize=ITEMSIZE.get(dtypes.get(v.index, v.dtype), 4))
        for v in captured.graph.values
    )
    return replace(captured, graph=replace(captured.graph, values=values))


def _symbolic(x: Any) -> KerasTensor:
    return KerasTensor(tuple(x.shape), dtype=keras.backend.standardize_dtype(x.dtype))


def _real_dtypes(graph: Graph) -> dict[int, str]:
    made = {v for node in graph.nodes for v in node.outputs}
    outside = [v for v in graph.values if v.index not in made]

    def every(*given: Any) -> list[Any]:
        known: dict[int, Any] = dict(zip([v.index for v in outside], given, strict=True))
        for node in graph.nodes:
            found = node.kernel.whole(*[known[v] for v in node.inputs])
            known |= zip(node.outputs, found if len(node.outputs) > 1 else (found,), strict=True)
        return [known[v] for v in sorted(made)]

    specs = inferred(every, *[KerasTensor(v.shape, dtype=v.dtype) for v in outside])
    return {v: keras.backend.standardize_dtype(s.dtype) for v, s in zip(sorted(made), specs, strict=True)}


def _external(graph: Graph, v: int, kind: str, source: Any, leaves: Sequence[Any]) -> Any:
    if kind == "input":
        return leaves[source]
    if kind == "tensor":
        return ops.cast(ops.convert_to_tensor(source), graph.values[v].dtype)
    if kind == "variable":
        return ops.cast(ops.convert_to_tensor(source), graph.values[v].dtype)
    return ops.convert_to_tensor(source)


def _check(model: Regional, ready: Ready, inputs: Any, masks: Sequence[Any], found: Any) -> None:
    """Compare a plan's first eager result with the untouched model's, and with that what the same graph gives in several
    regions, however many the plan itself has; it needs the untouched model's memory.
    """
    if ready.checked or not _eager(tree.flatten(inputs)):
        return
    ready.checked = True
    with keras.StatelessScope():  # nothing is assigned or added a second time
        expected = tree.flatten(model.untouched(inputs, **_accepted(model.untouched, False, None)))
        parts = _in_parts(ready.captured.graph)
        again = found if parts is None else model.run(replace(ready, runner=parts), inputs, masks).outputs
    shapes = [tuple(x.shape) for x in tree.flatten(inputs)]
    _compare(model.name, f"inputs of shape {shapes}", found, expected)
    _compare(model.name, f"inputs of shape {shapes} in {PARTS} regions", again, expected)


PARTS = 4
"""Regions of every sweep in which `verify` runs a graph: first, last and two between, which differ at their borders."""


def _in_parts(graph: Graph) -> Runner | None:
    """The graph in several regions of every sweep, or None where nothing can be cut."""
    axes = find_axes(graph)
    if not axes:
        return None
    rows = max(1, max(graph.values[v].shape[d] for v, d in axes[0].dims.items() if v in graph.inputs) // PARTS)
    return Runner(make_rolled(graph, Options.checked(None, (rows,), None), False))


def _compare(name: str, place: str, found: Any, expected: Sequence[Any]) -> None:
    for ours, theirs in zip(tree.flatten(found), expected, strict=True):
        a, b = (np.asarray(ops.convert_to_numpy(ops.cast(x, "float64"))) for x in (ours, theirs))
        apart = float(np.abs(a - b).max(initial=0.0) / max(np.abs(b).max(initial=0.0), 1e-30))
        limit = {8: 1e-9, 4: 1e-4}.get(ITEMSIZE.get(keras.backend.standardize_dtype(theirs.dtype), 4), 5e-2)
        if not apart <= limit and not np.array_equal(a, b, equal_nan=True):
            raise VerificationError(
                f"{name} differs from the untouched model by {apart:.1e} of its largest value, more than {limit:.0e}, "
                f"for {place}: use the untouched model, and report this"
            )


def _eager(leaves: Sequence[Any]) -> bool:
    """Whether these are numbers, not what a trace stands for."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        return bool(tf.executing_eagerly())
    if backend == "jax":
        import jax

        return not any(isinstance(x, jax.core.Tracer) for x in leaves)
    return True
