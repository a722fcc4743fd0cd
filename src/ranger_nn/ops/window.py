"""Operators with a sliding window: convolution, transposed convolution, pooling.

out o reads in [ o*stride - pad , o*stride - pad + dilation*(kernel-1) ]                (convolution, pooling)
in i writes out i*stride - pad + j*dilation, j in [0, kernel)                   (transposed convolution)
"""

from __future__ import annotations

from collections.abc import Sequence

from ranger_nn.core.graph import Rule
from ranger_nn.core.reach import Link, Reach
from ranger_nn.ops.pointwise import Shape

Ints = Sequence[int]


def window_reach(kernel: int, stride: int, dilation: int, pad: int) -> Reach:
    """Four integers of a convolution or pooling window; `pad` is the padding before the first index."""
    return Reach(stride, -pad, -pad + dilation * (kernel - 1))


def transposed_reach(kernel: int, stride: int, dilation: int, pad: int) -> Reach:
    """Four integers of a transposed convolution (Dumoulin & Visin 2016, section 4)."""
    first = pad - dilation * (kernel - 1) + stride - 1
    return Reach(1, min(first, pad), pad, stride)


def window(shape: Shape, reaches: Sequence[Reach], others: Sequence[Shape] = ()) -> Rule:
    """Rule of a window operator on `shape` = (batch, channels, *space); `others` (weight, bias) are read whole."""
    lead = len(shape) - len(reaches)
    row: list[Link | None] = [Link(0) if lead == 2 else None] * (lead - 1) + [None]
    row += [Link(lead + i, r) for i, r in enumerate(reaches)]
    return Rule((tuple(row), *((None,) * len(s) for s in others)))


def channelwise_window(shape: Shape, reaches: Sequence[Reach]) -> Rule:
    """Rule of a pooling operator: channels are local too."""
    lead = len(shape) - len(reaches)
    return Rule((tuple(Link(d) for d in range(lead)) + tuple(Link(lead + i, r) for i, r in enumerate(reaches)),))


def adaptive_reach(size: int, out: int) -> Reach:
    """Adaptive pooling: output o reads [floor(o*size/out), ceil((o+1)*size/out))."""
    return Reach(size, 0, size - 1, out)


def pooled_size(size: int, kernel: int, stride: int, dilation: int, pad: int, ceil_mode: bool) -> int:
    """Output size of a pooling window, with the framework's rule that no window starts in the far padding."""
    span = size + 2 * pad - dilation * (kernel - 1) - 1
    out = (span + (stride - 1 if ceil_mode else 0)) // stride + 1
    return out - 1 if ceil_mode and (out - 1) * stride >= size + pad else out
