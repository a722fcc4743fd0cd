"""Loops on JAX: see `loops.Loops`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ranger_nn.keras.loops import Backward, Block, Body, Forward, clipped, now_tracing, where_inside


class JaxLoops:
    """One traced body; results are updated in place by XLA."""

    def loop(self, start: Any, stop: Any, body: Body, carry: Any) -> Any:
        """`lax.fori_loop`."""
        return lax.fori_loop(start, stop, body, carry)

    def branch(self, on: Any, then: Callable[[], list[Any]], other: Callable[[], list[Any]]) -> list[Any]:
        """`lax.cond`: only one side runs."""
        return list(lax.cond(on, lambda: tuple(then()), lambda: tuple(other())))

    def zeros(self, shape: Sequence[int], dtype: str) -> Any:
        """Left to XLA."""
        return jnp.zeros(shape, dtype)

    def take(self, x: Any, dim: int, start: Any, length: int) -> Any:
        """A slice; a gather where it hangs over."""
        size = x.shape[dim]
        if size < length:
            return jnp.take(x, clipped(start, length, size), axis=dim)
        return lax.cond(
            jnp.logical_and(start >= 0, start + length <= size),
            lambda: lax.dynamic_slice_in_dim(x, start, length, dim),
            lambda: jnp.take(x, clipped(start, length, size), axis=dim),
        )

    def own(self, x: Any) -> Any:
        """Arrays are their own."""
        return x

    def used(self, windows: Any, value: int) -> None:
        """The compiler knows."""

    def used_all(self, windows: Any) -> None:
        """The compiler knows."""

    def split(self, x: Any, dim: int, places: Sequence[int]) -> list[Any]:
        """Slices."""
        return list(jnp.split(x, list(places), axis=dim))

    def mask(self, x: Any, dim: int, first: Any, size: int, fill: float) -> Any:
        """Fused by XLA into what makes x."""
        return where_inside(x, dim, first, size, fill)

    def add(self, x: Any, dim: int, start: Any, rows: Any) -> Any:
        """In place; by scatter where it hangs over."""
        size, length = x.shape[dim], rows.shape[dim]
        rows = rows.astype(x.dtype)

        def scatter(x: Any) -> Any:
            index = (slice(None),) * dim + (clipped(start, length, size),)
            return x.at[index].add(rows)

        def place(x: Any) -> Any:
            old = lax.dynamic_slice_in_dim(x, start, length, dim)
            return lax.dynamic_update_slice_in_dim(x, old + rows, start, dim)

        if size < length:
            return scatter(x)
        return lax.cond(jnp.logical_and(start >= 0, start + length <= size), place, scatter, x)

    def open(self, shape: Sequence[int], dtype: str, dim: int, rate: int, count: int, size: int) -> Any:
        """One part more than there are: for those that do not count."""
        full = [*shape]
        full[dim] = rate * (count + 1)
        return jnp.zeros(full, dtype)

    def put(self, sink: Any, dim: int, i: Any, count: int, rows: Any, first: Any) -> Any:
        """In place."""
        at = jnp.where(jnp.logical_and(i >= 0, i < count), i, count)
        return lax.dynamic_update_slice_in_dim(sink, rows.astype(sink.dtype), at * rows.shape[dim], dim)

    def close(self, sink: Any, dim: int, first: int, size: int) -> Any:
        """Without the rows outside."""
        return lax.slice_in_dim(sink, -first, size - first, axis=dim)

    def stack(self, count: int, like: Sequence[Block]) -> Any:
        """An array for each block: XLA lays them out."""
        return [jnp.zeros((count, *shape), dtype) for shape, dtype in like]

    def push(self, stack: Any, i: Any, blocks: Sequence[Any]) -> Any:
        """In place."""
        return [lax.dynamic_update_index_in_dim(s, b.astype(s.dtype), i, 0) for s, b in zip(stack, blocks, strict=True)]

    def blocks(self, stack: Any, i: Any, like: Sequence[Block]) -> list[Any]:
        """Slices."""
        return [lax.dynamic_index_in_dim(s, i, 0, keepdims=False) for s in stack]

    def full(self, stack: Any, joined: bool) -> Any:
        """As it is."""
        return stack

    def vjp(
        self, function: Callable[..., list[Any]], args: Sequence[Any]
    ) -> tuple[list[Any], Callable[..., list[Any]]]:
        """`jax.vjp`."""
        results, pull = jax.vjp(lambda *a: tuple(function(*a)), *args)
        return list(results), lambda grads: list(
            pull(tuple(g.astype(r.dtype) for g, r in zip(grads, results, strict=True)))
        )

    def differentiable(self, forward: Forward, backward: Backward, args: Sequence[Any]) -> list[Any]:
        """`jax.custom_vjp`; without a gradient nothing is saved."""
        if not now_tracing().gradients:
            return forward(args, False)[0]
        wanted: list[bool] = []

        @jax.custom_vjp
        def run(*args: Any) -> Any:
            return tuple(forward(args, False)[0])

        def ahead(*primals: Any) -> Any:
            wanted[:] = [bool(p.perturbed) for p in primals]
            args = tuple(p.value for p in primals)
            results, saved = forward(args, True)
            return tuple(results), (args, saved, tuple(results))

        def back(kept: Any, grads: Any) -> Any:
            args, saved, results = kept
            known = [None if _no_gradient(g) else g for g in grads]
            found = backward(args, saved, results, known, wanted)
            return tuple(None if g is None else g.astype(a.dtype) for g, a in zip(found, args, strict=True))

        run.defvjp(ahead, back, symbolic_zeros=True)
        return list(run(*args))


def _no_gradient(g: Any) -> bool:
    return isinstance(g, jax.custom_derivatives.SymbolicZero) or getattr(g, "dtype", None) == jax.dtypes.float0
