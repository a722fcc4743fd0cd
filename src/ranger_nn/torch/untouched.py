"""What the untouched network takes on these inputs, found without running it: where no plan saves, it is the plan.

Its own Python runs forward and, in training, backward on fake tensors (shapes without numbers), in a twin of the module
tree. Every operator that reaches the dispatcher below autograd is seen, with the memory that it gives, and every
storage says when the last tensor lets it go: what autograd saves, what locals hold and what backward adds are counted as
they are. To it comes what an operator takes inside of itself: known for convolutions (`torch/workspace.py`), nothing for
those that only write their results, else copies of all that it reads. These are bounds. Where the answer depends on them,
the operators at which the peak stands are asked themselves, one after the other (`torch/one_call.py`), until it stands
at one whose bytes were counted. Enter at `Untouched` and `untouched_peak`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from ranger_nn.core.graph import Graph
from ranger_nn.torch.alone import alone
from ranger_nn.torch.folding import is_real
from ranger_nn.torch.kernels import packed
from ranger_nn.torch.kernels_recurrent import FUNCTIONS
from ranger_nn.torch.one_call import Call, Shaped
from ranger_nn.torch.tracing import Before
from ranger_nn.torch.twin import Twin
from ranger_nn.torch.workspace import Convolved, attention

PLAIN = {
    *(
        "native_batch_norm",
        "native_batch_norm_backward",
        "_native_batch_norm_legit",
        "_native_batch_norm_legit_no_training",
    ),
    *("native_layer_norm", "native_layer_norm_backward", "native_group_norm", "native_group_norm_backward"),
    *("_softmax", "_softmax_backward_data", "_log_softmax", "_log_softmax_backward_data"),
    *("gelu_backward", "threshold_backward", "silu_backward", "sigmoid_backward", "tanh_backward", "hardtanh_backward"),
    *("leaky_relu_backward", "elu_backward", "hardswish_backward", "hardsigmoid_backward", "native_dropout"),
    *("cat", "stack", "sum", "mean", "clone", "copy_", "_to_copy", "fill_", "zero_", "constant_pad_nd", "embedding"),
    *("zeros_like", "ones_like", "empty_like", "zeros", "ones", "empty", "full", "new_zeros", "new_empty", "arange"),
    *("empty_strided", "new_empty_strided", "scalar_tensor", "full_like", "native_dropout_backward", "mul", "add"),
    *("max_pool2d_with_indices", "max_pool2d_with_indices_backward", "avg_pool2d", "avg_pool2d_backward"),
    *("slice_backward", "select_backward", "new_full", "new_ones", "index_select", "amax", "amin", "argmax"),
}
"""Operators that write their results and take nothing beside them (a few bytes for each thread aside)."""
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "addmv", "mv", "dot"}
"""Products copy those of their operands that do not lie in order of rows or of columns."""
MOST = 2000
"""Operators of a graph that is looked at: a second or two."""
HIDDEN = {"_transformer_encoder_layer_fwd", "_native_multi_head_attention", "mkldnn_rnn_layer", "_thnn_fused_lstm_cell"}
"""Operators that are whole networks inside: nothing is said of what they take."""


NARROW = (torch.float16, torch.bfloat16)
BESIDE = 4096
"""Bytes that a kernel may take beside what is said of it: scalars, and a few for each channel or thread."""
ROOM = 128 << 20
"""Bytes of arguments up to which an operator is called while planning, where no more than that is allowed."""
SHARE = 50
"""One part in so many more than is said of an operator that was not called: as `planning.search.MARGIN`."""


@dataclass
class Untouched:
    """A call of the untouched module, forward and (`grad`) backward: what it takes, outputs not counted."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    grad: bool
    graph: Graph | None = None

    @cached_property
    def _used(self) -> _Used | None:
        return _watched(self.model, self.args, self.kwargs, self.grad, self.graph)

    def bound(self) -> int | None:
        """Bytes that it takes at most, found without running anything; None where it cannot be told."""
        return self._used.peak() if self._used is not None else None

    def counted(self, enough: int, most: int) -> int | None:
        """The same as closely as can be, down to `enough`: single operators are called, on zeros.

        None where it cannot be told, or certainly is more than `enough` and than `most`.
        """
        used = self._used
        if used is None:
            return None
        # Counted alone, calls in 16 bits took less than in the network.
        if used.narrow or torch.is_autocast_enabled("cpu"):
            return used.peak() + used.peak() // SHARE + BESIDE
        return used.counted(enough, most)


