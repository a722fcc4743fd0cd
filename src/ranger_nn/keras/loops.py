"""What the three back ends do in their own way: loops, conditions, rows in place, gradients written by hand.

                 jax                         tensorflow                  torch
    loop         lax.fori_loop               tf.while_loop               a Python loop; steps are integers
    branch       lax.cond                    tf.cond                     `if`
    results      dynamic_update_slice        a slice, or TensorArray     copy_ into a view
    gradient     jax.custom_vjp              tf.custom_gradient          torch.autograd.Function

`own`, `used` and `used_all` say when memory may go. PyTorch runs each line as it is met and frees what no name holds, and
a view holds all of what it was cut from; compilers and graph executors see for themselves.

TensorFlow's graph executor runs whatever is ready, side by side. So the operators of a body get an order there, that in
which they are traced: a call after the call before it, and in backward, where the tape goes through the calls in reverse,
the gradients of each call's inputs and weights before those of the next.

Nothing here knows of plans. Enter at `Loops`; which are those of the running back end: `loops_here.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from keras import ops

Block = tuple[tuple[int, ...], str]
Body = Callable[[Any, Any], Any]
Forward = Callable[[Sequence[Any], bool], tuple[list[Any], Any]]
Backward = Callable[[Sequence[Any], Any, Sequence[Any], Sequence[Any], Sequence[bool]], list[Any]]


class Loops(Protocol):
    """A back end's loop and what goes with it."""

    def loop(self, start: Any, stop: Any, body: Body, carry: Any) -> Any:
        """carry = body(t, carry) for t in [start, stop); loops may be nested, the inner one's ends made by the outer one."""
        ...

    def branch(self, on: Any, then: Callable[[], list[Any]], other: Callable[[], list[Any]]) -> list[Any]:
        """Arrays of one of two functions."""
        ...

    def zeros(self, shape: Sequence[int], dtype: str) -> Any:
        """Zeros that take no memory before they are needed or after."""
        ...

    def take(self, x: Any, dim: int, start: Any, length: int) -> Any:
        """Rows [start, start + length) of x; outside of it the nearest row."""
        ...

    def own(self, x: Any) -> Any:
        """x without the memory of anything larger, to be carried on."""
        ...

    def used(self, windows: Any, value: int) -> None:
        """The window of `value` is not needed any more."""
        ...

    def used_all(self, windows: Any) -> None:
        """This list of windows is not needed any more."""
        ...

    def split(self, x: Any, dim: int, places: Sequence[int]) -> list[Any]:
        """x in parts that end at `places`, which rise and lie within it."""
        ...

    def mask(self, x: Any, dim: int, first: Any, size: int, fill: float) -> Any:
        """x, whose first row is row `first` of [0, size), with `fill` in the rows outside."""
        ...

    def add(self, x: Any, dim: int, start: Any, rows: Any) -> Any:
        """x with `rows` added at `start`; rows outside of x are zero."""
        ...

    def open(self, shape: Sequence[int], dtype: str, dim: int, rate: int, count: int, size: int) -> Any:
        """A value of `size` rows that comes `rate` rows at a time, `count` times."""
        ...

    def put(self, sink: Any, dim: int, i: Any, count: int, rows: Any, first: Any) -> Any:
        """The i-th part (none unless 0 <= i < count), which begins at row `first` of the value."""
        ...

    def close(self, sink: Any, dim: int, first: int, size: int) -> Any:
        """The value, whose first part began at row `first`."""
        ...

    def stack(self, count: int, like: Sequence[Block]) -> Any:
        """Room for `count` lists of blocks, zero to begin with; `like`: shape and dtype of each block."""
        ...

    def push(self, stack: Any, i: Any, blocks: Sequence[Any]) -> Any:
        """List i."""
        ...

    def blocks(self, stack: Any, i: Any, like: Sequence[Block]) -> list[Any]:
        """List i of a stack that is full."""
        ...

    def full(self, stack: Any, joined: bool) -> Any:
        """The stack, after the loop; `joined`: of tensors, which a file can hold."""
        ...

    def vjp(
        self, function: Callable[..., list[Any]], args: Sequence[Any]
    ) -> tuple[list[Any], Callable[..., list[Any]]]:
        """Results of function(*args), and the function from their gradients to those of the arguments."""
        ...

    def differentiable(self, forward: Forward, backward: Backward, args: Sequence[Any]) -> list[Any]:
        """forward(args, saving) with the gradient of `backward(args, saved, results, gradients, wanted)`."""
        ...


class IntegerSteps:
    """Of `Loops`, what is the same wherever nothing is traced for steps unknown: steps are integers, a branch is an `if`."""

    def loop(self, start: Any, stop: Any, body: Body, carry: Any) -> Any:
        """One step after the other."""
        for t in range(start, stop):
            carry = body(t, carry)
        return carry

    def branch(self, on: Any, then: Callable[[], list[Any]], other: Callable[[], list[Any]]) -> list[Any]:
        """`if`."""
        return then() if on else other()

    def mask(self, x: Any, dim: int, first: Any, size: int, fill: float) -> Any:
        """x itself where all of it is inside."""
        return x if first >= 0 and first + x.shape[dim] <= size else where_inside(x, dim, first, size, fill)


@dataclass(frozen=True)
class Tracing:
    """What is known of a trace: `gradients`: it may be differentiated; `executor`: TensorFlow's graph executor runs it, not XLA."""

    gradients: bool = True
    executor: bool = False


UNKNOWN = Tracing()
_TRACING: ContextVar[Tracing] = ContextVar("tracing", default=UNKNOWN)


@contextmanager
def tracing(gradients: bool, executor: bool) -> Iterator[None]:
    """What is traced inside is known to be so. (A graph cannot tell by itself: whoever calls it may ask for gradients, or
    compile it.)
    """
    token = _TRACING.set(Tracing(gradients, executor))
    try:
        yield
    finally:
        _TRACING.reset(token)


def now_tracing() -> Tracing:
    """What `tracing` says of the trace around this call."""
    return _TRACING.get()


def inside(first: Any, length: int, size: int, dim: int, rank: int) -> Any:
    """Which of `length` rows from `first` on lie in [0, size): bool, broadcast along `dim` of `rank` dimensions."""
    count = np.arange(length, dtype="int32").reshape([-1 if d == dim else 1 for d in range(rank)])
    rows = ops.convert_to_tensor(count) + first
    return ops.logical_and(rows >= 0, rows < size)


def where_inside(x: Any, dim: int, first: Any, size: int, fill: float) -> Any:
    """`Loops.mask` in `keras.ops`."""
    valid = inside(first, x.shape[dim], size, dim, len(x.shape))
    return ops.where(valid, x, ops.cast(fill, x.dtype))


def clipped(start: Any, length: int, size: int) -> Any:
    """Indices of rows, the nearest inside for those outside."""
    return ops.clip(ops.convert_to_tensor(np.arange(length, dtype="int32")) + start, 0, size - 1)
