"""Model -> graph: `torch.export`, then one `Node` with a region rule for each operator.

The raw export is read (not core ATen): its operators are those that the model calls. In-place operators become
new values; blocks without gradient are inlined with their outputs marked not differentiable; what has no rule
becomes an opaque node that reads whole inputs. Operators and their rules: `torch/lowering.py`. Enter at `capture`.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from traceback import walk_tb
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node as FxNode
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from ranger_nn.core.fuse import fuse
from ranger_nn.core.graph import COMPUTED, CONSTANT, INPUT, PARAMETER, Graph, Node, Rule, Value
from ranger_nn.errors import CaptureError, InputError
from ranger_nn.ops.pointwise import opaque
from ranger_nn.torch.alone import alone
from ranger_nn.torch.frozen import exported
from ranger_nn.torch.kernels import SAVES_NOTHING, Call, Fused, Kernel, Light, Opaque
from ranger_nn.torch.layout import result_layout
from ranger_nn.torch.recurrent_ops import whole_recurrences

VIEWS = {
    "slice",
    "select",
    "view",
    "reshape",
    "permute",
    "transpose",
    "squeeze",
    "unsqueeze",
    "expand",
    "narrow",
    "flatten",
    "alias",
    "detach",
    "t",
    "chunk",
    "split",
    "split_with_sizes",
    "unbind",
    "unflatten",
    "movedim",
}
SAME = {"alias", "contiguous", "lift_fresh_copy", "lift_fresh", "detach_"}


@dataclass
class Captured:
    """A graph, where its external values come from, and how its outputs are put together."""

    graph: Graph
    sources: dict[int, tuple[str, Any]]
    rebuild: Callable[[list[Any]], Any]
    output_values: list[int | Any]
    constants: list[Any] = field(default_factory=list)
    strides: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """Of each output, as the untouched network gives it."""
    text: str = ""
    """The exported program as text: operators with all their arguments."""


ORDERED = {"linear", "addmm", "mm", "bmm", "baddbmm", "matmul", "layer_norm", "native_layer_norm"}
"""Operators whose result lies in its usual order whatever that of their inputs."""


class Lower:
    """State of one capture: values made so far, and the functions that lowering rules call."""

    def __init__(self, grad: bool, autocast: torch.dtype | None = None) -> None:
        """`grad`: gradients will be asked for; `autocast`: the dtype where autocast is on."""
        self.values: list[Value] = []
        self.nodes: list[Node] = []
        self.sources: dict[int, tuple[str, Any]] = {}
        self.env: dict[FxNode, Any] = {}
        self.tuples: dict[FxNode, list[int]] = {}
        self.grad = grad
        self.autocast = autocast
        self.no_grad = 0
        self.where = ""
        self.names: dict[str, int] = {}
        self.orders: dict[int, bool] = {}
        """Values whose order in memory is known (it follows from that of what they are made of): whether it is usual."""
        self.bases: dict[int, tuple[int, FxNode]] = {}

    def value(self, name: str, like: Tensor, kind: str, differentiable: bool) -> int:
        """A new value shaped like `like`."""
        index = len(self.values)
        floating = like.dtype.is_floating_point or like.dtype.is_complex
        shape = tuple(int(s) for s in like.shape)
        self.values.append(
            Value(index, name, shape, str(like.dtype)[6:], like.element_size(), kind, floating and differentiable)
        )
        return index

    def external(self, name: str, like: Tensor, kind: str, source: tuple[str, Any], differentiable: bool) -> int:
        """A value that the caller, the module or the capture provides."""
        index = self.value(name, like, kind, differentiable and self.grad)
        self.sources[index] = source
        return index

    def shape(self, v: int) -> tuple[int, ...]:
        """Shape of a value."""
        return self.values[v].shape

    def emit(
        self,
        op: str,
        inputs: Sequence[int],
        like: Tensor | Sequence[Tensor],
        rule: Rule,
        kernel: Kernel,
        *,
        macs: int = 0,
        alias: int | None = None,
        vjp_reads: Sequence[int] | None = None,
        random: bool = False,
        differentiable: bool = True,
        vjp_outputs: Sequence[int] = (),
    ) -> Any:
        """Add a node; its output value, or a list of them where `like` is a sequence."""
        flows = differentiable and self.grad and not self.no_grad and any(self.values[i].differentiable for i in inputs)
        count = self.names.get(op, 0)
        self.names[op] = count + 1
        name = f"{op}_{count}"
        many = isinstance(like, (list, tuple))
        outs = [
            self.value(name, t, COMPUTED, flows and i not in vjp_outputs)
            for i, t in enumerate(like if many else [like])
        ]
        kept = "keeps" if rule.pointwise else kernel.layout
        before = [(len(self.values[i].shape), self.values[i].layout) for i in inputs]
        if not many and (layout := result_layout(kept, before, like)):
            self.values[outs[0]] = replace(self.values[outs[0]], layout=layout)
            kernel.channels_last = True
        kernel.dense = bool(inputs) and self.orders.get(inputs[0], False)
        made = [i for i in inputs if self.values[i].kind in (INPUT, COMPUTED)]
        if op in ORDERED or all(i in self.orders and not self.values[i].layout for i in made):
            self.orders.update((v, t.is_contiguous()) for v, t in zip(outs, like if many else [like], strict=True))
        kernel.op, kernel.pointwise = op, rule.pointwise
        if inputs:
            kernel.itemsize = self.values[inputs[0]].itemsize
            kernel.whole_bytes = self.values[inputs[0]].nbytes
        kernel.reads_channels_last = bool(inputs) and before[0][1] != ""
        free = isinstance(kernel, Light) or (isinstance(kernel, Call) and rule.pointwise and op in SAVES_NOTHING)
        every = () if free else tuple(range(len(inputs)))
        reads = every if vjp_reads is None else tuple(vjp_reads)
        self.nodes.append(
            Node(
                name,
                op,
                tuple(inputs),
                tuple(outs),
                rule,
                kernel,
                macs,
                alias,
                kernel.may_copy,
                reads,
                random=random,
                where=self.where,
                vjp_outputs=tuple(vjp_outputs),
            )
        )
        return outs if many else outs[0]


def _flatten_constants(args: Any) -> tuple[list[Any], Any]:
    return pytree.tree_flatten(args, is_leaf=lambda a: isinstance(a, FxNode))


def closure(
    lower: Lower, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Callable[..., Any], list[int]]:
    """`target` with every constant bound: a function of the tensor values, and these values in order."""
    leaves, spec = _flatten_constants((args, kwargs))
    slots, inputs, template = [], [], []
    for k, leaf in enumerate(leaves):
        if (
            isinstance(leaf, FxNode)
            and isinstance(lower.env.get(leaf), int)
            and not isinstance(leaf.meta.get("val"), (int, float, bool))
        ):
            slots.append(k)
            inputs.append(lower.env[leaf])
            template.append(None)
        else:
            template.append(_constant(lower, leaf))
    flat = not any(isinstance(a, (list, tuple, dict)) for a in args)
    if slots == list(range(len(slots))) and len(slots) == len(leaves) and not kwargs and flat:
        return target, inputs
    flat_positional = flat and not kwargs and len(leaves) == len(args)
    if flat_positional and slots == list(range(len(slots))):
        rest = template[len(slots) :]
        return (lambda *xs: target(*xs, *rest)), inputs

    def call(*xs: Any) -> Any:
        filled = list(template)
        for k, x in zip(slots, xs, strict=True):
            filled[k] = x
        a, kw = pytree.tree_unflatten(filled, spec)
        return target(*a, **kw)

    return call, inputs


class Static:
    """A Python number that a graph node stands for."""

    def __init__(self, value: Any) -> None:
        """The number."""
        self.value = value


def _constant(lower: Lower, leaf: Any) -> Any:
    if isinstance(leaf, FxNode):
        known = lower.env.get(leaf)
        return known.value if isinstance(known, Static) else leaf.meta.get("val")
    return leaf


def resolve(lower: Lower, args: Any) -> Any:
    """Arguments with graph nodes replaced by value indices wrapped as `Ref`, constants as they are."""
    return pytree.tree_map(
        lambda a: (
            Ref(lower.env[a]) if isinstance(a, FxNode) and isinstance(lower.env.get(a), int) else _constant(lower, a)
        ),
        args,
        is_leaf=lambda a: isinstance(a, FxNode),
    )


@dataclass(frozen=True)
class Ref:
    """A value of the graph among an operator's arguments."""

    index: int


