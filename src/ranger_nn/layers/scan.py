"""Linear recurrences h_t = a_t * h_{t-1} + b_t by slices of time: exact, in a few long steps instead of many short ones.

    partition    T = 10, length 4        0 1 2 3 | 4 5 6 7 | 8 9          two slices of 4, two steps left over
    local        summary of each slice   (A, B)    (A, B)                 all slices at once, `length` steps
    aggregate    states at the ends      h_3       h_7                    the same recurrence over summaries, by slices
    local        states inside           0 1 2 3 | 4 5 6 7                all slices at once, from the end before them
                                                           | 8 9          the left over steps, from the last end

The summary is the affine map of `aggregate.affine`. Nothing is divided and no long product is undone, so that the numbers
are those of the step loop up to rounding for decays that are zero, tiny, negative, complex, or above 1 as long as their
product over a slice can be represented. a and b are read twice, h is written once; beyond these only the summaries are
held, 1/length of a and b. T = 32768 takes 3 * (16 + 16 + 16) calls. In backward

    g_t = dh_t + conj(a_{t+1}) * g_{t+1},     db_t = g_t,     da_t = g_t * conj(h_{t-1}),     dinitial = conj(a_0) * g_0

is a linear recurrence again, in reverse. Enter at `chunked`; `Local` is what an adapter brings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from ranger_nn.aggregate.affine import Affine
from ranger_nn.aggregate.monoid import State
from ranger_nn.errors import InputError, PartitionError

LENGTH, SHORT = 16, 64
"""Steps of a slice; sequences of up to SHORT steps are not cut."""

AFFINE = Affine()


class Local(Protocol):
    """The computation inside slices; a and b are (batch, slices, length, ...), all slices at once."""

    def summary(self, a: Any, b: Any, reverse: bool) -> State:
        """(product of a, last state from zero) of each slice, both (batch, slices, ...)."""
        ...

    def run(self, a: Any, b: Any, start: Any, reverse: bool, out: Any) -> Any:
        """All states (batch, slices, length, ...) from `start` (batch, slices, ...), in `out` where it is given."""
        ...


def chunked(
    xp: Any, local: Local, a: Any, b: Any, initial: Any, lengths: Sequence[int], reverse: bool = False, out: Any = None
) -> Any:
    """All states (batch, time, ...) of the recurrence; reverse: from the last step to the first.

    Args:
        xp: array namespace.
        local: computation inside slices.
        a, b: (batch, time, ...).
        initial: (batch, ...) state before the first step (reverse: after the last).
        lengths: of slices, of slices of slices, and so on; beyond these one slice.
        reverse: direction.
        out: array for the result, where arrays can be written to.
    """
    steps = b.shape[1]
    if not lengths or steps <= lengths[0]:
        inside = local.run(a[:, None], b[:, None], initial[:, None], reverse, None if out is None else out[:, None])
        return inside[:, 0]
    length = lengths[0]
    slices, rest = divmod(steps, length)
    main, tail = (slice(rest, None), slice(0, rest)) if reverse else (slice(0, steps - rest), slice(steps - rest, None))
    x, y, z = (None if v is None else folded(xp, v[:, main], slices, length) for v in (a, b, out))
    decay, value = local.summary(x, y, reverse)
    ends = chunked(xp, local, decay, value, initial, lengths[1:], reverse)
    first = initial[:, None]
    starts = xp.concat([ends[:, 1:], first] if reverse else [first, ends[:, :-1]], axis=1)
    inside = local.run(x, y, starts, reverse, z)
    if rest:
        last = ends[:, :1] if reverse else ends[:, -1:]
        written = None if out is None else out[:, None, tail]
        after = local.run(a[:, None, tail], b[:, None, tail], last, reverse, written)[:, 0]
    if out is not None:
        return out
    inside = xp.reshape(inside, (-1, steps - rest, *b.shape[2:]))
    if not rest:
        return inside
    return xp.concat([after, inside] if reverse else [inside, after], axis=1)


def gradients(
    xp: Any, local: Local, grad: Any, a: Any, h: Any, initial: Any, lengths: Sequence[int]
) -> tuple[Any, Any, Any]:
    """(da, db, dinitial) from the gradient of all states, in new arrays: see this module's docstring.

    a, h and initial come conjugated where the framework's gradients of complex numbers are (PyTorch and TensorFlow, not JAX).
    """
    later = xp.concat([a[:, 1:], xp.zeros_like(a[:, :1])], axis=1)
    g = chunked(xp, local, later, grad, xp.zeros_like(initial), lengths, reverse=True)
    before = xp.concat([initial[:, None], h[:, :-1]], axis=1)
    return g * before, g, a[:, 0] * g[:, 0]


def slice_lengths(steps: int, chunk: int | None = None) -> tuple[int, ...]:
    """Steps of a slice, of a slice of slices, and so on until few are left."""
    found: list[int] = []
    length = chunk or LENGTH
    while steps > (SHORT if not chunk or found else length) and length > 1:
        found.append(length)
        steps, length = steps // length, LENGTH
    return tuple(found)


def check_scan(a: Sequence[Any], b: Sequence[Any], initial: Sequence[Any] | None, chunk: int | None) -> None:
    """Refuse shapes and slices that make no recurrence; sizes that are not known (None) are not looked at.

    Raises:
        InputError: shapes that differ, no step.
        PartitionError: chunk below 1.
    """
    if len(b) < 2 or differ(a, b):
        raise InputError(
            f"linear_scan takes a and b of one shape (batch, time, ...); got a {tuple(a)} and b {tuple(b)}. Decays that "
            "are the same for all steps are broadcast by the caller, for example with expand or broadcast_to"
        )
    if b[1] is not None and b[1] < 1:
        raise InputError(f"linear_scan needs at least one step; b has shape {tuple(b)}, time is its axis 1")
    if initial is not None and differ(initial, (b[0], *b[2:])):
        raise InputError(
            f"initial is the state before the first step, (batch, ...) = {(b[0], *b[2:])} for b {tuple(b)}; got "
            f"{tuple(initial)}"
        )
    check_chunk(chunk)


def check_chunk(chunk: int | None) -> None:
    """Refuse slices of no step."""
    if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
        raise PartitionError(f"chunk is the number of steps of a slice, at least 1; got {chunk!r}. None chooses it")


def differ(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Shapes that cannot be the same."""
    return len(one) != len(other) or any(p is not None and q is not None and p != q for p, q in zip(one, other))


