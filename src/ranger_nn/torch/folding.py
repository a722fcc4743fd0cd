"""Constants met while a model is traced: which tensor of the model each is, and numbers taken from their values.

`int(self.stride)` of a buffer is a number that the program is made of, not data. While `torch.export` traces, tensors
that were computed from buffers and other constants alone are known (`Known`: how, and from which), and what Python asks
of them (`int`, `if`, `.item()`, `.tolist()`) is answered from the real ones and noted in `folded`: the plan holds
as long as these values do. A constant that forward itself changes is never answered. Enter at `Folding`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

NUMBERS = {
    getattr(Tensor, name)
    for name in ("item", "tolist", "__int__", "__float__", "__bool__", "__index__", "__complex__", "is_nonzero")
}
"""What Python asks of a tensor's values."""
LARGEST = 1 << 16
"""Elements up to which a constant's numbers are computed while tracing."""
Source = tuple[str, Any]
"""("state", name of a buffer or parameter) or ("constant", the tensor)."""


@dataclass(frozen=True)
class Known:
    """A tensor made from constants alone: how to compute it, and from which."""

    compute: Callable[[], Any]
    sources: tuple[Source, ...]


class Folding(TorchFunctionMode):
    """On while a model is traced."""

    def __init__(self, model: nn.Module) -> None:
        """`model`: with its real tensors; while it is traced fake ones stand in their place."""
        super().__init__()
        self.model = model
        self.state = dict(
            [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        )
        self.sizes: dict[tuple[int, ...], list[str]] = {}
        for name, real in self.state.items():
            if real.numel() <= LARGEST:
                self.sizes.setdefault(tuple(real.shape), []).append(name)
        self.known: dict[int, tuple[Any, Known]] = {}
        self.constants: dict[Any, Tensor] = {}
        self.folded: dict[Any, tuple[Source, Tensor]] = {}
        self.changed: set[Any] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer a question for numbers; follow constants through everything else."""
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "__get__":  # an attribute, such as the shape
            return func(*args, **kwargs)
        tensors = [a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        for t in tensors:
            if is_real(t):
                self.constants.setdefault(_place(t), t)
        if func in NUMBERS and (found := self._known(tensors[0])) is not None and self._holds(found):
            return self._fold(func, found)
        if tensors and writes(func, kwargs):
            found = self._known(tensors[0])
            self.changed.update(_name(s) for s in (found.sources if found else ()))
        result = func(*args, **kwargs)
        if tensors and isinstance(result, (Tensor, list, tuple)) and not writes(func, kwargs):
            self._follow(func, args, kwargs, tensors, result)
        return result

    def _known(self, t: Tensor) -> Known | None:
        if id(t) in self.known:
            return self.known[id(t)][1]
        if is_real(t):
            return Known(lambda: t, (("constant", t),)) if t.numel() <= LARGEST else None
        with torch._C.DisableTorchFunction():  # every shape that is read would go through all modes
            known = all(type(n) is int for n in t.shape)
            for name in self.sizes.get(tuple(t.shape), ()) if known else ():
                if self._present(name) is t:
                    real = self.state[name]
                    found = Known(partial(_itself, real), (("state", name),))
                    self.known[id(t)] = t, found
                    return found
        return None

    def _present(self, name: str) -> Any:
        owner, _, leaf = name.rpartition(".")
        return getattr(self.model.get_submodule(owner), leaf, None)

    def _holds(self, found: Known) -> bool:
        return not any(_name(s) in self.changed for s in found.sources)

    def _fold(self, func: Any, found: Known) -> Any:
        with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
            for source in found.sources:
                self._note(source)
            return func(found.compute())

    def _note(self, source: Source) -> Tensor:
        """The real tensor of a source, of which numbers are taken."""
        real: Tensor = self.state[source[1]] if source[0] == "state" else source[1]
        self.folded[_name(source)] = source, real.detach().clone()
        return real

    def numbers(self, source: Source) -> Tensor | None:
        """A constant of the traced program, to take numbers from; None where forward changes it."""
        return None if _name(source) in self.changed else self._note(source)

    def _follow(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], result: Any) -> None:
        made = [result] if isinstance(result, Tensor) else list(result)
        if not made or not all(_is_small(t) for t in made):
            return
        every = [known for t in tensors if (known := self._known(t)) is not None]
        if len(every) < len(tensors):
            return
        computed = {id(t): k.compute for t, k in zip(tensors, every, strict=True)}
        sources = tuple({_name(s): s for k in every for s in k.sources}.values())

        def compute(position: int) -> Any:
            real = pytree.tree_map(lambda a: computed[id(a)]() if id(a) in computed else a, (args, kwargs))
            found = func(*real[0], **real[1])
            return found if isinstance(result, Tensor) else found[position]

        for position, t in enumerate(made):
            self.known[id(t)] = t, Known(partial(compute, position), sources)

    def very(self, constant: Tensor) -> Tensor:
        """The tensor of the model of which `torch.export` lists a detached copy in the same memory."""
        return self.constants.get(_place(constant), constant)


def _itself(x: Any) -> Any:
    return x


def _is_small(t: Any) -> bool:
    return isinstance(t, Tensor) and all(type(n) is int for n in t.shape) and t.numel() <= LARGEST


def is_real(t: Tensor) -> bool:
    """Neither fake nor a wrapper of tracing."""
    return type(t) in (Tensor, nn.Parameter) and not t.is_meta and not torch._is_functional_tensor(t)


def _place(t: Tensor) -> Any:
    if t.layout != torch.strided or t.numel() == 0:
        return id(t)
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        return t.data_ptr(), tuple(t.shape), t.stride(), t.dtype


def _name(source: Source) -> Any:
    return source[1] if source[0] == "state" else id(source[1])


def writes(func: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a function of PyTorch writes into its first argument, by its name."""
    name = getattr(func, "__name__", "")
    augmented = name.startswith("__i") and name.endswith("__") and name not in ("__int__", "__index__", "__invert__")
    return augmented or name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) or "out" in kwargs
