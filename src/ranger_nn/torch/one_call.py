"""What one operator takes beside what it reads and gives, counted by calling it once, alone.

What a library takes depends on the machine's instructions, on sizes and on versions, and no rule says it closely: a bound
for all machines is up to ten times too much. Where an estimate depends on it the operator itself is asked, on zeros of
the same shapes and strides, and each kind of call once in a process. Enter at `Call.of` and `Call.counted`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from ranger_nn.torch.measure import measure

NAMESPACES = ("aten", "mkldnn")
"""Of PyTorch: their operators do nothing but compute. Those of others are not called without the caller's knowledge."""
_COUNTED: dict[Any, int] = {}
_LOCK = threading.Lock()


@dataclass(frozen=True)
class Shaped:
    """A tensor without its numbers."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, t: Tensor) -> Shaped:
        """What a tensor is stored as."""
        return cls(tuple(map(int, t.shape)), tuple(map(int, t.stride())), t.dtype)

    def zeros(self) -> Tensor:
        """Such a tensor."""
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype).zero_()


@dataclass(frozen=True)
class Call:
    """An operator and its arguments, tensors without their numbers."""

    operator: Any
    leaves: tuple[Any, ...]
    spec: Any = field(repr=False)

    @classmethod
    def of(cls, operator: Any, args: Any, kwargs: Any) -> Call:
        """The call of an operator, as it is dispatched."""
        leaves, spec = pytree.tree_flatten((args, kwargs or {}))
        return cls(operator, tuple(Shaped.of(x) if isinstance(x, Tensor) else x for x in leaves), spec)

    @property
    def nbytes(self) -> int:
        """Bytes of its arguments."""
        return sum(prod(x.shape) * x.dtype.itemsize for x in self.leaves if isinstance(x, Shaped))

    @property
    def key(self) -> Any:
        """Equal where calls take the same; numbers by their text, as 1, 1.0 and True are equal."""
        threads, onednn = torch.get_num_threads(), torch.backends.mkldnn.enabled
        rest = tuple(x if isinstance(x, Shaped) else repr(x) for x in self.leaves)
        return self.operator, rest, str(self.spec), threads, onednn

    def counted(self, left_out: bool = False) -> int | None:
        """Bytes at its peak above those of its results; None where it cannot be called, or while another is measured.

        `left_out`: above nothing, but results are not counted. It is more where the peak is before they are made.
        """
        if self.operator.namespace not in NAMESPACES:
            return None
        key = self.key, left_out
        if key not in _COUNTED:
            try:
                with _plainly(), _LOCK:
                    found = self._call(left_out)
            except Exception:  # such as an index that zeros do not answer, or a profiler that is running
                return None
            if found is None:
                return None
            _COUNTED[key] = found
        return _COUNTED[key]

    def _call(self, left_out: bool) -> int | None:
        """The second call is counted: what a first one sets up stays."""
        if _get_current_dispatch_mode_stack() or torch.autograd.profiler._is_profiler_enabled:
            return None
        found = [x.zeros() if isinstance(x, Shaped) else x for x in self.leaves]
        args, kwargs = pytree.tree_unflatten(found, self.spec)
        known = {t.untyped_storage()._cdata for t in found if isinstance(t, Tensor)}
        self.operator(*args, **kwargs)
        with measure("cpu") as used:
            result = self.operator(*args, **kwargs)
            given = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
            given = [t for t in given if t.untyped_storage()._cdata not in known]
            if left_out:
                used.leave_out(*given)
        made = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in given}
        return used.peak - (0 if left_out else sum(made.values()))


@contextmanager
def _plainly() -> Iterator[None]:
    """No gradients, no casts, and the caller's random numbers are left alone."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.random.fork_rng(devices=[]):
        yield
