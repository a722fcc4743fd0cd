"""What forward does while it is looked at on stand-ins that must not stay, or that no graph of its operators holds.

    writes into a tensor that is no parameter and no buffer     put back: the plan writes at each call
    hooks on a tensor, `retain_grad`                            refused: regions have no gradient of a whole tensor
    `torch.autograd.Function`                                   a plan differentiates the operators of its forward: refused
                                                                where its backward is another one, on random numbers

Enter at `Looking`, or `Before` where only writes matter; `same_input` keeps one tensor that is given twice one tensor, `Aside`
lets modes stand aside where a tensor is only asked what it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from ranger_nn.errors import CaptureError
from ranger_nn.torch.alone import here
from ranger_nn.torch.folding import is_real, writes
from ranger_nn.torch.inputs import shared

HOOKS = {"register_hook", "register_post_accumulate_grad_hook", "retain_grad"}
"""Methods that ask for the gradient of a whole tensor."""
LENGTH = 8
"""A function is differentiated on tensors whose dimensions are cut to so many: it is the formula that is looked at."""
SCALES = (0.3, 3.0, 30.0)
"""Of the random numbers that it is differentiated on: within and beyond where clamps and steps usually lie."""


class Aside(TorchFunctionMode):
    """Modes of tracing, outermost first, which stand aside where a tensor is only asked what it is.

    Of 7,000 calls that `torch.export` makes of a U-Net of 40 operators, 6,900 are such questions, and each would pass all modes.
    """

    QUESTIONS = frozenset(
        ("__get__", "_is_view", "device", "dim", "is_conj", "is_inference", "is_neg", "numel", "size", "storage_offset", "stride",
         "untyped_storage")
    )  # fmt: skip

    def __init__(self, *modes: TorchFunctionMode) -> None:
        """`modes`: entered by the caller where they do more than look at calls."""
        super().__init__()
        self.modes = modes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """A question is answered at once; all else goes through the modes."""
        if getattr(func, "__name__", "") in self.QUESTIONS:
            return func(*args, **(kwargs or {}))
        with ExitStack() as stack:
            for mode in self.modes:
                TorchFunctionMode.__enter__(mode)
                stack.callback(TorchFunctionMode.__exit__, mode, None, None, None)
            return func(*args, **(kwargs or {}))


class Before:
    """Values of tensors before they are written into, to be put back."""

    def __init__(self) -> None:
        """None yet."""
        self._values: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(self, tensor: Tensor) -> None:
        """Of a tensor that is about to be written into."""
        if id(tensor) not in self._values:
            with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
                self._values[id(tensor)] = tensor.detach(), tensor.detach().clone()

    def put_back(self) -> None:
        """The last first: one may be a view of another."""
        with _disable_current_modes(), torch.no_grad():
            for tensor, value in reversed(self._values.values()):
                tensor.copy_(value)


class Looking(TorchFunctionMode):
    """Looks at calls while forward is traced; `on`: what it wrote into real tensors is put back behind it."""

    def __init__(self, model: nn.Module, grad: bool) -> None:
        """`model`: for errors; `grad`: gradients will be asked for."""
        super().__init__()
        self.name, self.grad = type(model).__name__, grad
        self.before = Before()

    @contextmanager
    def on(self) -> Iterator[None]:
        """Functions of autograd are looked at meanwhile, in this thread."""
        with _looked_at(self._function) if self.grad else nullcontext():
            try:
                yield
            finally:
                self.before.put_back()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As it is, but for what the module's docstring names."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in HOOKS and self.grad:
            raise CaptureError(
                f"{self.name} calls {name} on a tensor in forward: regions have no gradient of a whole tensor. Scale or look at "
                "gradients in a torch.library.custom_op with register_autograd, outside of the regional module, or by a hook of "
                "a parameter."
            )
        if name == "__set__" and getattr(func, "__self__", None) is Tensor.data:
            raise CaptureError(
                f"{self.name} assigns to .data of a tensor in forward, which no graph of operators shows: write in place "
                "(buffer.copy_(value))."
            )
        if args and isinstance(args[0], Tensor) and is_real(args[0]) and writes(func, kwargs):
            self.before.keep(args[0])
        return func(*args, **kwargs)

    def _function(self, function: Any, apply: Callable[..., Any], args: Sequence[Any]) -> None:
        with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.random.fork_rng(devices=[]):
            try:
                same = all(_differentiated(function, apply, args, scale) for scale in SCALES)
            except Exception as error:
                raise CaptureError(self._said(function, f"could not be compared with it ({error})")) from error
        if not same:
            raise CaptureError(self._said(function, "is another function"))

    def _said(self, function: Any, what: str) -> str:
        return (
            f"{self.name} calls {function.__qualname__}, a torch.autograd.Function: a plan differentiates the operators of its "
            f"forward, and its backward {what}. Make it a torch.library.custom_op with register_autograd, which runs whole, or "
            "call it outside of the regional module."
        )


@contextmanager
def _looked_at(look: Callable[[Any, Callable[..., Any], Sequence[Any]], None]) -> Iterator[None]:
    """Calls of `torch.autograd.Function` in this thread are shown to `look` first, with what runs them."""
    original = vars(torch.autograd.Function)["apply"].__func__

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        known = cls.__module__.partition(".")[0] in ("torch", "ranger_nn")
        if not known and not kwargs:
            look(cls, partial(original, cls), args)
        return original(cls, *args, **kwargs)

    with patch.object(torch.autograd.Function, "apply", classmethod(here(apply, original))):
        yield


class _Context:
    """What a function's forward writes into when it is called by itself."""

    needs_input_grad = (True,) * 64  # more than a function has inputs

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