def functional(target: Any) -> Any:
    """The operator that gives the result of an in-place one, or the target itself."""
    schema = target._schema
    if not schema.is_mutable or not schema.name.endswith("_"):
        return target
    packet = getattr(torch.ops.aten, schema.name.split("::")[1][:-1], None)
    return getattr(packet, target._overloadname, None) if packet is not None else None


def export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.export.ExportedProgram:
    """`torch.export`, with an error that names the line where it fails."""
    _refuse_cumulative(model)
    try:
        with warnings.catch_warnings(), whole_recurrences():
            warnings.simplefilter("ignore")
            return exported(model, lambda twin: torch.export.export(twin, args, kwargs, strict=False))
    except CaptureError:
        raise
    except Exception as error:
        line, said = _user_line(error), (str(error).strip().splitlines() or [""])[0]
        name = getattr(model, "name_in_errors", type(model).__name__)
        tensors = [a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        shapes = ", ".join(f"{tuple(a.shape)} {a.dtype}" for a in tensors)
        if isinstance(error, AssertionError) and said.startswith("Guard failed"):
            raise InputError(
                f"{name} is an archive of torch.export for inputs of one size, and refuses {shapes}: {said}. Export it "
                "again for any size, with torch.export.export(model, (x,), dynamic_shapes=({2: Dim.AUTO, 3: Dim.AUTO},)) "
                "where Dim is torch.export.Dim."
            ) from error
        if _packs(error):
            raise CaptureError(
                f"torch.export cannot capture {name}{line}: it packs or unpacks a sequence, whose lengths are data. Run the "
                "recurrence on the padded tensor and mask its result, or regionalize the modules before and after it."
            ) from error
        if _refuses_input(error):
            raise InputError(
                f"{name} refuses inputs {shapes}{line}: {said}. "
                "Give inputs of the rank, size and dtype that the untouched model takes."
            ) from error
        raise CaptureError(
            f"torch.export cannot capture {name}{line}: {type(error).__name__}: {said}. A region-wise program needs a graph "
            "that does not depend on the data: replace a Python branch or loop on tensor values by torch.where or "
            "torch.cond, or regionalize the sub-module that has none."
        ) from error


def _refuse_cumulative(model: nn.Module) -> None:
    for name, module in model.named_modules():
        running = isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
        if running and module.training and module.momentum is None:
            raise CaptureError(
                f"{name or type(model).__name__} is a batch norm with momentum=None in training mode: its cumulative "
                "average divides by the counter num_batches_tracked, a number that torch.export cannot capture. Give it "
                "a momentum (0.1 is the usual one), or put the module in eval() mode."
            )


def _refuses_input(error: BaseException) -> bool:
    """True where the model itself would fail on such an input: a shape or dtype that does not fit."""
    text = str(error).lower()
    if "data-dependent" in text or "unbacked" in text or "torch.cond" in text:
        return False
    words = ("expected", "must match", "should be", "size", "shape", "dtype", "channels", "got input")
    return isinstance(error, (RuntimeError, ValueError, IndexError, TypeError)) and any(w in text for w in words)


def _packs(error: BaseException) -> bool:
    frames = [frame for frame, _ in walk_tb(error.__traceback__)]
    return any(isinstance(x, PackedSequence) for frame in frames for x in frame.f_locals.values())


def _user_line(error: BaseException) -> str:
    import traceback

    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if "/torch/" not in f.filename and "ranger_nn" not in f.filename
    ]
    return f" at {frames[-1].filename}:{frames[-1].lineno} ({frames[-1].line})" if frames else ""


