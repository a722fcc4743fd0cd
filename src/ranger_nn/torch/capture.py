"""Model -> graph: `torch.export`, then one `Node` with a region rule for each operator.

The raw export is read (not core ATen): its operators are those that the model calls. In-place operators become
new values; blocks without gradient are inlined with their outputs marked not differentiable; what has no rule
becomes an opaque node that reads whole inputs. Operators and their rules: `torch/lowering.py`. Enter at `capture`.
"""

from __future__ import annotations

import operator
import os
import re
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from traceback import walk_tb
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node as FxNode
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

import ranger_nn
from ranger_nn.bounds.scans import settled
from ranger_nn.core.fuse import fuse
from ranger_nn.core.graph import CONSTANT, INPUT, PARAMETER, Graph
from ranger_nn.errors import CaptureError, InputError
from ranger_nn.ops.pointwise import opaque
from ranger_nn.torch.aliases import block_of, find_aliases, is_block, op_name, running, written
from ranger_nn.torch.alone import alone
from ranger_nn.torch.environment import unchanged, watched
from ranger_nn.torch.fast_paths import as_called
from ranger_nn.torch.folding import Folding
from ranger_nn.torch.frozen import exported
from ranger_nn.torch.inplace import (
    Writes,
    functional,
    lower_many_on_copies,
    lower_on_a_copy,
    refuse_mutation,
    same_result,
)
from ranger_nn.torch.inputs import misfit
from ranger_nn.torch.kernels import Fused, Opaque
from ranger_nn.torch.lower import Lower, Ref, Static, closure
from ranger_nn.torch.lowering import lower_operator
from ranger_nn.torch.recurrent_ops import WholeRecurrences
from ranger_nn.torch.tracing import Aside, Looking, same_input

SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)
NOT_THE_USERS = tuple(os.path.dirname(str(module.__file__)) + os.sep for module in (torch, ranger_nn))
"""Folders whose lines an error does not name."""


@dataclass
class Captured:
    """A graph, where its external values come from, and how its outputs are put together."""

    graph: Graph
    sources: dict[int, tuple[str, Any]]
    rebuild: Callable[[list[Any]], Any]
    output_values: list[int | Any]
    folded: list[tuple[tuple[str, Any], Tensor]] = field(default_factory=list)
    """Sources of constants of which numbers were taken, and the values that they had then."""
    environment: dict[str, str | None] = field(default_factory=dict)
    """Variables of the environment that forward read."""
    strides: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """Of each output, as the untouched network gives it."""
    text: str = ""
    """The exported program as text: operators with all their arguments."""

    def holds(self, model: nn.Module) -> bool:
        """Whether the constants of which numbers were taken still have these values, and variables of the environment."""
        same = all(_equal(read_source(model, source), value) for source, value in self.folded)
        return same and unchanged(self.environment)


def read_source(model: nn.Module, source: tuple[str, Any]) -> Tensor:
    """The tensor of a source that is no input."""
    kind, where = source
    if kind != "state":
        return where
    owner, _, name = where.rpartition(".")
    found: Tensor = getattr(model.get_submodule(owner), name)
    return found


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.detach().to(b.device), b)