def untouched_peak(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], grad: bool, graph: Graph | None = None
) -> int | None:
    """Bytes that a call of the untouched module takes at most: `Untouched.bound`."""
    return Untouched(model, args, kwargs, grad, graph).bound()


def _watched(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], grad: bool, graph: Graph | None
) -> _Used | None:
    """A call on fake tensors.

    None where it cannot be told: an operator that hides a network, a device other than the CPU, a regional module inside
    (its plan is of its own), a forward that does not run without numbers, more than `MOST` operators in its `graph`, or a
    recurrence, which is a loop over steps.
    """
    if graph is not None and (len(graph.nodes) > MOST or any(node.op in FUNCTIONS for node in graph.nodes)):
        return None
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    if any(x.device.type != "cpu" for x in tensors) or any(hasattr(m, "NOT_IN_TWINS") for m in model.modules()):
        return None
    try:
        with alone(), torch.random.fork_rng(devices=[]):
            return _run(Twin(model).module, args, kwargs, grad)
    except Exception:  # whatever forward and fake tensors do not get on with
        return None
    finally:
        torch.clear_autocast_cache()  # of fake weights


def _run(twin: nn.Module, args: Any, kwargs: Any, grad: bool) -> _Used | None:
    from torch._subclasses import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    faked: dict[int, Tensor] = {}
    alive: list[Tensor] = []  # so that no id is given out again

    def fake(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if id(x) not in faked:
            with mode:
                found = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
            faked[id(x)] = found.requires_grad_(x.requires_grad and grad)
            alive.append(x)
        return faked[id(x)]

    state = {n: fake(t) for n, t in (*twin.named_parameters(), *twin.named_buffers())}
    args, kwargs = pytree.tree_map(fake, (args, kwargs))
    used = _Used(faked.values())
    try:
        return _counted(used, mode, twin, state, args, kwargs, grad, list(faked.values()))
    finally:
        used.before.put_back()


def _counted(
    used: _Used, mode: Any, twin: nn.Module, state: Any, args: Any, kwargs: Any, grad: bool, fakes: list[Tensor]
) -> _Used | None:
    with mode, torch.set_grad_enabled(grad):
        with used:
            result = torch.func.functional_call(twin, state, args, kwargs)
        outputs = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
        used.leave_out(outputs)
        flowing = [t for t in outputs if t.requires_grad]
        grads = [torch.empty_like(t) for t in flowing]
        used.know(grads)
        leaves = [t for t in fakes if t.requires_grad]
        nodes = _nodes(flowing)
        if _others(nodes, leaves):
            return None
        used.keep_scalars(nodes)
        if flowing:
            with used:
                torch.autograd.backward(flowing, grads, inputs=leaves)
    return None if used.hidden else used


def _nodes(outputs: Sequence[Tensor]) -> set[Any]:
    """All of a graph of autograd."""
    todo = [t.grad_fn for t in outputs]
    seen: set[Any] = set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [following for following, _ in node.next_functions]
    return seen


def _others(nodes: Iterable[Any], leaves: Sequence[Tensor]) -> bool:
    """Whether anything else is trained: a tensor that no module registers."""
    known = {id(t) for t in leaves}
    return any(id(node.variable) not in known for node in nodes if hasattr(node, "variable"))


def _scalars(node: Any) -> int:
    """Bytes of numbers that autograd keeps as tensors, such as the factor of a product: no operator makes them."""
    kept = (getattr(node, name) for name in dir(node) if name.startswith("_saved_"))
    numbers = (t for t in kept if isinstance(t, Tensor) and t.dim() == 0 and is_real(t))
    return sum(t.element_size() for t in numbers)


class _Used(TorchDispatchMode):
    """Bytes of storages that operators make, from when they are made until nothing holds them."""

    def __init__(self, known: Any) -> None:
        """`known`: tensors that the caller owns."""
        super().__init__()
        self._events: list[tuple[int, int]] = []
        self._calls: list[Call] = []
        self._said: list[int] = []
        self._made: list[list[int]] = []
        self._asked: dict[int, int] = {}
        self._left_out: set[int] = set()
        self._next = 0
        self._alive: dict[int, int] = {}
        self.hidden, self.before = False, Before()
        self.know(known)

    def know(self, tensors: Iterable[Tensor]) -> None:
        """These are the caller's: not counted."""
        for t in tensors:
            self._alive[t.untyped_storage()._cdata] = -1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operator; what it made is counted from here on."""
        if func._schema.is_mutable and args and isinstance(args[0], Tensor) and is_real(args[0]):
            self.before.keep(args[0])
        name = func._schema.name.split("::")[1]
        result = _viewed(*args) if name == "view" and len(args) == 2 else func(*args, **(kwargs or {}))
        if func.namespace == "prim":  # asks what a tensor is
            return result
        self.hidden |= name in HIDDEN
        made = [n for t in pytree.tree_leaves(result) if isinstance(t, Tensor) for n in self._meet(t)]
        self._made.append(made)
        self._said.append(workspace(func, name, args, result, bool(made)))
        self._events.append((-1 - len(self._calls), self._said[-1]))
        self._calls.append(Call.of(func, args, kwargs))
        return result

    def _meet(self, t: Tensor) -> list[int]:
        """The number of a storage that was not there before."""
        storage = t.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return []
        self._alive[key] = number = self._next
        self._next += 1
        self._events.append((number, storage.nbytes()))
        weakref.finalize(storage, self._drop, key, number, storage.nbytes())
        return [number]

    def _drop(self, key: int, number: int, size: int) -> None:
        if self._alive.get(key) == number:
            del self._alive[key]
        self._events.append((number, -size))

    def keep_scalars(self, nodes: Iterable[Any]) -> None:
        """Numbers that autograd keeps until backward has passed them, from the start on."""
        for node in nodes:
            if size := _scalars(node):
                self._events.insert(0, (self._next, size))
                node.register_hook(partial(self._let_go, self._next, size))
                self._next += 1

    def _let_go(self, number: int, size: int, *_: Any) -> None:
        self._events.append((number, -size))

    def leave_out(self, tensors: Sequence[Tensor]) -> None:
        """Do not count the storages of these."""
        self._left_out |= {self._alive.get(t.untyped_storage()._cdata, -1) for t in tensors}

    def peak(self) -> int:
        """Most bytes at one time, by what is said of operators."""
        return self._highest(lambda call, said: said)[0]

    def counted(self, enough: int, most: int) -> int | None:
        """Most bytes at one time; the operators at which they are the most are called, until `enough` is not exceeded."""
        if self._highest(lambda call, said: 0)[0] > max(enough, most):
            return None
        room = max(enough, ROOM)
        while True:
            peak, call = self._highest(self._taken)
            if peak <= enough or call in self._asked or call < 0 or self._calls[call].nbytes > room:
                return peak
            told = self._calls[call].counted(not self._left_out.isdisjoint(self._made[call]))
            self._asked[call] = self._taken(call, self._said[call]) if told is None else told

    @property
    def narrow(self) -> bool:
        """Whether some operator computes in 16 bits."""
        return any(isinstance(x, Shaped) and x.dtype in NARROW for call in self._calls for x in call.leaves)

    def _taken(self, call: int, said: int) -> int:
        """What a call was counted to take, or else what is said of it, and a little."""
        return self._asked.get(call, said + said // SHARE + BESIDE)

    def _highest(self, taken: Callable[[int, int], int]) -> tuple[int, int]:
        """Most bytes at one time, and the number of the call that runs then."""
        live = most = 0
        at = -1
        for number, size in self._events:
            if number >= 0:
                live += size if number not in self._left_out else 0
            now = live + (taken(-1 - number, size) if number < 0 else 0)
            if now > most:
                most, at = now, -1 - number
        return most, at


def _viewed(t: Tensor, sizes: Sequence[int]) -> Tensor:
    """`view`, with the strides of real tensors: those of length one differ on fake ones, and they decide what is channels-last."""
    if isinstance(sizes, torch.dtype):
        return torch.ops.aten.view.dtype(t, sizes)
    with _disable_current_modes():
        like = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta").view(list(sizes))
    return torch.ops.aten.as_strided.default(t, like.shape, like.stride(), t.storage_offset())


def workspace(func: Any, name: str, args: Any, result: Any, makes: bool) -> int:
    """Bytes that one call takes beside what it reads and gives. `makes`: it gave memory of its own, no view."""
    if name in ("convolution", "_convolution", "convolution_backward"):
        return _convolution(name, args, result)
    if name.startswith("_scaled_dot_product_flash_attention_for_cpu"):
        q, k = args[1:3] if "backward" in name else args[:2]
        blocks = attention(int(q.shape[-2]), int(k.shape[-2]), int(q.shape[-1]), q.element_size(), "backward" in name)
        return blocks + (_bytes(q) if "backward" in name else 0)
    if not makes or name in PLAIN or torch.Tag.pointwise in func.tags:
        return 0
    reads = [t for t in pytree.tree_leaves(args) if isinstance(t, Tensor)]
    if name in PRODUCTS and all(t.dtype in (torch.float32, torch.float64) for t in reads):
        return sum(_bytes(t) for t in reads if not _in_order(t))
    gives = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
    side = max((int(n) for t in reads for n in t.shape[-2:]), default=1) if name in PRODUCTS else 0
    blocks = packed(side, side, side, reads[0].dtype, gradient=True) if side else 0
    times = 2 if "upsample" in name and len(reads[0].shape) == 3 else 1  # lines are resized as planes, and in 32 bits
    return times * (sum(map(_bytes, reads)) + sum(map(_bytes, gives))) + blocks


def _bytes(t: Tensor) -> int:
    return t.numel() * t.element_size()


def _in_order(t: Tensor) -> bool:
    """By rows or by columns."""
    return t.is_contiguous() or (t.dim() > 1 and t.transpose(-1, -2).is_contiguous())


def _convolution(name: str, args: Any, result: Any) -> int:
    back = name == "convolution_backward"
    grad, (x, w) = (args[0], args[1:3]) if back else (None, args[:2])
    stride, padding, dilation, transposed, extra, groups = args[4:10] if back else args[3:9]
    y = grad if grad is not None else result
    rank = w.dim() - 2

    def ints(given: Sequence[int]) -> tuple[int, ...]:
        return tuple(int(n) for n in (given if len(given) == rank else list(given) * rank))

    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    turned = last is not None and any(t.is_contiguous(memory_format=last) and not t.is_contiguous() for t in (x, w))
    called = Convolved(
        int(x.shape[0]), (int(x.shape[1]), int(y.shape[1])), tuple(map(int, x.shape[2:])), tuple(map(int, y.shape[2:])),
        tuple(map(int, w.shape[2:])), ints(stride), ints(padding), ints(dilation), int(groups), bool(transposed),
        ints(extra) if transposed else (), x.dtype, turned, ours=False,
    )  # fmt: skip
    order = torch.contiguous_format if not turned or last is None else last
    copied = sum(_bytes(t) for t in (x, w, grad) if t is not None and not t.is_contiguous(memory_format=order))
    return copied + (called.backward(args[10]) if back else called.forward())