def capture(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, *, grad: bool) -> Captured:
    """Graph of `model` at the shapes of `args` (tensors, real or fake), in its present mode.

    Raises CaptureError where `torch.export` cannot, InputError where the model writes into its input.
    """
    kwargs = kwargs or {}
    with alone():
        program = export(model, args, kwargs)
        try:
            captured = _lower_program(model, program, Lower(grad))
        except AliasError:
            program = program.run_decompositions({})
            captured = _lower_program(model, program, Lower(grad))
    return replace(captured, strides=_output_strides(program, captured))


def _output_strides(program: Any, captured: Captured) -> dict[int, tuple[int, ...]]:
    """Of each output value, as the untouched network gives it."""
    last = next(n for n in program.graph.nodes if n.op == "output")
    args = [
        a
        for s, a in zip(program.graph_signature.output_specs, last.args[0], strict=True)
        if s.kind.name == "USER_OUTPUT"
    ]
    tensors = [a.meta["val"] for a in args if isinstance(a, FxNode) and isinstance(a.meta.get("val"), Tensor)]
    return {v: tuple(map(int, t.stride())) for v, t in zip(captured.output_values, tensors, strict=True)}


class AliasError(Exception):
    """An in-place write through a view that the simple treatment does not cover."""


def _lower_program(model: nn.Module, program: Any, lower: Lower) -> Captured:
    signature = program.graph_signature
    specs = {s.arg.name: s for s in signature.input_specs if hasattr(s.arg, "name")}
    inputs: list[int] = []
    user = [s.arg.name for s in signature.input_specs if s.kind.name == "USER_INPUT" and hasattr(s.arg, "name")]
    mutated = set(signature.user_inputs_to_mutate.values())
    flat_index = 0
    for node in program.graph.nodes:
        if node.op != "placeholder":
            continue
        spec, like = specs.get(node.name), node.meta.get("val")
        kind = spec.kind.name if spec else "USER_INPUT"
        if kind == "USER_INPUT":
            if isinstance(like, Tensor):
                v = lower.external(node.name, like, INPUT, ("input", flat_index), bool(like.requires_grad))
                inputs.append(v)
                lower.env[node] = v
            else:
                lower.env[node] = Static(like)
            flat_index += 1
            if node.name in mutated:
                _refuse_mutation(model, node.name)
            continue
        if not isinstance(like, Tensor):
            lower.env[node] = Static(like)
            continue
        if kind in ("PARAMETER", "BUFFER") and (
            kind == "PARAMETER" or spec.persistent is not False or _has(model, spec.target)
        ):
            source = ("state", spec.target)
        else:
            source = ("constant", program.constants[spec.target])
        trained = _requires_grad(model, spec.target) if source[0] == "state" else source[1].requires_grad
        lower.env[node] = lower.external(
            node.name, like, PARAMETER if kind == "PARAMETER" else CONSTANT, source, trained
        )
    lower_nodes(model, program.graph, lower, program.graph_module, set(user))
    last = next(n for n in program.graph.nodes if n.op == "output")
    leaves: list[Any] = []
    for spec, arg in zip(signature.output_specs, last.args[0], strict=True):
        if spec.kind.name == "USER_OUTPUT":
            known = lower.env.get(arg) if isinstance(arg, FxNode) else Static(arg)
            leaves.append(known if isinstance(known, int) else getattr(known, "value", known))
            if isinstance(known, int):
                leaves[-1] = Ref(known)
        elif spec.kind.name == "BUFFER_MUTATION" and isinstance(arg, FxNode):
            raise CaptureError(
                f"{type(model).__name__} writes into its buffer {spec.target!r} through a view: a region-wise program "
                "cannot repeat that. Update the buffer outside of forward, or in place on the whole buffer."
            )
    outputs = [leaf.index for leaf in leaves if isinstance(leaf, Ref)]
    out_spec = program.call_spec.out_spec

    def rebuild(tensors: list[Any]) -> Any:
        found = iter(tensors)
        return pytree.tree_unflatten([next(found) if isinstance(leaf, Ref) else leaf for leaf in leaves], out_spec)

    for lowered in lower.nodes:
        lowered.kernel.given = any(v in outputs for v in lowered.outputs)
    graph = Graph(
        type(model).__name__, tuple(lower.values), tuple(lower.nodes), tuple(inputs), tuple(dict.fromkeys(outputs))
    )
    parts = [m.code for m in program.graph_module.modules() if hasattr(m, "code")]
    return Captured(fuse(graph, Fused), lower.sources, rebuild, outputs, text="\n".join(map(str, parts)))