def export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], folding: Folding, grad: bool
) -> torch.export.ExportedProgram:
    """`torch.export`, with an error that names the line where it fails."""
    _refuse_norms(model)

    def traced(twin: nn.Module) -> torch.export.ExportedProgram:
        folding.model = twin
        with as_called(twin), same_input(twin, args, kwargs):
            return torch.export.export(twin, args, kwargs, strict=False)

    looking, recurrences = Looking(model, grad), WholeRecurrences()  # which runs some, outside of all modes
    try:
        with warnings.catch_warnings(), looking.on(), Aside(looking, recurrences, folding):
            warnings.simplefilter("ignore")
            return exported(model, traced, folding.very)
    except CaptureError:
        raise
    except Exception as error:
        line, said = _user_line(error), (str(error).strip().splitlines() or [""])[0]
        name = getattr(model, "name_in_errors", type(model).__name__)
        tensors = [a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        shapes = ", ".join(f"{tuple(a.shape)} {a.dtype}" for a in tensors)
        if isinstance(error, TypeError) and (wrong := misfit(model, args, kwargs)):
            raise InputError(f"{name} was {wrong}.") from error
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
        if "a leaf Variable that requires grad" in said:
            raise InputError(
                f"{name} writes in place into an input or a parameter{line}: regions read it more than once, so it must "
                "stay as it is. Clone it first (x = x.clone()), or use the out-of-place operator."
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


def _refuse_norms(model: nn.Module) -> None:
    names: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        running = isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
        first = names.setdefault(id(module), name)
        if running and module.training and first != name:
            raise CaptureError(
                f"{type(model).__name__} registers one batch norm under two names, {first} and {name}, in training mode: "
                "torch.export makes two of its running statistics. Register it once and call it twice, or put it in eval() "
                "mode."
            )
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
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((*NOT_THE_USERS, "<"))]
    return f" at {frames[-1].filename}:{frames[-1].lineno} ({frames[-1].line})" if frames else ""


def capture(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, *, grad: bool) -> Captured:
    """Graph of `model` at the shapes of `args` (tensors, real or fake), in its present mode.

    Raises CaptureError where `torch.export` cannot, InputError where the model writes into its input.
    """
    kwargs = kwargs or {}
    with alone():
        folding = Folding(model)
        with watched() as environment:
            program = export(model, args, kwargs, folding, grad)
        _refuse_data_dependent(model, program.graph_module)
        captured = _lower_program(model, program, Lower(grad), folding)
    found = list(folding.folded.values())
    return replace(captured, strides=_output_strides(program, captured), folded=found, environment=environment)


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


def _refuse_data_dependent(model: nn.Module, owner: Any) -> None:
    """Sizes, or numbers, that only a run can tell: a program decides all of them before it runs."""
    for node in owner.graph.nodes:
        if node.op == "get_attr" and hasattr(body := getattr(owner, str(node.target), None), "graph"):
            _refuse_data_dependent(model, body)
        if type(node.meta.get("val")).__name__ in ("CustomObjArgument", "FakeScriptObject") and node.users:
            raise CaptureError(
                f"{type(model).__name__}{_traced_line(next(iter(node.users)))} uses {node.name}, an object that is no tensor "
                "(such as a torch.Generator of its own): a plan cannot hold it. Draw from the global generator, or draw "
                "outside and pass the numbers as an input."
            )
        likes = [t for t in pytree.tree_leaves(node.meta.get("val")) if isinstance(t, Tensor)]
        numbers = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), SYMBOLS)]
        if any(isinstance(s, SYMBOLS) for t in likes for s in t.shape) or (likes and numbers):
            asked = numbers[0] if numbers else node
            raise CaptureError(
                f"{type(model).__name__}{_traced_line(asked) or _traced_line(node)}: the result of "
                f"{op_name(asked) or asked.target} depends on the data that it is given. A program of regions is made "
                "before it sees data: use torch.where, a mask or a fixed number of elements (topk), or regionalize the "
                "part of the network before it."
            )


def _traced_line(node: FxNode) -> str:
    """The last line of the user's code in a traced node's stack."""
    lines = str(node.meta.get("stack_trace") or "").strip().splitlines()
    ours = tuple(f'File "{folder}' for folder in NOT_THE_USERS)
    places = [k for k, x in enumerate(lines) if x.strip().startswith("File ") and not x.strip().startswith(ours)]
    if not places:
        return ""
    said = lines[places[-1] + 1].strip() if places[-1] + 1 < len(lines) else ""
    place = re.search(r'"(.*)", line (\d+)', lines[places[-1]])
    return f" at {place[1]}:{place[2]} ({said})" if place else ""


def _lower_program(model: nn.Module, program: Any, lower: Lower, folding: Folding) -> Captured:
    aliases = find_aliases(program.graph_module)
    lower.writes = Writes(lower, aliases, type(model).__name__, partial(lower_again, lower))
    lower.parts, lower.constant = partial(lower_parts, lower), folding.numbers
    inputs = _lower_placeholders(model, program, lower, folding)
    lower_nodes(model, program.graph, lower, program.graph_module)
    leaves = _leaves(program, lower)
    lower.writes.finish()
    outputs = [leaf.index for leaf in leaves if isinstance(leaf, Ref)]
    out_spec = program.call_spec.out_spec

    def rebuild(tensors: list[Any]) -> Any:
        found = iter(tensors)
        return pytree.tree_unflatten([next(found) if isinstance(leaf, Ref) else leaf for leaf in leaves], out_spec)

    nodes = lower.writes.live(lower.nodes, set(outputs))
    for lowered in nodes:
        lowered.kernel.given = any(v in outputs for v in lowered.outputs)
    graph = Graph(type(model).__name__, tuple(lower.values), tuple(nodes), tuple(inputs), tuple(dict.fromkeys(outputs)))
    parts = [m.code for m in program.graph_module.modules() if hasattr(m, "code")]
    graph = settled(fuse(graph, Fused), carries=not lower.grad)
    return Captured(graph, lower.sources, rebuild, outputs, text="\n".join(map(str, parts)))


