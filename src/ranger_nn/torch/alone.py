"""One capture at a time, and what `torch.export` changes for the whole process is changed for this thread only.

While it traces, `torch.export` replaces `nn.Module.__call__` and `__getattr__`, `max`, `min` and `math.pow`, raises flags
that say "compiling", and switches oneDNN and cuDNN off: other threads, which run the wrapper or the untouched module
meanwhile, would be traced too, or compute by other kernels. Here every replacement looks which thread it is called from.
Enter at `alone`.
"""

from __future__ import annotations

import builtins
import functools
import logging
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
import torch.export._trace
from torch.autograd.graph import saved_tensors_hooks

_LOCK = threading.RLock()
"""`torch.export` keeps what it is at in module globals: it runs once at a time in a process."""
_TRACE: Any = torch.export._trace


@contextmanager
def alone() -> Iterator[None]:
    """For a capture: no other one meanwhile, and nothing of it is seen by other threads."""
    with _LOCK, ExitStack() as stack:
        tracer: Any = torch.fx._symbolic_trace._Patcher
        stack.enter_context(patch.object(tracer, "patch_method", _patch_method(tracer.patch_method)))
        stack.enter_context(_replaced("_compiling_state_context", _compiling))
        # Operators are traced above the choice of a back end: its flags, which are the process's, may stay.
        stack.enter_context(_replaced("_ignore_backend_decomps", nullcontext))
        original = getattr(_TRACE, "_override_builtin_ops", nullcontext)
        stack.enter_context(_replaced("_override_builtin_ops", _builtins(original)))
        stack.enter_context(_quiet())
        # It puts back what forward writes into attributes: a twin's are its own (`torch/frozen.py` looks at them).
        stack.enter_context(_replaced("_detect_attribute_assignment", lambda model: nullcontext()))
        # What the tracing saves for a backward that never comes is not for the caller's hooks (checkpoint, offloading).
        stack.enter_context(saved_tensors_hooks(lambda x: x, lambda x: x))
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Half-traced graphs and hints for users of `torch.export` are not printed: the error that is raised says it all."""
    here = _Here()

    def passes(record: logging.LogRecord) -> bool:
        return not here or record.levelno < logging.WARNING  # what TORCH_LOGS asks for is below

    loggers = [logging.getLogger(f"torch.{name}") for name in ("fx.experimental.symbolic_shapes", "export._trace")]
    for logger in loggers:
        logger.addFilter(passes)
    try:
        with patch.object(_TRACE, "print", lambda *a, **k: None if here else print(*a, **k), create=True):
            yield
    finally:
        for logger in loggers:
            logger.removeFilter(passes)


def _replaced(name: str, function: Callable[..., Any]) -> Any:
    """A context of `torch.export`'s, which another release may not have."""
    return patch.object(_TRACE, name, function) if hasattr(_TRACE, name) else nullcontext()


class _Here:
    """True in the thread that made it, for code that asks by truth value."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()

    def __bool__(self) -> bool:
        return threading.get_ident() == self.thread

    def __or__(self, other: Any) -> Any:
        return bool(self) | other

    def __and__(self, other: Any) -> Any:
        return bool(self) & other

    __ror__, __rand__ = __or__, __and__


def here(function: Callable[..., Any], elsewhere: Callable[..., Any]) -> Callable[..., Any]:
    """`function` in this thread, `elsewhere` in all others."""
    thread = threading.get_ident()

    @functools.wraps(elsewhere, updated=())
    def chosen(*args: Any, **kwargs: Any) -> Any:
        return (function if threading.get_ident() == thread else elsewhere)(*args, **kwargs)

    return chosen


def _patch_method(original: Callable[..., Any]) -> Callable[..., Any]:
    def patch_method(self: Any, cls: type, name: str, new_fn: Callable[..., Any], deduplicate: bool = True) -> None:
        original(self, cls, name, here(new_fn, getattr(cls, name)), deduplicate)

    return patch_method


@contextmanager
def _compiling() -> Iterator[None]:
    flags = ("_is_compiling_flag", "_is_exporting_flag")
    with ExitStack() as stack:
        for flag in flags:
            stack.enter_context(patch.object(torch.compiler, flag, _Here()))
        yield


def _builtins(original: Callable[[], Any]) -> Callable[[], Any]:
    places = ((builtins, "max"), (builtins, "min"), (math, "pow"))

    @contextmanager
    def overridden() -> Iterator[None]:
        before = [getattr(*place) for place in places]
        with original():
            for (owner, name), elsewhere in zip(places, before, strict=True):
                setattr(owner, name, here(getattr(owner, name), elsewhere))
            yield

    return overridden
