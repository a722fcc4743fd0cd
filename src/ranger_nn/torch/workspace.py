"""What one convolution takes beside its inputs and its result, on the CPU: which library PyTorch picks, and its buffers.

    oneDNN      channels-last: weights reordered; else input and output in blocks of sixteen channels as well
    unfolding   a column for each output place: kernel size times the input (float64, float16, small float32 calls)

PyTorch leaves small float32 calls to the unfolding ones, by a rule that counts neither the last dimension nor the
kernel: a slab of a volume costs 27 times its input there. `direct` says where oneDNN is called in PyTorch's place.
Enter at `Convolved`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import torch

Ints = tuple[int, ...]

SMALL = 192 << 10
"""Bytes that oneDNN may take on small regions, whatever their size, for each thread."""

WINOGRAD = 640 << 10
"""The same where it may choose Winograd's algorithm (windows of 3, stride 1), for each matrix that it transforms."""

BLOCK = 16
"""Channels of a block in oneDNN's own layout, with AVX-512 (eight with less)."""

FEW = 20480
"""PyTorch's own number: float32 calls of one sample with fewer elements (the last dimension not counted) are unfolded."""

FEWEST = 64 << 10
"""The same on the smallest regions."""

WINDOW = 7
"""The longest window that oneDNN has kernels for in every form."""

VOLUME = 5
"""The same of volumes; for the gradient of weights one less."""

SUMS = 4 << 10
"""Bytes of what attention keeps besides, for each thread."""

UNFOLDED = 256 << 10
"""Bytes of columns from which on oneDNN is called in place of unfolding: below, unfolding is as fast and small."""


