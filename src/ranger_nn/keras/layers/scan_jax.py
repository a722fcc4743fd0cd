"""The linear scan on JAX: loops that XLA compiles once, whatever the number of steps, and a backward of its own."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ranger_nn.aggregate.monoid import State
from ranger_nn.layers.scan import AFFINE, chunked, gradients, slice_lengths

LENGTH = 64
"""Steps of a slice: loops of XLA cost less per step than calls do, so that longer slices are best here."""


class Loops:
    """Local computation by `fori_loop`; the steps are read and written where they lie."""

    def summary(self, a: Any, b: Any, reverse: bool) -> State:
        """Merge the steps in order."""
        length = b.shape[2]

        def merge(i: Any, state: State) -> State:
            t = length - 1 - i if reverse else i
            return AFFINE.merge(jnp, state, (_at(a, t), _at(b, t)))

        return lax.fori_loop(0, length, merge, AFFINE.empty(jnp, a[:, :, 0], b[:, :, 0]))

    def run(self, a: Any, b: Any, start: Any, reverse: bool, out: Any) -> Any:
        """The step loop, in all slices at once."""
        length = b.shape[2]

        def step(i: Any, carried: tuple[Any, Any]) -> tuple[Any, Any]:
            t = length - 1 - i if reverse else i
            state = AFFINE.finish(jnp, (_at(a, t), _at(b, t)), carried[0])
            return state, lax.dynamic_update_index_in_dim(carried[1], state, t, 2)

        return lax.fori_loop(0, length, step, (start, jnp.zeros_like(b)))[1]


def _at(x: Any, t: Any) -> Any:
    return lax.dynamic_index_in_dim(x, t, 2, keepdims=False)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def scan(a: Any, b: Any, initial: Any, chunk: int | None) -> Any:
    """All states."""
    return _states(a, b, initial, chunk)


@partial(jax.jit, static_argnums=(3,))
def _states(a: Any, b: Any, initial: Any, chunk: int | None) -> Any:
    return chunked(jnp, Loops(), a, b, initial, slice_lengths(b.shape[1], chunk or LENGTH))


@partial(jax.jit, static_argnums=(4,))
def _gradients(grad: Any, a: Any, h: Any, initial: Any, chunk: int | None) -> tuple[Any, Any, Any]:
    return gradients(jnp, Loops(), grad, a, h, initial, slice_lengths(h.shape[1], chunk or LENGTH))


def _forward(a: Any, b: Any, initial: Any, chunk: int | None) -> tuple[Any, Any]:
    h = _states(a, b, initial, chunk)
    return h, (a, h, initial)


def _backward(chunk: int | None, kept: Any, grad: Any) -> tuple[Any, Any, Any]:
    return _gradients(grad, *kept, chunk)


scan.defvjp(_forward, _backward)


def pair(re: Any, im: Any) -> Any:
    """A complex array."""
    return lax.complex(re, im)


def parts(z: Any) -> tuple[Any, Any]:
    """Real and imaginary."""
    return jnp.real(z), jnp.imag(z)


def polar(size: Any, angle: Any) -> Any:
    """size * exp(i angle), in the precision of both."""
    return lax.complex(size * jnp.cos(angle), size * jnp.sin(angle))
