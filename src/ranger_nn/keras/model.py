"""`regionalize`: a `keras.Model` that runs another one region by region, with the very same Variables.

The wrapper holds the untouched model as its only layer, so that weights, optimisers, `.keras` files and exports see it
as it is. Plans are made per input shape, dtype and mode, and cached. Enter at `regionalize` and `plan`.

TensorFlow traces `fit` and `predict` for batches of any size, but a plan has a shape. So the sizes that the data will
have are found out beforehand and the trace has a branch for each; without them samples run one after the other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
from keras import KerasTensor, ops, tree

from ranger_nn.aggregate.monoid import Moments
from ranger_nn.core.graph import Graph
from ranger_nn.errors import InputError, VerificationError
from ranger_nn.keras.capture import Captured, capture
from ranger_nn.keras.execute import Runner
from ranger_nn.keras.kernels_reduce import Reduce
from ranger_nn.keras.lower import ITEMSIZE
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
        regions: input rows (steps of a series, slices of a volume) of one region, such as (256,); overrides the planner.
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
    options = Options.checked(parse_memory(memory), regions, schedule)
    shape = isinstance(x, tuple | list) and all(isinstance(n, int) for n in x)
    given = KerasTensor(tuple(x), dtype=_input_dtype(model)) if shape else x
    return make_rolled(_captured(model, given, training).graph, options, training).plan


def _input_dtype(model: keras.Model) -> str:
    inputs = tree.flatten(getattr(model, "inputs", None) or [])
    return inputs[0].dtype if inputs else keras.config.floatx()


@dataclass
class Ready:
    """A plan made ready to run."""

    captured: Captured
    runner: Runner
    checked: bool = False


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
        options = Options.checked(parse_memory(memory), regions, schedule)
        super().__init__(**{"name": model.name, "dtype": model.dtype_policy, "trainable": model.trainable, **kwargs})
        self.untouched = model
        self._given = _Quiet({"memory": memory, "regions": options.regions, "schedule": schedule, "verify": verify})
        self._options = _Quiet(options)
        self._plans = _Quiet({})
        self._sizes = _Quiet(())
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
        """As `keras.Model.export`; without an `input_signature` for the size of the first call (on JAX and PyTorch with
        a batch of one).
        """
        shapes = self._build_shapes_dict
        if "input_signature" not in kwargs and shapes and keras.backend.backend() != "tensorflow":
            like = tree.map_shape_structure(
                lambda s: keras.InputSpec(shape=(1, *s[1:]), dtype=self.input_dtype), next(iter(shapes.values()))
            )
            kwargs["input_signature"] = [like]
        super().export(filepath, format, verbose, **kwargs)

    def plan_for(self, inputs: Any, training: bool = False) -> Plan:
        """The plan used for inputs like these."""
        return self._prepare(tree.map_structure(ops.convert_to_tensor, inputs), training).runner.rolled.plan

    # ---- running ------------------------------------------------------------------------------------------

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        """As the untouched model."""
        if keras.backend.backend() == "tensorflow":
            import tensorflow as tf  # whose conversion of Python branches would go through all of the executor

            return tf.autograph.experimental.do_not_convert(self._call)(inputs, bool(training))
        return self._call(inputs, bool(training))

    def _call(self, inputs: Any, training: bool) -> Any:
        leaves = tree.flatten(inputs)
        if getattr(self, "_build_shapes_dict", None) is None:  # what `export` goes by
            self._build_shapes_dict: Any = {"inputs": tree.map_structure(lambda x: tuple(x.shape), inputs)}
        if any(not isinstance(n, int) for x in leaves for n in x.shape):
            return _any_batch(self, inputs, training)
        ready = self._prepare(inputs, training)
        found = self._run(ready, inputs)
        if self._given.value["verify"] and not training:
            _check(self, ready, inputs, found)
        return found

    def _prepare(self, inputs: Any, training: bool) -> Ready:
        leaves = tree.flatten(inputs)
        policies = tuple((v.trainable, v.dtype) for v in self.untouched.variables)
        key = (
            tuple((tuple(x.shape), keras.backend.standardize_dtype(x.dtype)) for x in leaves),
            training,
            policies if training else (),
        )
        found = self._plans.value.get(key)
        if found is None:
            captured = _captured(self.untouched, inputs, training)
            found = Ready(captured, Runner(make_rolled(captured.graph, self._options.value, training)))
            self._plans.value[key] = found
        return found

    def _run(self, ready: Ready, inputs: Any) -> Any:
        captured = ready.captured
        leaves = tree.flatten(inputs)
        known = {v: _external(captured.graph, v, *source, leaves) for v, source in captured.sources.items()}
        external = {v: known[v] for v in (*captured.outputs, *captured.masks) if v in known}
        found = external | ready.runner(known)
        for variable, v in captured.updates:
            variable.assign(found[v])
        for v, mask in zip(captured.outputs, captured.masks, strict=True):
            if mask is not None:
                keras.src.backend.set_keras_mask(found[v], found[mask])
        return captured.pack([None if v is None else found[v] for v in captured.outputs])

    # ---- sizes of batches, for TensorFlow -----------------------------------------------------------------

    def fit(self, x: Any = None, y: Any = None, batch_size: int | None = None, **kwargs: Any) -> Any:
        """As `keras.Model.fit`."""
        split = kwargs.get("validation_split") or 0.0
        with self._expecting(x, batch_size, "train_function", split):
            return super().fit(x, y, batch_size, **kwargs)

    def predict(self, x: Any, batch_size: int | None = None, **kwargs: Any) -> Any:
        """As `keras.Model.predict`."""
        with self._expecting(x, batch_size, "predict_function"):
            return super().predict(x, batch_size, **kwargs)

    def evaluate(self, x: Any = None, y: Any = None, batch_size: int | None = None, **kwargs: Any) -> Any:
        """As `keras.Model.evaluate`."""
        with self._expecting(x, batch_size, "test_function"):
            return super().evaluate(x, y, batch_size, **kwargs)

    @contextlib.contextmanager
    def _expecting(self, x: Any, batch_size: int | None, function: str, split: float = 0.0) -> Iterator[None]:
        """Batches of arrays have one of two sizes; a function that was traced for others, or for images of another size
        (TensorFlow would trace it for any size), is traced again.
        """
        before = self._sizes.value
        sizes = _batch_sizes(x, batch_size or 32, split)
        shapes = tuple(tuple(leaf.shape[1:]) for leaf in tree.flatten(x)) if sizes else ()
        traced = getattr(self, "_traced_sizes", None) or _Quiet({})
        self._traced_sizes = traced
        if traced.value.get(function, (sizes, shapes)) != (sizes, shapes):
            setattr(self, function, None)
        traced.value[function] = sizes, shapes
        self._sizes.value = sizes
        try:
            yield
        finally:
            self._sizes.value = before


class _Quiet:
    """Something that Keras's tracking of attributes must not look into."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __deepcopy__(self, memo: Any) -> _Quiet:
        """Plans hold closures: a copy makes its own."""
        return _Quiet({} if isinstance(self.value, dict) and self.value and "memory" not in self.value else self.value)