@dataclass(frozen=True)
class Convolved:
    """Sizes of one call as PyTorch gets it: `inner` and `outer` are the spatial sizes of its input and its output.

    `plain`: the weights are known to be in their usual order; `ours`: a kernel of Ranger's calls, which may call oneDNN
    itself.
    """

    batch: int
    channels: tuple[int, int]
    inner: Ints
    outer: Ints
    kernel: Ints
    stride: Ints
    padding: Ints
    dilation: Ints
    groups: int = 1
    transposed: bool = False
    extra: Ints = ()
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    plain: bool = False
    ours: bool = True

    @property
    def x(self) -> int:
        """Bytes of the input."""
        return self.batch * self.channels[0] * prod(self.inner) * self.dtype.itemsize

    @property
    def y(self) -> int:
        """Bytes of the output."""
        return self.batch * self.channels[1] * prod(self.outer) * self.dtype.itemsize

    @property
    def weights(self) -> int:
        """Bytes of the weights."""
        return prod(self.channels) // self.groups * prod(self.kernel) * self.dtype.itemsize

    @property
    def onednn(self) -> bool:
        """Whether PyTorch itself calls oneDNN (`ConvParams::use_mkldnn` of ATen/native/Convolution.cpp)."""
        if not available(self.dtype) or any(e >= s for e, s in zip(self.extra, self.stride, strict=False)):
            return False
        if self.dtype != torch.float32:
            return True
        window = (1, *self.kernel)[-2:]
        sizes = (1, *self.inner)[-max(2, len(self.inner)) :][:2]
        strided = any(n != 1 for n in (*self.stride, *self.dilation))
        plain = not strided and self.batch < BLOCK and window == (1, 1) and torch.get_num_threads() == 1
        large = self.batch > 1 or self.batch * self.channels[0] * prod(sizes) > FEW
        return not plain and (self.groups > 1 or min(window) > 3 or large)

    @property
    def direct(self) -> bool:
        """Whether oneDNN is to be called where PyTorch would unfold."""
        fits = self.dtype == torch.float32 and len(self.kernel) > 1 and available(self.dtype) and self.groups == 1
        extra = all(e < s for e, s in zip(self.extra, self.stride, strict=False))
        if not (self.ours and fits and extra and PRIVATE) or self.onednn or self.columns <= UNFOLDED:
            return False
        return self._forward() < self.columns  # not where the weights are what weighs

    @property
    def columns(self) -> int:
        """Bytes of the input (transposed: of the output) unfolded."""
        if not (self.transposed or any(self.padding)) and {*self.kernel, *self.stride, *self.dilation} == {1}:
            return 0
        places = prod(self.inner) if self.transposed else prod(self.outer)
        channels = self.channels[1] if self.transposed else self.channels[0]
        return self.batch * channels // self.groups * prod(self.kernel) * places * self.dtype.itemsize

    @property
    def depthwise(self) -> bool:
        """Whether each channel is convolved by itself."""
        return 1 < self.groups == self.channels[0] == self.channels[1]

    def usual(self, what: str) -> bool:
        """Whether oneDNN has a kernel of its own for this form on every machine; else it may unfold, too.

        `what`: "down" (a convolution, or the gradient of a transposed one's input), "up" (the other way), "weights".
        """
        strided, dilated, volume = max(self.stride) > 1, max(self.dilation) > 1, len(self.kernel) == 3
        if self.dtype != torch.float32 and min(self.channels) < 3:
            return False
        patches = self.kernel == self.stride and not dilated and (not self.transposed or what == "down")
        longest = WINDOW if not volume else VOLUME - 1 if what == "weights" else VOLUME
        window = patches or max(self.kernel) <= longest
        if not window or (strided and dilated) or (dilated and max(self.kernel) == 1):
            return False
        if what != "down" and not (max(self.stride) <= 2 or self.kernel == self.stride):
            return False
        if what != "down" and ((dilated and max(*self.kernel, max(self.dilation) + 1) > 3) or self._wide_border()):
            return False
        heavy = volume or self.dtype != torch.float32
        if what != "down" and dilated and (self.transposed or (heavy and what == "weights")):
            return False
        if self.groups == 1:
            return True
        if self.depthwise:
            return not dilated and len(self.kernel) == 2 and not self.transposed
        return not dilated and not self.transposed and not any(c // self.groups % 8 for c in self.channels)

    def _wide_border(self) -> bool:
        return any(p > d * (k // 2) for p, k, d in zip(self.padding, self.kernel, self.dilation, strict=True))

    @property
    def blocked(self) -> tuple[int, int, int]:
        """Bytes of input, output and weights with the channels of each group padded to whole blocks."""
        c_in, c_out = self.channels
        if self.depthwise:  # blocks go across the groups
            up = -(-c_in // BLOCK) * BLOCK
            return self.x * up // c_in, self.y * up // c_out, self.weights * up // c_in
        a, b = (c // self.groups for c in self.channels)
        up_a, up_b = (-(-c // BLOCK) * BLOCK for c in (a, b))
        return self.x * up_a // a, self.y * up_b // b, self.weights * up_a * up_b // (a * b)

    def _small(self, matrices: int) -> int:
        winograd = set(self.kernel) == {3} and set(self.stride) == set(self.dilation) == {1} and self.groups == 1
        one = matrices * WINOGRAD if winograd else SMALL * torch.get_num_threads()
        return min(6 * (self.x + self.y) + FEWEST * torch.get_num_threads(), one)

    @property
    def rest(self) -> Ints:
        """Inputs behind the last window: the output padding of the transposed convolution that leads back."""
        places = zip(self.inner, self.outer, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return tuple(n + 2 * p - d * (k - 1) - 1 - (m - 1) * s for n, m, k, s, p, d in places)

    @property
    def back(self) -> Convolved:
        """The convolution that gives the input's gradient."""
        extra = () if self.transposed else self.rest
        turned = {"channels": self.channels[::-1], "inner": self.outer, "outer": self.inner}
        return replace(self, **turned, transposed=not self.transposed, extra=extra)  # type: ignore[arg-type]

    def forward(self) -> int:
        """Bytes of workspace of a forward call."""
        if self.onednn or self.direct:
            return self._forward()
        if not self.columns and self.groups == 1 and len(self.kernel) < 3:
            return 0
        split = self.y + self.x // self.groups if self.groups > 1 else 0
        split += self.y if max(self.dilation) > 1 else 0
        again = (2 if self.transposed else 1) * self.x if len(self.kernel) == 3 else 0  # put in order again
        return self._unfolded + split + again + (self.x + self.y + self.weights if self.channels_last else 0)

    def backward(self, wanted: Sequence[bool]) -> int:
        """Bytes of workspace of a backward call: `wanted` gradients of input, weights and, if there is one, bias."""
        summed = 2 * self.y if any(wanted[2:]) and self.dtype.itemsize == 2 and self.batch > 1 else 0
        return max(self._pulled_back(wanted), summed)  # 16 bits of several samples are summed in 32

    def _pulled_back(self, wanted: Sequence[bool]) -> int:
        if self.onednn:
            return self._backward(wanted)
        if self.direct:
            copies = self.x + self.y + 2 * self.weights  # of one place of the window at a time, and the result twice
            return max(self.back._forward() + self.weights if wanted[0] else 0, copies if wanted[1] else 0)
        if not self.columns and self.groups == 1 and len(self.kernel) < 3:
            return 0
        split = self.x + self.x // self.groups + 2 * (self.y + self.weights) if self.groups > 1 else self.y
        split += self.x if len(self.kernel) == 3 else 0
        return self._unfolded + split + (self.x + self.y + self.weights if self.channels_last else 0)

    @property
    def _unfolded(self) -> int:
        """Columns of one group at a time, of a volume's groups together."""
        volume = len(self.kernel) == 3 and not self.transposed and set(self.dilation) == {1}
        return self.columns * (self.groups if volume else 1)

    def _forward(self) -> int:
        x, y, w = self.blocked
        again = x + (self.y if self.kernel != self.stride else 0) if self.transposed else 0
        again += self._odd("up" if self.transposed else "down") + (
            0 if self._nhwc() or not self.transposed or set(self.stride) == {1} else y
        )
        again += 2 * FEWEST if self.dtype != torch.float32 and len(self.kernel) == 3 else 0
        if self.channels[0] <= 4 and not self.transposed:  # padded to four, not to a block
            w = w * 4 // BLOCK
        if self._nhwc():
            return again + self.weights + w + self._small(2)
        x = self.x if self.channels[0] <= 3 and self.dtype == torch.float32 else x
        wide = x + y if self.dtype != torch.float32 else 0  # windows of 1 in 16 bits: sums in 32
        return again + x + y + wide + (0 if self.plain else self.weights) + w + self._small(2)

    @property
    def _patches(self) -> bool:
        """Windows side by side, as of the stem of a vision transformer: products of matrices, nothing in blocks."""
        plain = self.kernel == self.stride and max(self.kernel) > 1 and not any(self.padding)
        return plain and max(self.dilation) == 1 == self.groups and not self.transposed and not self._nhwc()

    def _sums(self) -> int:
        """Gradients of weights as every thread sums them, in 32 bits, and in the order that it wants."""
        threads = torch.get_num_threads()
        return self.weights * (4 * threads if self.dtype == torch.float32 else 4 + 4 * threads)

    def _of_patches(self, wanted: Sequence[bool]) -> int:
        """Fitted to `ranger_nn.measure` on PyTorch 2.13, kernels of 2 to 16 in one to three dimensions."""
        x, _, w = self.blocked
        wide = 1 if self.dtype == torch.float32 else 2
        total = (2 if wide == 1 else 5) * self.x + 2 * wide * self.y + SMALL * torch.get_num_threads()
        total += self._sums() if wanted[1] else 2 * self.weights * wide
        total += w + wide * (x + self.x) if wanted[0] else 0
        return total + (torch.get_num_threads() - 1) * (6 * self.x if len(self.kernel) == 1 else 0)

    def _backward(self, wanted: Sequence[bool]) -> int:
        """Weights are reordered; their gradient is summed by each thread, in 16 bits from transposed copies."""
        if self._patches:
            return self._of_patches(wanted)
        odd = len(self.kernel) == 3 or self.dtype != torch.float32 or max(self.kernel) > 3
        odd |= min(self.outer) < max(self.kernel)  # a map smaller than the window
        heavy = wanted[1] and self.groups == 1 and odd
        sums = self._sums() + 3 * (self.x + self.y) + self._small(3) if heavy else 0  # weights that outweigh all else
        skips = len(self.kernel) == 3 and self.dtype != torch.float32 and max(self.stride) > max(self.kernel)
        return max(sums, self._blocks(wanted), BLOCK * self.x + sums if skips else 0)

    def _blocks(self, wanted: Sequence[bool]) -> int:
        x, y, w = self.blocked
        low, deep = self.dtype != torch.float32, not self.depthwise
        total = (0 if self.plain and not self._nhwc() else self.weights) + w + self._small(3)
        if wanted[1]:
            total += torch.get_num_threads() * w * (2 if low else 1) + (x + y if low and deep else 0)
        if set(self.stride) != {1}:
            total += (x if wanted[0] else min(x, SMALL)) // self.batch
            total += 0 if self._nhwc() else y + 2 * x
        total += w if self.groups > 1 else 0
        total += self._uneven() if self.depthwise and wanted[1] else 0
        total += 8 * self.weights if low and self.depthwise else 0
        total += max(
            self._odd("down" if self.transposed else "up") if wanted[0] else 0, self._odd("weights") if wanted[1] else 0
        )
        odd = wanted[0] and deep and not self.transposed and self.channels[0] % 8 and self.channels[1] % 8 == 0
        if not self._nhwc():
            return total + (2 if low else 1) * (x + y) + (x if wanted[0] else 0)
        total += y if wanted[1] and self.channels[1] % 8 else 0
        return total + (x + 2 * y if odd else 0)  # there may be no plain gradient for these

    def _uneven(self) -> int:
        """Depthwise weights in blocks both ways, where windows do not lie evenly: oneDNN's kernel for gradients is for others."""
        if self._nhwc() and any(
            2 * p != d * (k - 1) for p, k, d in zip(self.padding, self.kernel, self.dilation, strict=True)
        ):
            return (BLOCK * BLOCK + 1) * self.weights
        return 4 * BLOCK * self.weights if min(self.outer) <= max(self.padding) else 0

    def _odd(self, what: str) -> int:
        """Bytes where oneDNN may have no kernel for a form: it unfolds a sample at a time, each thread for itself."""
        if self.usual(what):
            return 0
        x, y, w = self.blocked
        wide = 2 if self.dtype != torch.float32 else 1  # sums in 32 bits
        threads = min(torch.get_num_threads(), self.batch * self.groups)
        columns = max(self.columns, self.back.columns) // self.batch * threads
        if self.depthwise:  # channels-last each channel is a block of its own
            w = self.weights * BLOCK * (BLOCK if self._nhwc() else 1)
        gradients = what != ("up" if self.transposed else "down")
        weights = w * (1 + gradients * (1 + torch.get_num_threads()))
        return wide * (columns + (1 + gradients) * (x + y) + weights) + self._small(3) + FEWEST

    def _nhwc(self) -> bool:
        return self.channels_last and prod(self.inner) > 1 and prod(self.outer) > 1


def available(dtype: torch.dtype) -> bool:
    """Whether oneDNN convolves this type here."""
    mkldnn = torch.backends.mkldnn
    if not (mkldnn.is_available() and mkldnn.enabled):
        return False
    return dtype == torch.float32 or SUPPORTED.get(dtype, False)


def _supported() -> dict[torch.dtype, bool]:
    """What the instruction set of this machine lets oneDNN convolve in 16 bits."""
    if not torch.backends.mkldnn.is_available():
        return {}
    ops = torch.ops.mkldnn
    return {
        torch.bfloat16: bool(ops._is_mkldnn_bf16_supported()),
        torch.float16: bool(ops._is_mkldnn_fp16_supported()),
    }


SUPPORTED = _supported()
PRIVATE = hasattr(torch.ops.mkldnn, "_convolution_transpose_pointwise")
"""oneDNN's transposed convolution has no public name; without it small calls are unfolded, and so counted."""


def attention(rows: int, keys: int, width: int, itemsize: int, backward: bool = False) -> int:
    """Bytes of blocks of scores and their sums that attention takes, as ATen/native/cpu/FlashAttentionKernel.cpp splits them.

    Queries are taken 32, 64 or 256 at a time, keys 512; in 16 bits scores are cast, and factors packed in backward.
    """
    block, columns = min(rows, 256 if rows >= 768 else 64 if rows >= 192 else 32), min(512, keys)
    wide = max(4, itemsize)
    scores = block * columns * (6 if itemsize == 2 else wide)
    one = scores + block * (width + 2) * wide
    if backward:
        one = 2 * scores + (max(width, 16) * 8 * (512 + block) if itemsize == 2 else 0)
    return torch.get_num_threads() * (one + SUMS)