def _refuse_mutation(model: nn.Module, name: str) -> None:
    raise InputError(
        f"{type(model).__name__} writes into its input {name!r} in place: regions read the input more than once, so it "
        "must stay as it is. Clone it at the start of forward (x = x.clone()), or use the out-of-place operator."
    )


def _has(model: nn.Module, target: str) -> bool:
    try:
        model.get_buffer(target)
    except AttributeError:
        return False
    return True


def _requires_grad(model: nn.Module, target: str) -> bool:
    owner, _, name = target.rpartition(".")
    try:
        return bool(getattr(model.get_submodule(owner), name).requires_grad)
    except AttributeError:
        return True


def lower_nodes(model: nn.Module | None, graph: Any, lower: Lower, owner: nn.Module, user: set[str]) -> None:
    """Lower a graph whose placeholders are known."""
    from ranger_nn.torch.lowering import lower_operator

    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if node.op == "get_attr":
            found: Any = owner
            for part in str(node.target).split("."):
                found = getattr(found, part)
            if isinstance(found, Tensor):
                lower.env[node] = lower.external(node.name, found, CONSTANT, ("constant", found), found.requires_grad)
            else:
                lower.env[node] = found
            continue
        stack = node.meta.get("nn_module_stack") or {}
        lower.where = next(reversed(stack.values()))[0] if stack else ""
        name = str(node.target)
        if "wrap_with_set_grad_enabled" in name or "wrap_with_autocast" in name:
            _inline(model, node, lower, user)
        elif node.target is operator.getitem:
            source = node.args[0]
            known = lower.tuples.get(source)
            if known is None:
                raise CaptureError(f"cannot follow {node.format_node()}")
            lower.env[node] = known[node.args[1]]
        elif not isinstance(node.meta.get("val"), (Tensor, list, tuple)):
            lower.env[node] = Static(node.meta.get("val"))
        else:
            _lower_call(model, node, lower, lower_operator, user)


