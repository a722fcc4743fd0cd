"""Kernels of the Keras adapter: how one operator runs on a region. Enter at `Kernel`.

    region(dim, rows, start)   the function that one step of a slide calls: `rows` rows of the output along `dim`

`start` is the first of these rows at some step (other steps differ from it by a multiple of what one step makes, so that
`start * num % den` is the same at each). The function is given, of each input, exactly the rows that its link asks
for, not clipped: `link.reach.needs(start, start + rows)`; rows outside of the value hold `fill(i)`. Inputs without a link
to `dim` come whole. It pads the other dimensions as the layer does. With `positional` it also takes the keyword
`position`, the index of the output's first row (an integer tensor): averages that count, edges that repeat, random masks.
`region` itself makes no tensor: a plan that is made while one graph is traced runs in others (`predict`, then `evaluate`).

    whole(*inputs)             the untouched operator
    fill(i)                    what rows outside of input i must hold; None: anything finite, they are not used
    reduces                    see `kernels_reduce.Reduce`: lift, merge, finish
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras

Local = Callable[..., Any]


class Kernel:
    """One operator. By default it runs on a region as it runs on the whole: pointwise, linear, over channels."""

    generates = False
    """Output dimensions that no input has a link to may be cut all the same."""

    chunk = 0
    """No operator works in chunks of its own here."""

    positional = False
    """The function of a region takes the keyword `position`."""

    tame = False
    """Finite rows have finite results and derivatives, with no exception: such as products and sums, not as logarithms and roots."""

    single = False
    """An input that has one row in all may come as it is, whatever window is asked for."""

    given: float | None = None
    """What rows outside of the first input hold; None where they are not used."""

    def __init__(self, function: Callable[..., Any], tame: bool = False) -> None:
        """`function`: the untouched operator of its tensor inputs, constants bound."""
        self.function, self.tame = function, tame or type(self).tame

    def whole(self, *inputs: Any) -> Any:
        """The untouched operator."""
        return self.function(*inputs)

    def region(self, dim: int | None, rows: int, start: int = 0) -> Local:
        """The function of inputs that are cut to what `rows` rows of the output need."""
        return self.function

    def fill(self, position: int) -> float | None:
        """What rows outside of input `position` hold; None: anything finite."""
        return self.given if position == 0 else None

    def scratch(self, out_bytes: int, in_bytes: Sequence[int]) -> int:
        """Bytes of workspace of one call, beyond inputs and output."""
        return 0

    def tape(self, out_bytes: int, in_bytes: Sequence[int]) -> int:
        """Bytes that the back end's autodiff keeps of one call for backward, beyond inputs and output."""
        return 0

    def backward(self, out_bytes: int, in_bytes: Sequence[int]) -> int:
        """Bytes of workspace of one call's backward, beyond what is kept and the gradients."""
        return 0


class Opaque(Kernel):
    """An operator or layer without a region rule: it always sees whole inputs."""

    def scratch(self, out_bytes: int, in_bytes: Sequence[int]) -> int:
        """As much again as it reads and makes."""
        return out_bytes + sum(in_bytes)


class Fused(Kernel):
    """A chain of pointwise operators, run member by member."""

    def __init__(self, steps: Sequence[tuple[Kernel, tuple[int, ...], int]], inputs: int, result: int) -> None:
        """`steps`: (kernel, argument registers, result register); registers below `inputs` are the inputs."""
        self.steps, self.inputs, self.result = steps, inputs, result
        self.tame = all(kernel.tame for kernel, _, _ in steps)

    def _run(self, functions: Sequence[Local], xs: Sequence[Any]) -> Any:
        registers: dict[int, Any] = dict(enumerate(xs))
        last = {a: n for n, (_, arguments, _) in enumerate(self.steps) for a in arguments}
        for n, (function, (_, arguments, out)) in enumerate(zip(functions, self.steps, strict=True)):
            registers[out] = function(*[registers[a] for a in arguments])
            for a in {a for a in arguments if last[a] == n and a != self.result}:
                del registers[a]
        return registers[self.result]

    def whole(self, *inputs: Any) -> Any:
        """The members in order."""
        return self._run([kernel.whole for kernel, _, _ in self.steps], inputs)

    def region(self, dim: int | None, rows: int, start: int = 0) -> Local:
        """The members in order, each on its region."""
        functions = [kernel.region(dim, rows, start) for kernel, _, _ in self.steps]
        return lambda *xs: self._run(functions, xs)

    def fill(self, position: int) -> float | None:
        """Rows outside are not used."""
        return None

    def scratch(self, out_bytes: int, in_bytes: Sequence[int]) -> int:
        """One intermediate beside the result."""
        return out_bytes

    def tape(self, out_bytes: int, in_bytes: Sequence[int]) -> int:
        """Every intermediate and a gradient; PyTorch compiles nothing that would do without."""
        return out_bytes * len(self.steps) if keras.backend.backend() == "torch" else 0
