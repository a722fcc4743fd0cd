"""Channels-last: how windows of feature maps are held on the CPU.

Rows of one sample lie one after the other in memory, so that a slice of rows is dense and rows are joined by plain
copies; oneDNN convolves them without first reordering input and output into its blocked format, which costs as much
memory again and, on the narrow strips of a slide, often more time than the convolution (`design/0004`).

Convolutions bring it in, operators that keep the order of their input pass it on. The caller's inputs and outputs
stay as they are. Enter at `result_layout`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ranger_nn.core.program import Read

CHANNELS_LAST = "channels_last"
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def suits(like: Tensor) -> bool:
    """True where a value shaped like this is better held channels-last."""
    return like.dim() in FORMATS and like.device.type == "cpu" and like.dtype in FLOATS


def result_layout(kept: str, inputs: Sequence[tuple[int, str]], like: Tensor) -> str:
    """Layout of a result: `kept` is the kernel's word ("makes", "keeps" or ""), `inputs` are (rank, layout)."""
    if not suits(like) or kept == "":
        return ""
    if kept == "makes":
        return CHANNELS_LAST
    same = [layout for rank, layout in inputs if rank == like.dim()]
    return CHANNELS_LAST if same and same[0] == CHANNELS_LAST else ""


def channels_last(x: Tensor) -> Tensor:
    """The tensor in channels-last strides, copied where it has others."""
    x = x.contiguous(memory_format=FORMATS[x.dim()])
    if x.shape[1] != 1:
        return x
    strides, step = [0] * x.dim(), 1  # one channel: both orders are the same bytes, the strides must say which
    for d in (1, *reversed(range(2, x.dim())), 0):
        strides[d] = step
        step *= x.shape[d]
    return x.as_strided(x.shape, strides)


def in_strides(x: Tensor, strides: Sequence[int] | None) -> Tensor:
    """The tensor in these strides (plain ones where they leave gaps or there are none), copied where it has others."""
    if strides is None or not gapless(x.shape, strides):
        return x.contiguous()
    if all(a == b for n, a, b in zip(x.shape, x.stride(), strides, strict=True) if n != 1):
        return x
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)


def gapless(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """True where a tensor fills its memory without gap or overlap."""
    step = 1
    for stride, n in sorted((s, n) for s, n in zip(strides, shape, strict=True) if n != 1):
        if stride != step:
            return False
        step *= n
    return True


def dense(read: Read) -> bool:
    """True where the region, held channels-last, needs no copy: joined, uncut, or rows of a single sample."""
    if len(read.parts) != 1:
        return True
    return all(dim == 2 and read.box[0][1] - read.box[0][0] == 1 for dim, _, _ in read.parts[0][1])
