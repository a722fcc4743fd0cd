"""What Keras keeps to itself and the adapter cannot do without: every such name is here, with its reason.

Keras records calls, attaches masks and casts Variables by names that begin with an underscore or live in `keras.src`,
and they may change with any version. One that is gone is an error that says which versions have it. Nothing else in the
adapter uses such a name (`loops_tensorflow.py` uses two of TensorFlow's, `convolve.py` one). Enter anywhere.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np

from ranger_nn.errors import MissingExtraError

SUPPORTED = "keras>=3.15"
"""As in pyproject.toml."""


def _private(owner: Any, path: str) -> Any:
    """An attribute, by a dotted path."""
    found = owner
    for name in path.split("."):
        try:
            found = getattr(found, name)
        except AttributeError as error:
            raise MissingExtraError(
                f"ranger_nn goes by {getattr(owner, '__name__', type(owner).__name__)}.{path} of Keras, which Keras "
                f"{keras.__version__} does not have: it is supported on {SUPPORTED}, tested on 3.15. Install one of these"
            ) from error
    return found


# ------------------------------------------------------------------------- calls that Keras recorded


def calls_into(operation: Any) -> list[Any]:
    """Recorded calls of a layer or operation: capture reads them, and takes its own away again."""
    return list(_private(operation, "_inbound_nodes"))


def recorded(operation: Any) -> tuple[Any, int, int]:
    """How many calls of an operation, and of its results, are recorded: see `forget`."""
    return operation, len(_private(operation, "_inbound_nodes")), len(_private(operation, "_outbound_nodes"))


def forget(operation: Any, inbound: int, outbound: int) -> None:
    """Take away what was recorded since `recorded`: there is no public way to trace a layer without leaving nodes on it."""
    del _private(operation, "_inbound_nodes")[inbound:]
    del _private(operation, "_outbound_nodes")[outbound:]


def history(tensor: Any) -> Any:
    """The call that made a symbolic tensor, or None for one that Keras did not record."""
    found = getattr(tensor, "_keras_history", None)
    if found is None or found.operation is None:
        return None
    return calls_into(found.operation)[found.node_index]


def layers_of(layer: Any) -> list[Any]:
    """A layer and every layer inside: `Model.layers` goes one level deep, and layers have no such list."""
    return list(_private(layer, "_flatten_layers")())


def seeds_of(layer: Any) -> list[Any]:
    """The variables that random layers inside draw from."""
    return [g.state for sub in layers_of(layer) for g in _private(sub, "_seed_generators")]


@contextlib.contextmanager
def readable(variables: Sequence[Any]) -> Iterator[None]:
    """On JAX `fit` takes the values out of Variables while it is traced, and a layer without `compute_output_shape` reads
    them to infer its shape: zeros stand in. No number enters a capture, which would refuse it.
    """
    empty = [v for v in variables if keras.backend.backend() == "jax" and _private(v, "_value") is None]
    for v in empty:
        v._value = np.broadcast_to(np.zeros((), keras.backend.standardize_dtype(v.dtype)), v.shape)
    try:
        yield
    finally:
        for v in empty:
            v._value = None


@contextlib.contextmanager
def as_they_were(layers: Sequence[Any]) -> Iterator[None]:
    """Tensors that layers put into their attributes while Keras infers their shapes are taken away again, and what they
    appended to lists; layers and Variables that they build stay.
    """
    before = [(layer, dict(vars(layer)), _lists(layer)) for layer in layers]
    try:
        yield
    finally:
        for layer, attributes, lists in before:
            held = vars(layer)
            for name in [n for n, now in held.items() if now is not attributes.get(n, held) and _tensors(now)]:
                if name in attributes:
                    held[name] = attributes[name]
                else:
                    del held[name]
            for now, content in lists:
                same = len(now) == len(content) and all(map(operator.is_, now, content))
                # TensorFlow saves no list of layers that was ever assigned to
                if not same and not any(isinstance(x, (keras.Layer, keras.Variable)) for x in now[len(content) :]):
                    now[:] = content


def _lists(layer: Any) -> list[tuple[Any, list[Any]]]:
    return [(v, list(v)) for n, v in vars(layer).items() if isinstance(v, list) and n not in BOOKKEEPING]


def _tensors(x: Any) -> bool:
    """Whether there are tensors in it, symbolic or not."""
    return any(isinstance(leaf, keras.KerasTensor) or keras.ops.is_tensor(leaf) for leaf in keras.tree.flatten(x))


# ------------------------------------------------------------------------------- the context of calls


BOOKKEEPING = frozenset(
    [
        "_allow_non_tensor_positional_args",
        "_auto_config",
        "_backward_hooks",
        "_backward_pre_hooks",
        "_buffers",
        "_build_shapes_dict",
        "_call_context_args",
        "_call_has_context_arg",
        "_call_has_mask_arg",
        "_call_has_training_arg",
        "_call_signature",
        "_called",
        "_compile_config",
        "_compile_loss",
        "_compile_metrics",
        "_compiled_trainable_state",
        "_compute_loss_has_training_arg",
        "_distribute_strategy",
        "_eval_epoch_iterator",
        "_forward_hooks_always_called",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks_with_kwargs",
        "_inbound_nodes",
        "_initial_epoch",
        "_input_spec",
        "_inputs",
        "_inputs_struct",
        "_is_full_backward_hook",
        "_jax_state",
        "_jax_state_synced",
        "_jit_compile",
        "_layers",
        "_load_state_dict_post_hooks",
        "_load_state_dict_pre_hooks",
        "_lock",
        "_loss_ids",
        "_loss_tracker",
        "_losses",
        "_losses_override",
        "_metrics",
        "_nodes",
        "_nodes_by_depth",
        "_non_persistent_buffers_set",
        "_non_trainable_variables",
        "_operations_by_depth",
        "_outbound_nodes",
        "_outputs",
        "_outputs_struct",
        "_parameters",
        "_parent_path",
        "_path",
        "_remat_mode",
        "_run_eagerly",
        "_saved_model_arg_spec",
        "_saved_model_inputs_spec",
        "_seed_generators",
        "_self_name_based_restores",
        "_self_saveable_object_factories",
        "_self_setattr_tracking",
        "_self_unconditional_checkpoint_dependencies",
        "_self_unconditional_deferred_dependencies",
        "_self_unconditional_dependency_names",
        "_self_update_uid",
        "_state_dict_hooks",
        "_state_dict_pre_hooks",
        "_torch_params",
        "_tracked",
        "_tracker",
        "_trainable_variables",
        "build",
        "built",
        "call_signature_parameters",
        "compiled",
        "history",
        "loss",
        "name",
        "optimizer",
        "output_names",
        "predict_function",
        "quantize",
        "steps_per_execution",
        "stop_evaluating",
        "stop_predicting",
        "stop_training",
        "test_function",
        "train_function",
        "training",
        "unrolled_steps_per_execution",
    ]
)
"""Attributes in which Keras and the back end keep what no `call` reads, or what stands in other attributes as well."""

_OF_MODELS = frozenset(
    [
        "_inputs",
        "_inputs_struct",
        "_outputs",
        "_outputs_struct",
        "_nodes",
        "_nodes_by_depth",
        "_operations_by_depth",
        "compiled",
        "history",
        "loss",
        "optimizer",
        "output_names",
        "predict_function",
        "steps_per_execution",
        "stop_evaluating",
        "stop_predicting",
        "stop_training",
        "test_function",
        "train_function",
        "unrolled_steps_per_execution",
        "_run_eagerly",
        "_jit_compile",
        "_initial_epoch",
    ]
)
"""Those of them that only models have: a layer's attribute of such a name is its user's."""


@functools.cache
def bookkeeping(cls: Any, users: bool) -> frozenset[str]:
    """Attributes of a layer of this class that no `call` reads; `users`: whether some of its code is not a library's."""
    if not issubclass(cls, keras.Operation):
        return frozenset()
    found = (BOOKKEEPING if issubclass(cls, keras.Model) else BOOKKEEPING - _OF_MODELS) - {"name"}
    return found - {"training"} if users else found


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Where PyTorch keeps what is called around a layer."""


def hooked(layer: Any) -> bool:
    """Whether PyTorch calls something around this layer."""
    return any(vars(layer).get(name) for name in HOOKS)


class Context:
    """What Keras hands from layer to layer while a call is traced, and what it handed to each.

    Keras gives a layer the mode that it is called with, else that of the layer called before it (not: around it), else the
    default of its `call`. Here that is Keras's own work; this only writes it down: `modes` has the mode of each call, by
    layer and number of the call among those recorded.
    """

    def __init__(self, training: Any, before: Callable[[], Any], after: Callable[[Any], None]) -> None:
        """`before` and `after` a call of a layer that is called directly: `after` takes what `before` gave."""
        self.training, self.modes = training, {}  # type: Any, dict[tuple[int, int], Any]
        self._open: list[Any] = []
        self._before, self._after, self._given = before, after, None

    @property
    def entry_layer(self) -> Context:
        """Asked for when a call ends: see `__eq__`."""
        return self

    def get_value(self, name: str, default: Any = None) -> Any:
        """As Keras's own."""
        return getattr(self, name, default)

    def set_value(self, name: str, value: Any) -> None:
        """As Keras's own: a call begins."""
        setattr(self, name, value)
        if name == "training":
            if not self._open:
                self._given = self._before()
            self._open.append(value)

    def __eq__(self, layer: object) -> bool:
        """Keras asks whether the call that ends is the outermost one; it never is."""
        if self._open:
            value = self._open.pop()
            if not self._open:
                self.modes[id(layer), len(_private(layer, "_inbound_nodes"))] = value
                self._after(self._given)
        return False

    __hash__ = None  # type: ignore[assignment]


