"""Affine maps of a state in order: the monoid behind every linear recurrence.

A step of a recurrence is a map  h -> a * h + b;  steps one after the other are such a map again:

    (a2, b2) after (a1, b1)      h -> a2 * (a1 * h + b1) + b2      =   (a2 * a1,  a2 * b1 + b2)

So a slice of a sequence, however long, is summed up by two arrays: the product of its decays, and its last state when it
begins at zero. Merging is associative but not commutative: slices must come in order. Nothing is divided, so decays
may be zero, tiny, negative, larger than one or complex (Blelloch 1990, Prefix sums and their applications, section 1.4).

A decay may be narrower than the state and is broadcast: gated linear attention has a state (keys, values) that decays by
(keys, 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ranger_nn.aggregate.monoid import State, present


@dataclass(frozen=True)
class Affine:
    """Composition of affine maps in order. State: (decay, value)."""

    def empty(self, xp: Any, decay: Any, value: Any) -> State:
        """The map that changes nothing, shaped like `decay` and `value`."""
        return xp.ones_like(decay), xp.zeros_like(value)

    def lift(self, xp: Any, decay: Any, value: Any, where: Any = None) -> State:
        """The map of one step, h -> decay * h + value; where `where` (bool, broadcast) is False, no step."""
        return present(xp, decay, where, 1.0), present(xp, value, where, 0.0)

    def merge(self, xp: Any, first: State, second: State) -> State:
        """`first`, then `second`."""
        return second[0] * first[0], second[0] * first[1] + second[1]

    def merge_into(self, xp: Any, first: State, second: State) -> None:
        """`merge`, written over `first`: for a namespace that has `addcmul` (PyTorch)."""
        xp.addcmul(second[1], second[0], first[1], out=first[1])
        xp.mul(first[0], second[0], out=first[0])

    def finish(self, xp: Any, state: State, initial: Any) -> Any:
        """The state after all steps, beginning at `initial`."""
        return state[0] * initial + state[1]
