"""Which library convolves, what is called in its place, and that its numbers and gradients are right."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from ranger_nn.torch import kernels_convolution as kernels
from ranger_nn.torch.layout import channels_last
from ranger_nn.torch.workspace import Convolved

ONEDNN = ("Mkldnn", "???")  # PyTorch has no name for the transposed one
pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")


def sizes(r: random.Random) -> Convolved:
    """A call drawn at random."""
    rank, groups, transposed = r.choice((1, 2, 3)), r.choice((1, 1, 2, 4)), r.random() < 0.3
    inner = [r.randint(10, 40) * (100 if rank == 1 else 1) for _ in range(rank)]
    kernel, stride = [r.choice((1, 1, 2, 3, 4, 5)) for _ in range(rank)], [r.choice((1, 1, 2))] * rank
    padding, dilation = [r.choice((0, 1))] * rank, [r.choice((1, 1, 2))] * rank
    extra = (r.choice((0, stride[0] - 1)),) * rank if transposed else ()
    channels = (r.choice((4, 8, 64)), r.choice((4, 16)))
    dtype = r.choice((torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64))
    return Convolved(
        r.choice((1, 1, 2, 16)), channels, tuple(inner), (2,) * rank, tuple(kernel), tuple(stride), tuple(padding),
        tuple(dilation), groups, transposed, extra, dtype,
    )  # fmt: skip


@pytest.mark.parametrize("threads", [1, 2])
def test_the_library_is_the_one_that_pytorch_picks(threads: int) -> None:
    """The rule is PyTorch's own, which has no public name: ask it, on tensors that take no memory."""
    pick = torch._C._select_conv_backend
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for seed in range(1000):
            c = sizes(random.Random(seed))
            ci, co = c.channels if c.transposed else c.channels[::-1]
            x = torch.zeros((), dtype=c.dtype).expand(c.batch, c.channels[0], *c.inner)
            weight = torch.zeros((), dtype=c.dtype).expand(ci, co // c.groups, *c.kernel)
            extra = list(c.extra) or [0] * len(c.kernel)
            options = (list(c.stride), list(c.padding), list(c.dilation), c.transposed, extra, c.groups, None)
            assert (str(pick(x, weight, None, *options))[13:] in ONEDNN) == c.onednn, c
    finally:
        torch.set_num_threads(before)


def near(found: Tensor, wanted: Tensor) -> bool:
    """To the digits of float32."""
    return float((found.double() - wanted).abs().max()) <= 3e-6 * float(wanted.abs().max())


CALLS = {
    "volume": ((1, 32, 8, 16, 32), (24, 32, 3, 3, 3), 1, 1, 1, False),
    "strided volume": ((1, 16, 9, 17, 40), (24, 16, 3, 3, 3), 2, 1, 1, False),
    "one channel": ((1, 1, 24, 32, 80), (16, 1, 3, 3, 3), 1, 1, 1, False),
    "to one channel": ((1, 32, 9, 16, 40), (1, 32, 3, 3, 3), 1, 1, 1, False),
    "transposed volume": ((1, 32, 4, 16, 32), (32, 24, 3, 3, 3), 2, 1, 1, True),
    "transposed image": ((1, 16, 32, 32), (16, 16, 3, 7), 1, 1, 1, True),
}


@pytest.mark.parametrize("case", CALLS)
def test_called_directly(case: str) -> None:
    """Result and gradients against float64, where PyTorch would unfold 256 kB or more."""
    shape, weights, stride, padding, dilation, transposed = CALLS[case]
    generator = torch.Generator().manual_seed(0)
    x = channels_last(torch.randn(shape, generator=generator))
    weight, rank = torch.randn(weights, generator=generator), len(shape) - 2
    s, p, d, zeros = [stride] * rank, [padding] * rank, [dilation] * rank, [0] * rank
    wanted = torch.ops.aten.convolution(x.double(), weight.double(), None, s, p, d, transposed, zeros, 1)
    called = Convolved(
        1, (shape[1], wanted.shape[1]), shape[2:], tuple(wanted.shape[2:]), weights[2:], tuple(s), tuple(p), tuple(d),
        1, transposed, tuple(zeros) if transposed else (), channels_last=True,
    )  # fmt: skip
    assert called.direct
    if transposed:
        y = kernels.transpose_directly(x, weight, None, s, p, zeros, 1, d)
    else:
        y = torch.ops.aten.mkldnn_convolution(x, weight, None, p, s, d, 1)
    assert y.layout is torch.strided and near(y, wanted)
    grad = channels_last(torch.randn(wanted.shape, generator=generator))
    found = kernels.pull_directly(called)(grad, x, weight, None, s, p, d, transposed, zeros, 1, (True, True, False))
    doubles = (t.double() for t in (grad, x, weight))
    right = torch.ops.aten.convolution_backward(*doubles, None, s, p, d, transposed, zeros, 1, [True, True, False])
    assert near(found[0], right[0]) and near(found[1], right[1])
    assert found[1].is_contiguous()
