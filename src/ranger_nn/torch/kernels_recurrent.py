"""Kernels of recurrences: one layer, one direction of LSTM, GRU or RNN, over a region of time or all of it in chunks.

    forward     state ->[chunk 0]-> border 0 ->[chunk 1]-> border 1 -> ...        borders are kept for backward
    backward    chunks from the last to the first: computed again from the border before it, with gradients on,
                and pulled back; the gradient of the state goes on to the chunk before

What runs on a chunk is PyTorch's own operator (oneDNN's fused LSTM in single and half precision), so that numbers and
speed are the untouched ones. Layers, directions and dropout between them are taken apart in `lowering_recurrent.py`.
Enter at `Recurrence`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ranger_nn.core.program import Extent
from ranger_nn.core.reach import Box
from ranger_nn.ops.recurrence import borders, chunk_length, least_chunk
from ranger_nn.torch.kernels import SMALL_TENSORS, Kernel, Local, fresh, packed
from ranger_nn.torch.workspace import BLOCK

GATES = {"lstm": 4, "gru": 3}
FUNCTIONS = {"lstm": torch.lstm, "gru": torch.gru, "rnn_tanh": torch.rnn_tanh, "rnn_relu": torch.rnn_relu}

FUSED_BYTES = 72 << 10
"""What oneDNN takes besides, whatever the sizes."""


def padded(width: int) -> int:
    """A width as oneDNN lays it out: in whole vectors, as channels are in whole blocks."""
    return -(-width // BLOCK) * BLOCK


class Sizes:
    """Elements that one step of one sample takes: what the operator computes, and what autograd keeps of it.

    Counted with `ranger_nn.measure` on PyTorch 2.13. The step loop keeps its gates, their parts and the states, once
    more the input's gradient. oneDNN's LSTM pads widths to 16 (and once more at
    multiples of 256), and for one sample it has no room to reuse.
    """

    def __init__(self, mode: str, features: int, hidden: int, out: int, samples: int, fused: int) -> None:
        """`out`: width of an output (`proj_size`, or the hidden size); `fused`: bytes of oneDNN's elements, 0: loop."""
        gates = GATES.get(mode, 1)
        self.forward = gates * hidden + 2 * out
        loop = {"lstm": 12, "gru": 11}.get(mode, 3) * hidden + (0 if out == hidden else 2 * out)
        self.saved = max(loop, features + (gates + 1) * hidden)
        if fused:
            wide = padded(max(features, hidden))
            wide += 0 if wide % 256 else BLOCK
            alone = 4 * hidden + 16 if samples == 1 else 0
            self.forward = 3 * padded(hidden) + 2 * wide + alone * (4 // fused)
            self.saved = (14 * hidden + 6 * wide + 32 + features) * (2 if fused == 4 else 3) // 2


class Recurrence(Kernel):
    """Inputs x, the state before the first step (h, or h and c), weights; region by region also the state so far.

    Outputs: y (unless `gives` is off), the state behind the last step, and with `saves` the states at the borders of
    chunks. x is (steps, samples, features), or (samples, steps, features) with `time` 1; a state is (1, samples, width).
    """

    def __init__(
        self, mode: str, shape: Sequence[int], time: int, weights: Sequence[Sequence[int]], biases: bool, out: int
    ) -> None:
        """`shape`: of x; `weights`: their shapes; `out`: width of an output."""
        self.mode, self.time, self.biases = mode, time, biases
        self.states = 2 if mode == "lstm" else 1
        self.steps, self.samples = shape[time], shape[1 - time]
        self.features, self.out = shape[2], out
        self.hidden = weights[1][0] // GATES.get(mode, 1)
        self.count, self.weights = len(weights), sum(torch.Size(w).numel() for w in weights)
        self.reverse, self.saves, self.gives, self.fused = False, False, True, False
        self.cast: torch.dtype | None = None

    def planned(
        self, given: torch.dtype, cast: torch.dtype | None, *, reverse: bool, saves: bool, gives: bool, fused: bool
    ) -> Recurrence:
        """`given`: the input's type, `cast`: autocast's; `reverse`: from the last step to the first; `saves`: for backward;
        `fused`: oneDNN runs it.
        """
        self.reverse, self.saves, self.gives, self.fused, self.cast = reverse, saves, gives, fused, cast
        self.input_size = given.itemsize
        self.itemsize = itemsize = 4 if cast else self.input_size  # some of it stays in 32 bits
        self.computes = cast or given
        self.sizes = Sizes(self.mode, self.features, self.hidden, self.out, self.samples, itemsize if fused else 0)
        self.members = max(1, self.sizes.saved // self.out)
        one = self.samples * itemsize
        step = one * (self.sizes.saved if saves else self.sizes.forward)
        state = one * (self.out + (self.states - 1) * self.hidden)
        self.least = least_chunk(self.steps, state, step)
        self.chunk = chunk_length(self.steps, state, step)
        return self

    def with_chunk(self, chunk: int) -> Recurrence:
        """The same with other chunks."""
        other = copy.copy(self)
        other.chunk = chunk
        return other

    @property
    def reason(self) -> str:
        """Why it runs whole, and in which chunks."""
        count = borders(self.steps, self.chunk) + 1
        chunks = f"whole, in {count} chunks of {self.chunk} steps" if count > 1 else "whole"
        if self.saves:
            return f"its gradient goes from the last step to the first: {chunks}, the states between them kept"
        if self.reverse:
            return f"it goes from the last step to the first: {chunks}"
        return f"it takes no part in a slide of a network that trains: {chunks}"

    # ---- running ------------------------------------------------------------------------------------------

    def _spans(self, steps: int) -> list[tuple[int, int]]:
        """(start, length) of chunks, in the order in which they run."""
        spans = [(a, min(self.chunk, steps - a)) for a in range(0, steps, self.chunk)]
        return [(steps - a - n, n) for a, n in spans] if self.reverse else spans

    def _call(self, x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
        """PyTorch's operator on one chunk: y and the state behind it.

        Its loop multiplies by weights once for all steps, and once in each. In 16 bits that copies the weights for every
        step where the input is not in order, and autocast casts them in every step where they need no gradient: here the
        input is put in order, and the weights are cast once.
        """
        function: Any = FUNCTIONS[self.mode]
        before = tuple(states) if self.states > 1 else states[0]
        x = x.flip(self.time) if self.reverse else x
        batch_first = self.time == 1
        if batch_first and not self.fused:
            x = x.transpose(0, 1).flatten().view(x.shape[1], x.shape[0], x.shape[2])  # strides of length 1 as well
        if torch.is_autocast_enabled(x.device.type):
            cast = torch.get_autocast_dtype(x.device.type)
            weights = [w.to(cast) if w.dtype == torch.float32 else w for w in weights]
        train = torch.is_grad_enabled()
        y, *after = function(x, before, weights, self.biases, 1, 0.0, train, False, batch_first and self.fused)
        y = y.transpose(0, 1) if batch_first and not self.fused else y
        return [y.flip(self.time) if self.reverse else y, *after]

    def bind(self, out_box: Box, in_boxes: Sequence[Box]) -> Local:
        """Over the region's steps in chunks; a state that comes after the inputs replaces the one before step 0."""
        spans = self._spans(out_box[self.time][1] - out_box[self.time][0] if self.gives else self.steps)
        inputs, goes_on = 1 + self.states + self.count, len(in_boxes) > 1 + self.states + self.count

        def local(*args: Tensor) -> Any:
            state = args[inputs:] if goes_on else args[1 : 1 + self.states]
            outs = self._run(args[0], state, args[1 + self.states : inputs], spans)
            return outs if len(outs) > 1 else outs[0]

        return local

    def _run(
        self, x: Tensor, state: Sequence[Tensor], weights: Sequence[Tensor], spans: Sequence[tuple[int, int]]
    ) -> list[Tensor]:
        """All outputs in the order of the node's."""
        y: Tensor | None = None
        kept: list[Tensor] = []
        for n, (start, length) in enumerate(spans):
            piece, *after = self._call(x.narrow(self.time, start, length), state, weights)
            if self.saves and not n:
                kept = [a.new_empty((len(spans) - 1, *a.shape[1:])) for a in after]
            if self.saves and n + 1 < len(spans):
                for border, a in zip(kept, after, strict=True):
                    border[n].copy_(a[0])
            if self.gives and len(spans) == 1:
                y = piece
            elif self.gives:
                y = piece.new_empty((*x.shape[:2], self.out)) if y is None else y
                y.narrow(self.time, start, length).copy_(piece)
            state = after
            del piece, after
        return [*([y] if y is not None else []), *state, *kept]

    # ---- pulling back -------------------------------------------------------------------------------------

    def bind_vjp(self, out_box: Box, in_boxes: Sequence[Box], wanted: Sequence[bool]) -> Local:
        """(inputs, borders, gradients of y, of the last state, of borders: none) -> gradients of the inputs."""
        spans = self._spans(self.steps)
        inputs = 1 + self.states + self.count

        def vjp(*args: Any) -> list[Any]:
            given, kept, grads = args[:inputs], args[inputs : inputs + self.states], args[inputs + self.states :]
            grad = grads[0] if self.gives else None
            behind = list(grads[int(self.gives) :][: self.states])
            dx: Tensor | None = None
            sums: list[Tensor | None] = [None] * self.count
            for n in reversed(range(len(spans))):
                at = (self.time, *spans[n])
                state = [k[n - 1 : n] for k in kept] if n else given[1 : 1 + self.states]
                chunk = [given[0].narrow(*at), *state, *given[1 + self.states :]]
                found = self._pull(chunk, None if grad is None else grad.narrow(*at), behind, wanted, n > 0)
                if wanted[0] and len(spans) == 1:
                    dx = found[0]
                elif found[0] is not None:
                    dx = found[0].new_empty(given[0].shape) if dx is None else dx
                    dx.narrow(*at).copy_(found[0])
                behind = found[1 : 1 + self.states]
                for i, g in enumerate(found[1 + self.states :]):
                    before = sums[i]
                    if g is not None:
                        sums[i] = g.clone() if before is None else before.add_(g)
                del found, chunk, state
            likes = [t if w else None for t, w in zip(given, wanted, strict=True)]
            return fresh([dx, *behind, *sums], [t for t in args if t is not None], likes)

        return vjp

    def _pull(
        self,
        given: Sequence[Tensor],
        grad: Tensor | None,
        behind: Sequence[Tensor | None],
        wanted: Sequence[bool],
        inner: bool,
    ) -> list[Tensor | None]:
        """Gradients of one chunk's inputs; `inner`: its state came from another chunk, which waits for its gradient."""
        asked = [w or (inner and 1 <= i <= self.states) for i, w in enumerate(wanted)]
        leaves = [t.detach().requires_grad_(a) for t, a in zip(given, asked, strict=True)]
        with torch.enable_grad():
            outs = self._call(leaves[0], leaves[1 : 1 + self.states], leaves[1 + self.states :])
        pairs = [(o, g.to(o.dtype)) for o, g in zip(outs, [grad, *behind], strict=True) if g is not None]
        del outs
        wants = [t for t, a in zip(leaves, asked, strict=True) if a]
        found = iter(
            torch.autograd.grad([o for o, _ in pairs], wants, [g for _, g in pairs], allow_unused=True)
            if pairs
            else [None] * len(wants)
        )
        return [next(found) if a else None for a in asked]

    # ---- workspace ----------------------------------------------------------------------------------------

    def scratch(self, at: Extent) -> int:
        """What one chunk computes, copies of what is not in order, and reordered weights."""
        steps = at.out_box[self.time][1] - at.out_box[self.time][0] if self.gives else self.steps
        result = self.out if steps <= self.chunk and self.gives else 0  # one chunk: its output is the node's
        copies = max(self.features, self.out) * (int(self.time == 1) + int(self.reverse))
        one = self.samples * ((self.sizes.forward + copies) * self.itemsize + self._casts - result * self.input_size)
        return min(self.chunk, steps) * one + self._reordered(1)

    def vjp_scratch(self, at: Extent) -> int:
        """What autograd saves of a chunk, copies of what is not in order, and the weights' gradients of a chunk."""
        copies = (self.features + self.out) * (int(self.time == 1) + 2 * int(self.reverse))
        copies += self.features if self.chunk < self.steps else 0  # the gradient of a chunk, before it is put in place
        one = self.samples * ((self.sizes.saved + copies) * self.itemsize + 3 * self._casts)
        return min(self.chunk, self.steps) * one + self._reordered(2)

    @property
    def _casts(self) -> int:
        """Bytes of one step of one sample's input in autocast's type."""
        return self.features * self.cast.itemsize if self.cast else 0

    def _reordered(self, times: int) -> int:
        """Weights: as oneDNN wants them, cast, and gradients; with the few vectors that do not grow with time.

        oneDNN sums the gradients of weights in 32 bits, whatever their type; a chunk's are added to those before it.
        """
        wide = max(4, self.itemsize) if self.fused and times > 1 else self.itemsize
        own = times * (self.weights * wide + 8 * self.samples * self.hidden * self.itemsize) + SMALL_TENSORS
        blocks = 4 * padded(self.hidden) * (padded(self.features) + padded(self.hidden)) * wide
        own += max(blocks, self.weights * wide) + times * FUSED_BYTES if self.fused else 0
        own += times * self.weights * self.cast.itemsize if self.cast else 0
        own += self.weights * self.itemsize if times > 1 and self.chunk < self.steps else 0
        own += self.weights * self.itemsize if times > 1 and not self.biases else 0  # the product's copy
        return own + self._packed

    @property
    def _packed(self) -> int:
        """Blocks of the factors of a product in 16 bits."""
        rows, wide = self.chunk * self.samples, GATES.get(self.mode, 1) * self.hidden
        sides = max(self.features, self.out, wide)
        return max(packed(rows, sides, sides, self.computes), packed(wide, sides, rows, self.computes, gradient=True))