def _lower_placeholders(model: nn.Module, program: Any, lower: Lower, folding: Folding) -> list[int]:
    """Values for inputs, parameters, buffers and constants; those of the inputs."""
    specs = {s.arg.name: s for s in program.graph_signature.input_specs if hasattr(s.arg, "name")}
    inputs: list[int] = []
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
        elif isinstance(like, Tensor):
            _lower_state(model, program, node, spec, lower, folding)
        else:
            lower.env[node] = Static(like)
        lower.writes.made(node)
    return inputs


def _lower_state(model: nn.Module, program: Any, node: FxNode, spec: Any, lower: Lower, folding: Folding) -> None:
    like, parameter = node.meta["val"], spec.kind.name == "PARAMETER"
    if parameter or (spec.kind.name == "BUFFER" and (spec.persistent is not False or _has(model, spec.target))):
        source: tuple[str, Any] = ("state", spec.target)
        trained = _requires_grad(model, spec.target)
    else:
        source = ("constant", program.constants[spec.target])
        trained = source[1].requires_grad
    kind = PARAMETER if parameter else CONSTANT
    lower.env[node] = lower.external(node.name, like, kind, source, trained)
    lower.writes.hold(node)


def _leaves(program: Any, lower: Lower) -> list[Any]:
    """What forward gives, flat: `Ref`s to values, everything else as it is."""
    last = next(n for n in program.graph.nodes if n.op == "output")
    leaves: list[Any] = []
    for spec, arg in zip(program.graph_signature.output_specs, last.args[0], strict=True):
        if spec.kind.name != "USER_OUTPUT":
            continue
        if isinstance(arg, FxNode):
            lower.writes.refresh(arg)
        known = lower.env.get(arg) if isinstance(arg, FxNode) else Static(arg)
        if isinstance(arg, FxNode) and (buffer := lower.writes.buffer(arg)) is not None:
            known = buffer  # forward gives the buffer itself
        leaves.append(Ref(known) if isinstance(known, int) else getattr(known, "value", known))
    return leaves


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


def lower_nodes(model: nn.Module | None, graph: Any, lower: Lower, owner: nn.Module) -> None:
    """Lower a graph whose placeholders are known."""
    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if node.op == "get_attr":
            _lower_attribute(node, lower, owner)
            continue
        for read in node.all_input_nodes:
            lower.writes.refresh(read)
        stack = node.meta.get("nn_module_stack") or {}
        lower.where = next(reversed(stack.values()))[0] if stack else ""
        if is_block(node):
            _inline(model, node, lower, owner)
        elif node.target is operator.getitem:
            source = node.args[0]
            known = lower.tuples.get(source)
            if known is None:
                raise CaptureError(f"cannot follow {node.format_node()}")
            lower.env[node] = known[node.args[1]]
        elif not isinstance(node.meta.get("val"), (Tensor, list, tuple)) and not written(node):
            lower.env[node] = Static(node.meta.get("val"))
        else:
            _lower_call(model, node, lower)
        lower.writes.made(node)


def _lower_attribute(node: FxNode, lower: Lower, owner: nn.Module) -> None:
    found: Any = owner
    for part in str(node.target).split("."):
        found = getattr(found, part)
    lower.env[node] = found
    if isinstance(found, Tensor):
        lower.env[node] = lower.external(node.name, found, CONSTANT, ("constant", found), found.requires_grad)
        lower.writes.hold(node)


def _lower_call(model: nn.Module | None, node: FxNode, lower: Lower) -> None:
    targets, moved = written(node), running(node)
    if torch.Tag.inplace_view in getattr(node.target, "tags", ()):
        _lower_inplace_view(model, node, lower, targets)
        return
    for target in (*targets, *moved):
        lower.writes.check(node, target)
    if not targets:
        _lower_plain(lower, node, node.target)
    elif lower.writes.keeps(node):
        lower.env[node] = lower.env[targets[0]]
    elif len(targets) > 1 or not isinstance(node.meta.get("val"), Tensor):
        lower_many_on_copies(lower, node, targets)
    elif lower.writes.in_place(targets[0]):
        _buffer_update(node, lower)
    else:
        _lower_write(lower, node, targets[0])


def _lower_plain(lower: Lower, node: FxNode, target: Any) -> Any:
    result = lower_operator(lower, node, target)
    if lower.no_grad and isinstance(result, int) and node not in lower.writes.aliases.same:
        result = lower.writes.without_gradient(result, node)  # what is no node of its own: a copy, a view of one shape
    if isinstance(result, list):
        lower.tuples[node] = result
    lower.env[node] = result
    return result