def _lower_call(model: nn.Module, node: FxNode, lower: Lower, lower_operator: Any, user: set[str]) -> None:
    target: Any = node.target
    mutable = hasattr(target, "_schema") and target._schema.is_mutable
    base = node.args[0] if node.args else None
    if mutable and isinstance(base, FxNode) and isinstance(lower.env.get(base), int):
        kind = lower.values[lower.env[base]].kind
        if kind == INPUT or _root(base).name in user:
            _refuse_mutation(model, base.name)
        if kind in (CONSTANT, PARAMETER):
            if not _buffer_update(node, lower):
                raise CaptureError(f"{type(model).__name__} writes in place into {base.name}: {node.format_node()}")
            return
    plain = functional(target) if mutable else target
    if plain is None or (mutable and plain is target and "batch_norm" not in str(target)):
        raise CaptureError(f"{type(model).__name__}: no functional form of in-place {target}")
    result = lower_operator(lower, node, plain)
    if isinstance(result, list):
        lower.tuples[node] = result
    lower.env[node] = result
    if mutable and isinstance(base, FxNode) and not isinstance(result, list):
        _rebind(base, node, lower)


def _root(node: FxNode) -> FxNode:
    while _op(node) in VIEWS | SAME and isinstance(node.args[0], FxNode):
        node = node.args[0]
    return node


def _op(node: FxNode) -> str:
    return node.target._schema.name.split("::")[1] if hasattr(node.target, "_schema") else ""