def _differentiated(function: Any, apply: Callable[..., Any], args: Sequence[Any], scale: float) -> bool:
    """Whether autograd finds for forward's own operators what backward gives."""
    generator = torch.Generator().manual_seed(0)

    def like(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        shape = [min(int(n), LENGTH) for n in x.shape]
        if not x.is_floating_point():
            return torch.zeros(shape, dtype=x.dtype)
        return (torch.randn(shape, generator=generator) * scale).to(x.dtype).requires_grad_()

    given = pytree.tree_map(like, list(args))
    leaves = [x for x in pytree.tree_leaves(given) if isinstance(x, Tensor) and x.requires_grad]
    if not leaves:
        return True
    found = []
    old = function.setup_context is torch.autograd.function._SingleLevelFunction.setup_context
    plain = (lambda *xs: function.forward(_Context(), *xs)) if old else function.forward
    for call in (apply, plain):
        with torch.enable_grad():
            result = call(*pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, given))
        flowing = [y for y in pytree.tree_leaves(result) if isinstance(y, Tensor) and y.requires_grad]
        generator.manual_seed(1)
        grads = [(torch.randn(y.shape, generator=generator) * scale).to(y.dtype) for y in flowing]
        found.append(
            torch.autograd.grad(flowing, leaves, grads, allow_unused=True) if flowing else [None] * len(leaves)
        )
    near = 1e-4 if all(x.dtype in (torch.float32, torch.float64) for x in leaves) else 0.05
    return all(_near(a, b, near) for a, b in zip(*found, strict=True))


def _near(a: Tensor | None, b: Tensor | None, near: float) -> bool:
    if a is None or b is None:
        other = b if a is None else a
        return other is None or not other.any()
    return torch.allclose(a, b, rtol=near, atol=near * float(b.abs().max()) if b.numel() else 0.0, equal_nan=True)


@contextmanager
def same_input(twin: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
    """A stand-in that is given twice is one tensor in forward too (`x is y`), where tracing makes two of it."""
    leaves = pytree.tree_leaves((args, dict(sorted(kwargs.items()))))
    places = shared(leaves)
    if places == tuple(range(len(leaves))):
        yield
        return

    def join(module: nn.Module, args: Any, kwargs: Any) -> Any:
        given, spec = pytree.tree_flatten((args, dict(sorted(kwargs.items()))))
        return pytree.tree_unflatten([given[i] for i in places], spec)

    hook = twin.register_forward_pre_hook(join, with_kwargs=True, prepend=True)
    try:
        yield
    finally:
        hook.remove()