@contextlib.contextmanager
def calling(context: Context) -> Iterator[None]:
    """Layers called inside take their mode from `context`, not from a call around."""
    state = _private(keras, "src.backend.common.global_state")
    outer = state.get_global_attribute("current_call_ctx")
    state.set_global_attribute("current_call_ctx", context)
    try:
        yield
    finally:
        state.set_global_attribute("current_call_ctx", outer)


def mode_of(context: Context, node: Any) -> Any:
    """The mode of a recorded call of a layer."""
    return context.modes.get((id(node.operation), calls_into(node.operation).index(node)))


# --------------------------------------------------------------------------------------------- masks


def get_mask(tensor: Any) -> Any:
    """The mask attached to a tensor, or None."""
    return _private(keras, "src.backend.get_keras_mask")(tensor)


def set_mask(tensor: Any, mask: Any) -> None:
    """Attach a mask: the loss and later layers read it there, and public Keras only attaches what `compute_mask` gives."""
    _private(keras, "src.backend.set_keras_mask")(tensor, mask)


# -------------------------------------------------------------------------------------------- dtypes


def casts(variable: Any) -> bool:
    """Whether a mixed policy casts this Variable where a layer reads it (statistics of a normalisation stay as they are)."""
    return bool(_private(variable, "_autocast"))