def _rebind(base: FxNode, node: FxNode, lower: Lower) -> None:
    """After an in-place write into `base`: every name of the same memory means the new value."""
    from ranger_nn.torch.lowering import scatter

    written = lower.env[node]
    names = list(lower.env)
    if _op(base) not in VIEWS | SAME or base.op == "placeholder":
        old = lower.env[base]
        for other in names:
            if lower.env[other] == old and isinstance(old, int):
                lower.env[other] = written
        later = [n for n in _views_of(base) if any(u._sort_key > node._sort_key for u in n.users)]
        if any(n._sort_key < node._sort_key for n in later):
            raise AliasError
        return
    lower.env[base] = written
    if not _read_later(base, node):
        return
    view = base
    while _op(view) in VIEWS | SAME:
        parent = view.args[0]
        value = scatter(lower, lower.env[parent], lower.env[view], view) if _op(view) not in SAME else lower.env[view]
        if value is None:
            raise AliasError
        old = lower.env[parent]
        for other in names:
            if isinstance(old, int) and lower.env[other] == old:
                lower.env[other] = value
        siblings = [
            n
            for n in parent.users
            if n is not view
            and n is not base
            and _op(n) in VIEWS
            and n._sort_key < node._sort_key
            and any(u._sort_key > node._sort_key for u in n.users)
        ]
        if siblings:
            raise AliasError
        view = parent


def _read_later(base: FxNode, node: FxNode) -> bool:
    """True where memory that `node` writes is read afterwards through another name than `base`."""
    names = [n for n in (_root(base), *_views_of(_root(base))) if n is not base]
    return any(u._sort_key > node._sort_key for n in names for u in n.users if u is not node)


def _views_of(node: FxNode) -> list[FxNode]:
    found, todo = [], [node]
    while todo:
        for user in todo.pop().users:
            if _op(user) in VIEWS:
                found.append(user)
                todo.append(user)
    return found


def _buffer_update(node: FxNode, lower: Lower) -> bool:
    """An in-place operator on a buffer: a step with a side effect, run once per forward."""
    call, inputs = closure(lower, node.target, node.args, node.kwargs)

    def run(*xs: Any) -> Tensor:
        with torch.no_grad():
            call(*xs)
        return torch.zeros(1)

    rule = opaque([lower.shape(i) for i in inputs], "updates a buffer")
    lower.emit("update_buffer", inputs, torch.zeros(1), rule, Opaque(run), random=True, differentiable=False)
    lower.env[node] = lower.env[node.args[0]]
    return True


def _inline(model: nn.Module, node: FxNode, lower: Lower, user: set[str]) -> None:
    arguments = list(node.args)
    position = next(i for i, a in enumerate(arguments) if isinstance(a, FxNode) and a.op == "get_attr")
    body = lower.env[arguments[position]]
    grad_off = "set_grad_enabled" in str(node.target) and arguments[0] is False
    if "wrap_with_autocast" in str(node.target) and not _autocast_off(arguments[:position]):
        raise CaptureError(
            f"{type(model).__name__} switches autocast on inside of forward: put the autocast block around the call"
        )
    places = [n for n in body.graph.nodes if n.op == "placeholder"]
    for inner, outer in zip(places, arguments[position + 1 :], strict=True):
        lower.env[inner] = lower.env[outer] if isinstance(outer, FxNode) else Static(outer)
        if isinstance(outer, FxNode) and outer in lower.tuples:
            lower.tuples[inner] = lower.tuples[outer]
    lower.no_grad += grad_off
    lower_nodes(model, body.graph, lower, body, user)
    lower.no_grad -= grad_off
    last = next(n for n in body.graph.nodes if n.op == "output")
    results = last.args[0] if isinstance(last.args[0], (list, tuple)) else [last.args[0]]
    lower.tuples[node] = [lower.env[r] if isinstance(r, FxNode) else Static(r) for r in results]
    lower.env[node] = lower.tuples[node]


def _autocast_off(arguments: Sequence[Any]) -> bool:
    return any(a is False for a in arguments)


def macs_of(shape: Sequence[int], per_element: int) -> int:
    """Multiply-adds: elements of the output times work per element."""
    return prod(shape) * per_element