def _accepted(model: Any, training: Any, mask: Any) -> dict[str, Any]:
    import inspect

    names = inspect.signature(model.call).parameters
    return {k: v for k, v in (("training", training), ("mask", mask)) if k in names and v is not None}


def _batch_sizes(x: Any, batch_size: int, split: float) -> tuple[int, ...]:
    if keras.backend.backend() != "tensorflow" or x is None:
        return ()
    leaves = tree.flatten(x)
    if not all(hasattr(leaf, "shape") and len(leaf.shape) for leaf in leaves) or not leaves:
        return ()
    total = int(leaves[0].shape[0])
    total = int(np.floor(total * (1.0 - split))) if split else total
    rest = total % batch_size
    return (
        tuple(n for n in (min(batch_size, total), rest) if n)
        if rest and total > batch_size
        else (min(batch_size, total),)
    )


def _any_batch(model: Regional, inputs: Any, training: bool) -> Any:
    """Inputs whose batch is not known (TensorFlow's traces)."""
    leaves = tree.flatten(inputs)
    for x in leaves:
        if keras.backend.backend() != "tensorflow" or any(n is None for n in x.shape[1:]):
            raise InputError(
                f"{model.name} runs region by region on inputs of known size, got shape {tuple(x.shape)}: only the "
                "batch may be open, on TensorFlow. Call it on arrays, or export it with an input_signature of the size you need"
            )
    import tensorflow as tf

    def sized(n: int) -> Any:
        fixed = tree.map_structure(lambda x: tf.ensure_shape(x, [n, *x.shape[1:]]), inputs)
        return model._run(model._prepare(fixed, training), fixed)

    def one_of(n: int) -> Any:
        """The branch for n samples. XLA compiles the other one too, for a shape that it must never see: zeros fill up."""
        total = tf.shape(leaves[0])[0]
        fixed = tree.map_structure(lambda x: _first(x, n, n), inputs)
        found = model._run(model._prepare(fixed, training), fixed)
        return tree.map_structure(lambda y: _first(y, total, max(sizes)), found)

    sizes = model._sizes.value
    if not sizes:
        if training:
            _refuse_batch_statistics(
                model, tree.map_structure(lambda x: KerasTensor((1, *x.shape[1:]), x.dtype), inputs)
            )
        one = tree.map_structure(lambda x: KerasTensor((1, *x.shape[1:]), dtype=x.dtype), inputs)
        spec = tree.map_structure(lambda o: tf.TensorSpec(o.shape[1:], o.dtype), model.compute_output_spec(one))

        def each(sample: Any) -> Any:
            return tree.map_structure(lambda y: y[0], _batch_of_one(model, sample, training))

        return tf.map_fn(each, inputs, fn_output_signature=spec, parallel_iterations=1)
    if len(sizes) == 1:
        return sized(sizes[0])
    first = tf.shape(leaves[0])[0] == sizes[0]
    return tf.cond(first, lambda: one_of(sizes[0]), lambda: one_of(sizes[1]))