def converts_inputs(layer: Any) -> bool:
    """Whether a layer casts its inputs to its compute dtype (preprocessing and embedding layers do not)."""
    return bool(_private(layer, "_convert_input_args"))


def cast_to(dtype: str) -> contextlib.AbstractContextManager[Any]:
    """Variables are read in `dtype`, as in a layer of a mixed policy."""
    scope: contextlib.AbstractContextManager[Any] = _private(keras, "src.backend.AutocastScope")(dtype)
    return scope


@contextlib.contextmanager
def torch_device() -> Iterator[None]:
    """PyTorch's device of the process: Keras may be on the meta device, where it only builds."""
    from keras.src.backend.torch import core

    with keras.device(_private(core, "DEFAULT_DEVICE")):
        yield


@contextlib.contextmanager
def shapes_of_repeat() -> Iterator[None]:
    """Keras's `repeat` (of `UpSampling2D`, too) fails on PyTorch's meta device, where shapes are inferred; Keras then infers them
    with tensors of the whole size, as large as the untouched model's. Inside, it knows the meta device.
    """
    if keras.backend.backend() != "torch":
        yield
        return
    import torch
    from keras.src.backend.torch import numpy as module

    plain = _private(module, "repeat")

    def repeat(x: Any, repeats: Any, axis: int | None = None) -> Any:
        if isinstance(x, torch.Tensor) and x.is_meta and isinstance(repeats, int):
            return torch.repeat_interleave(x, repeats, dim=axis)
        return plain(x, repeats, axis)

    module.repeat = repeat
    try:
        yield
    finally:
        module.repeat = plain