def folded(xp: Any, x: Any, slices: int, length: int) -> Any:
    """(batch, slices * length, ...) -> (batch, slices, length, ...)."""
    return xp.reshape(x, (-1, slices, length, *x.shape[2:]))


def in_order(length: int, reverse: bool) -> range:
    """Steps of a slice in the order of the recurrence."""
    return range(length - 1, -1, -1) if reverse else range(length)


class InPlace:
    """Local computation written where it belongs, for PyTorch's namespace (given, not imported: two adapters run on it)."""

    def __init__(self, torch: Any) -> None:
        self.torch = torch

    def summary(self, a: Any, b: Any, reverse: bool) -> State:
        """Merge the steps in order, in one pair of arrays."""
        decays, values = a.unbind(2), b.unbind(2)
        order = in_order(len(values), reverse)
        first, like = order[0], self.torch.contiguous_format
        state = decays[first].clone(memory_format=like), values[first].clone(memory_format=like)
        for t in order[1:]:
            AFFINE.merge_into(self.torch, state, (decays[t], values[t]))
        return state

    def run(self, a: Any, b: Any, start: Any, reverse: bool, out: Any) -> Any:
        """The step loop, in all slices at once."""
        out = self.torch.empty(b.shape, dtype=b.dtype, device=b.device) if out is None else out
        decays, values, states = a.unbind(2), b.unbind(2), out.unbind(2)
        state = start
        for t in in_order(len(values), reverse):
            self.torch.addcmul(values[t], decays[t], state, out=states[t])
            state = states[t]
        return out


def scan_in_place(torch: Any, a: Any, b: Any, initial: Any, chunk: int) -> Any:
    """All states, in a new tensor: `chunked` for PyTorch, outside of autograd."""
    out = torch.empty(b.shape, dtype=b.dtype, device=b.device)
    if out.numel():
        chunked(_Concat(torch), InPlace(torch), a, b, initial, slice_lengths(b.shape[1], chunk), out=out)
    return out


def gradients_in_place(torch: Any, grad: Any, a: Any, h: Any, initial: Any, chunk: int) -> tuple[Any, Any, Any]:
    """(da, db, dinitial) from the gradient of all states: see this module's docstring."""
    g, da = (torch.empty(h.shape, dtype=h.dtype, device=h.device) for _ in range(2))
    if not g.numel():
        return da, g, torch.zeros(initial.shape, dtype=h.dtype, device=h.device)
    if h.is_complex():
        a, h, initial = (x.conj().resolve_conj() for x in (a, h, initial))
    g[:, -1] = grad[:, -1]
    lengths = slice_lengths(h.shape[1] - 1, chunk)
    if h.shape[1] > 1:
        chunked(_Concat(torch), InPlace(torch), a[:, 1:], grad[:, :-1], g[:, -1], lengths, True, g[:, :-1])
        torch.mul(g[:, 1:], h[:, :-1], out=da[:, 1:])
    torch.mul(g[:, 0], initial, out=da[:, 0])
    first = torch.empty(initial.shape, dtype=h.dtype, device=h.device)
    return da, g, torch.mul(a[:, 0], g[:, 0], out=first)


class _Concat:
    """The array API names that `chunked` calls, on PyTorch."""

    def __init__(self, torch: Any) -> None:
        self.concat, self.reshape = torch.cat, torch.reshape