def _refuse_batch_statistics(model: Regional, one: Any) -> None:
    """Samples that run one after the other have no statistics in common."""
    for node in _captured(model.untouched, one, True).graph.nodes:
        kernel = node.kernel
        if not isinstance(kernel, Reduce) or 0 not in kernel.axis:
            continue
        if isinstance(kernel.monoid, Moments) or "BatchNormalization" in node.where:
            raise InputError(
                f"{node.where or node.name} takes statistics over the batch in training, and the size of the batch is not "
                f"known while TensorFlow traces {model.name}: samples would run one after the other, each with statistics of "
                "its own. Make the size known: dataset.batch(n, drop_remainder=True), or arrays with batch_size"
            )


def _first(x: Any, count: Any, more: int) -> Any:
    """The first `count` samples of x and, where it has fewer, up to `more` of zeros."""
    import tensorflow as tf

    padded = tf.pad(x, [[0, more]] + [[0, 0]] * (len(x.shape) - 1))
    found = tf.slice(padded, [0] * len(x.shape), tf.concat([[count], tf.shape(x)[1:]], 0))
    return tf.ensure_shape(found, [count if isinstance(count, int) else None, *x.shape[1:]])


def _batch_of_one(model: Regional, sample: Any, training: bool) -> Any:
    fixed = tree.map_structure(lambda x: ops.expand_dims(x, 0), sample)
    return model._run(model._prepare(fixed, training), fixed)


def _captured(model: keras.Model, inputs: Any, training: bool) -> Captured:
    """The graph, with the dtypes that the back end really gives where double precision is about (Keras's symbolic
    tensors know 32 bits only).
    """
    specs = tree.map_structure(
        lambda x: KerasTensor(tuple(x.shape), dtype=keras.backend.standardize_dtype(x.dtype)), inputs
    )
    captured = capture(model, specs, training)
    if all(v.dtype != "float64" for v in captured.graph.values):
        return captured
    dtypes = _real_dtypes(captured.graph)
    values = tuple(
        replace(v, dtype=dtypes.get(v.index, v.dtype), itemsize=ITEMSIZE.get(dtypes.get(v.index, v.dtype), 4))
        for v in captured.graph.values
    )
    return replace(captured, graph=replace(captured.graph, values=values))


def _real_dtypes(graph: Graph) -> dict[int, str]:
    made = {v for node in graph.nodes for v in node.outputs}
    outside = [v for v in graph.values if v.index not in made]

    def every(*given: Any) -> list[Any]:
        known: dict[int, Any] = dict(zip([v.index for v in outside], given, strict=True))
        for node in graph.nodes:
            found = node.kernel.whole(*[known[v] for v in node.inputs])
            known |= zip(node.outputs, found if len(node.outputs) > 1 else (found,), strict=True)
        return [known[v] for v in sorted(made)]

    specs = keras.src.backend.compute_output_spec(every, *[KerasTensor(v.shape, dtype=v.dtype) for v in outside])
    return {v: keras.backend.standardize_dtype(s.dtype) for v, s in zip(sorted(made), specs, strict=True)}


def _external(graph: Graph, v: int, kind: str, source: Any, leaves: Sequence[Any]) -> Any:
    if kind == "input":
        return leaves[source]
    if kind == "variable":
        return ops.cast(ops.convert_to_tensor(source), graph.values[v].dtype)
    return ops.convert_to_tensor(source)


def _check(model: Regional, ready: Ready, inputs: Any, found: Any) -> None:
    """Compare a plan's first eager result with the untouched model's; it needs the untouched model's memory."""
    if ready.checked or not _eager(tree.flatten(inputs)):
        return
    ready.checked = True
    expected = model.untouched(inputs, **_accepted(model.untouched, False, None))
    for ours, theirs in zip(tree.flatten(found), tree.flatten(expected), strict=True):
        a, b = (np.asarray(ops.convert_to_numpy(ops.cast(x, "float64"))) for x in (ours, theirs))
        apart = float(np.abs(a - b).max(initial=0.0) / max(np.abs(b).max(initial=0.0), 1e-30))
        limit = {8: 1e-9, 4: 1e-4}.get(ITEMSIZE.get(keras.backend.standardize_dtype(theirs.dtype), 4), 5e-2)
        if apart > limit:
            raise VerificationError(
                f"{model.name} differs from the untouched model by {apart:.1e} of its largest value, more than {limit:.0e}, "
                f"for inputs of shape {[tuple(x.shape) for x in tree.flatten(inputs)]}: use the untouched model, and report this"
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