def _lower_write(lower: Lower, node: FxNode, target: FxNode) -> None:
    plain = functional(node.target)
    if plain is not None and same_result(plain, node):
        value = _lower_plain(lower, node, plain)
    else:
        value = lower_on_a_copy(lower, node, plain)
    lower.env[node] = lower.writes.write(target, value, op_name(node) == "copy_")


def _lower_inplace_view(model: nn.Module | None, node: FxNode, lower: Lower, targets: list[FxNode]) -> None:
    """`unsqueeze_`, `t_`, `detach_` ...: another view, no other numbers."""
    plain = functional(node.target)
    if plain is None:
        raise CaptureError(
            f"{type(model).__name__}: no functional form of in-place {node.target}: {node.format_node()}"
        )
    if any(lower.writes.aliases.canonical(t).op == "placeholder" for t in targets) and op_name(node) != "detach_":
        refuse_mutation(type(model).__name__, targets[0].name)
    _lower_plain(lower, node, plain)


def lower_again(lower: Lower, node: FxNode) -> None:
    """A view of a value that has been written since."""
    inplace = torch.Tag.inplace_view in getattr(node.target, "tags", ())
    _lower_plain(lower, node, functional(node.target) if inplace else node.target)


def lower_parts(lower: Lower, name: str, traced: Any, inputs: list[int]) -> Any:
    """What the parts of operator `name` give, or None, and nothing is added, where one of them has no region rule."""
    writes = lower.writes
    before = len(lower.values), len(lower.nodes), dict(lower.names), dict(lower.sources)
    lower.writes = Writes(lower, find_aliases(traced), name, partial(lower_again, lower))  # names of these parts alone
    found = iter(inputs)
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            lower.env[node] = next(found)
            lower.writes.made(node)
    try:
        lower_nodes(None, traced.graph, lower, traced)
    except CaptureError:  # a write in place that has no other form
        parts = None
    else:
        (result,) = next(n for n in traced.graph.nodes if n.op == "output").args
        parts = pytree.tree_map(lambda n: lower.env.get(n), result)
    finally:
        lower.writes = writes
    ruled = not any(node.rule.reason for node in lower.nodes[before[1] :])
    if ruled and all(isinstance(p, int) for p in pytree.tree_leaves(parts, is_leaf=lambda p: p is None)):
        return list(parts) if isinstance(parts, tuple) else parts
    del lower.values[before[0] :], lower.nodes[before[1] :]
    lower.names, lower.sources = before[2], before[3]
    return None


def _buffer_update(node: FxNode, lower: Lower) -> None:
    """An in-place operator on a buffer: a step with a side effect, run once per forward."""
    call, inputs = closure(lower, node.target, node.args, node.kwargs)

    def run(*xs: Any) -> Tensor:
        with torch.no_grad():
            call(*xs)
        return torch.zeros(1)

    rule = opaque([lower.shape(i) for i in inputs], "updates a buffer")
    lower.emit("update_buffer", inputs, torch.zeros(1), rule, Opaque(run), random=True, differentiable=False)
    lower.env[node] = lower.env[node.args[0]]  # type: ignore[index]


def _inline(model: nn.Module | None, node: FxNode, lower: Lower, owner: nn.Module) -> None:
    body, given = block_of(node, owner)
    settings = node.args[: len(node.args) - len(given) - 1]
    grad_off = "set_grad_enabled" in str(node.target) and settings[0] is False
    if "wrap_with_autocast" in str(node.target) and not _autocast_off(settings):
        raise CaptureError(
            f"{type(model).__name__} switches autocast on inside of forward: put the autocast block around the call"
        )
    places = [n for n in body.graph.nodes if n.op == "placeholder"]
    for inner, outer in zip(places, given, strict=True):
        lower.env[inner] = lower.env[outer] if isinstance(outer, FxNode) else Static(outer)
        if isinstance(outer, FxNode) and outer in lower.tuples:
            lower.tuples[inner] = lower.tuples[outer]
        lower.writes.made(inner)
    lower.no_grad += grad_off
    lower_nodes(model, body.graph, lower, body)
    lower.no_grad -= grad_off
    last = next(n for n in body.graph.nodes if n.op == "output")
    results = last.args[0] if isinstance(last.args[0], (list, tuple)) else [last.args[0]]
    for r in results:
        if isinstance(r, FxNode):
            lower.writes.refresh(r)
    lower.tuples[node] = [lower.env[r] if isinstance(r, FxNode) else Static(r) for r in results]
    lower.env[node] = lower.tuples[node]


def _autocast_off(arguments: Sequence[Any]) -> bool:
    return any(a is False for a in arguments)
