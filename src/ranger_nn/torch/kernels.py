"""Kernels: run one operator on one region, forward and vector-Jacobian product.

`bind(out_box, in_boxes)` is called once per shape, when a program is made ready; it returns the function that the
loop over regions calls. What a kernel is given is exactly `in_boxes` of its inputs; it gives back exactly
`out_box` of its output. Enter at `Kernel`; families that need more than the plain call are in the
`kernels_*.py` files beside this one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ranger_nn.core.program import Extent
from ranger_nn.core.reach import Box
from ranger_nn.torch.workspace import attention, available

Local = Callable[..., Any]

SAVES_RESULT = {"relu", "sigmoid", "tanh", "exp", "sqrt", "rsqrt", "reciprocal", "softmax"}
SAVES_NOTHING = {"add", "sub", "rsub", "neg", "to", "clone", "dropout"}
LEAN = (
    SAVES_RESULT
    | SAVES_NOTHING
    | {
        *(
            "mul",
            "div",
            "addcmul",
            "where",
            "masked_fill",
            "clamp",
            "batch_norm",
            "prelu",
            "threshold",
            "relu6",
            "hardtanh",
        ),
        *(
            "silu",
            "gelu",
            "mish",
            "elu",
            "selu",
            "celu",
            "leaky_relu",
            "hardswish",
            "hardsigmoid",
            "softplus",
            "affine",
        ),
        *(
            "clamp_min",
            "clamp_max",
            "abs",
            "mask",
            "detach",
            "native_dropout",
            "group_norm",
            "instance_norm",
            "layer_norm",
            "log_softmax",
            "fill",
            "full_like",
        ),
    }
)
"""Operators whose backward is one kernel, or a product of what is there: it makes the gradient and nothing on the way."""

SHORT = {"pow", "square", "sin", "cos", "log", "log2", "log10", "log1p"}
"""Those whose formula is a power or a function of the input, and its multiple."""

PRODUCTS = {"matmul", "bmm", "mm", "addmm", "baddbmm", "einsum"}
MAGNITUDES = {"abs", "angle"}

SMALL_TENSORS = 4096
"""Scales, shifts and the like: a few values for each channel."""


def lengths(box: Box) -> list[int]:
    """Sizes of a box."""
    return [hi - lo for lo, hi in box]


def table(numbers: Sequence[float], dtype: type) -> Tensor:
    """Constants of a bound kernel (indices, weights), made once. NumPy holds them: they are the plan's, no workspace."""
    return torch.from_numpy(np.asarray(numbers, dtype=dtype))


def fresh(grads: Sequence[Tensor | None], given: Sequence[Tensor], likes: Sequence[Tensor | None]) -> list[Any]:
    """Gradients that own their memory: what shares storage with another tensor, or is expanded, is copied."""
    seen = {t.untyped_storage().data_ptr() for t in given}
    result: list[Any] = []
    for g, like in zip(grads, likes, strict=True):
        if like is None:
            result.append(None)
            continue
        if g is None or g._is_zerotensor():  # a zero without storage, as of a sign
            result.append(torch.zeros_like(like))
            continue
        storage = g.untyped_storage().data_ptr()
        if storage in seen or any(s == 0 and n > 1 for s, n in zip(g.stride(), g.shape, strict=True)):
            g = g.clone()
            storage = g.untyped_storage().data_ptr()
        seen.add(storage)
        result.append(g)
    return result


class Kernel:
    """One operator. Subclasses say how it runs on a region; the product rule comes from autograd by default."""

    may_copy = False
    """A node that is a view of its input may also give a copy, depending on the region."""

    generates = False
    """Output dimensions that no input has a link to may be cut all the same."""

    op = ""
    """Name of the operator, set when the node is made."""

    sums = False
    """Backward sums a product as large as the output: the gradient of a scale."""

    itemsize = 4
    """Bytes of an element of the first input."""

    itemsizes: tuple[int, ...] = ()
    """The same of each input."""

    computes: torch.dtype = torch.float32
    """The type of the result: autocast casts the factors of a product to it, whatever theirs is."""

    pointwise = False
    """Every element depends on the elements at the same place only."""

    layout = ""
    """"makes" where the result is channels-last, "keeps" where it is if the input is (see `layout.py`)."""

    channels_last = False
    """Set on the kernels of nodes whose result is held channels-last."""

    reads_channels_last = False
    """Set where the first input is held channels-last."""

    dense = False
    """Set where the first input, whole, is known to lie in memory in its usual order."""

    whole_bytes = 0
    """Bytes of the whole first input."""

    given = False
    """Set where the output's gradient comes from the caller, in whatever layout that has."""

    shift_invariant = False
    """A region that lies elsewhere, beyond the ends too, gives the same: nothing follows from the place (`bounds/circle.py`)."""

    members = 1
    """Operators inside: what backward saves is about this many outputs."""

    chunk = 0
    """Steps that one call works on at a time, where it works in chunks."""

    def bind(self, out_box: Box, in_boxes: Sequence[Box]) -> Local:
        """The function from local inputs to the local output."""
        raise NotImplementedError

    def copies(self, out_box: Box, in_boxes: Sequence[Box]) -> bool | None:
        """Of a node that may give a view of its input: whether it copies on this region; None: it cannot be said."""
        return None

    def scratch(self, at: Extent) -> int:
        """Bytes of workspace of one forward call, beyond inputs and output."""
        return 0

    def vjp_scratch(self, at: Extent) -> int:
        """Bytes of workspace of one backward call, beyond inputs, the output's gradient and the results."""
        return 2 * at.out_bytes + sum(at.in_bytes) + SMALL_TENSORS

    def bind_vjp(self, out_box: Box, in_boxes: Sequence[Box], wanted: Sequence[bool]) -> Local:
        """The function (inputs..., output gradient) -> gradients of the wanted inputs, others None."""
        local = self.bind(out_box, in_boxes)

        def vjp(*args: Any) -> list[Any]:
            *xs, grad = args
            leaves = [x.detach().requires_grad_() if w else x for x, w in zip(xs, wanted, strict=True)]
            with torch.enable_grad():
                out = local(*leaves)
            asked = [x for x, w in zip(leaves, wanted, strict=True) if w]
            found = iter(
                torch.autograd.grad(out, asked, grad.to(out.dtype), allow_unused=True)
                if out.requires_grad
                else [None] * len(asked)
            )
            grads = [next(found) if w else None for w in wanted]
            del out
            return fresh(grads, [*xs, grad], [x if w else None for x, w in zip(xs, wanted, strict=True)])

        return vjp


class Call(Kernel):
    """An operator that runs on a region as it runs on the whole: pointwise, linear, channel norms, permutations."""

    def __init__(self, function: Callable[..., Any]) -> None:
        """`function` takes the tensor inputs in order; constants are bound in it."""
        self.function = function

    def bind(self, out_box: Box, in_boxes: Sequence[Box]) -> Local:
        """The function itself."""
        return self.function

    def scratch(self, at: Extent) -> int:
        """Matrix products copy what is not in order, and what they stretch; magnitudes of complex numbers are complex first."""
        return sum(at.in_bytes) if self.op in PRODUCTS or (self.op in MAGNITUDES and self.itemsize > 4) else 0

    def vjp_scratch(self, at: Extent) -> int:
        """Forward again; pointwise, that is the result, and the product of which a scale's gradient is the sum."""
        if not self.pointwise:
            return super().vjp_scratch(at)
        if self.op in SAVES_NOTHING:
            return SMALL_TENSORS
        held = 1 + _products(self, len(at.in_bytes)) + (self.op == "batch_norm") + _on_the_way(self)
        return at.out_bytes * held + SMALL_TENSORS


def _on_the_way(kernel: Kernel) -> int:
    """Tensors as large as the output that a formula of backward makes beside the gradient: a power, and its multiple."""
    return 0 if kernel.op in LEAN else 2 if kernel.op in SHORT else 4


def _products(kernel: Kernel, arguments: int) -> int:
    """Products as large as the output of which a scale's gradient is the sum."""
    if kernel.sums:
        return 2
    several = arguments > 1 and kernel.op not in SAVES_NOTHING and kernel.op != "batch_norm"
    return int(several) * (2 if kernel.op == "div" else 1)  # of a divisor: the quotient, divided again


class ChannelNorm(Call):
    """Normalisation over channels, which come last."""

    shift_invariant = True

    def scratch(self, at: Extent) -> int:
        """Mean and deviation of each place."""
        return at.out_bytes // 4


class Light(Call):
    """A call whose backward needs no more than the results (sums, concatenations, views)."""

    shift_invariant = True

    def vjp_scratch(self, at: Extent) -> int:
        """The local forward that autograd differentiates."""
        return at.out_bytes


class Copying(Call):
    """An operator that may copy its operands into another order, and the result back: products, transforms, sorting."""

    def _cast(self, at: Extent) -> int:
        """Bytes of the operands in autocast's type, and packed blocks of them."""
        if self.op not in PRODUCTS:
            return 0
        sizes = list(zip(at.in_bytes, self.itemsizes, strict=False))
        terms = min((n // size for n, size in sizes), default=0)
        blocks = packed(at.out_bytes // self.computes.itemsize, terms, terms, self.computes)
        return sum(_cast(n, size, self.computes, copied=False) for n, size in sizes) + blocks

    def scratch(self, at: Extent) -> int:
        """Copies of the operands, and the result before it is put in order."""
        return sum(at.in_bytes) + at.out_bytes + self._cast(at)

    def vjp_scratch(self, at: Extent) -> int:
        """Forward again, and the same for each gradient."""
        return 3 * at.out_bytes + 2 * sum(at.in_bytes) + 2 * self._cast(at) + SMALL_TENSORS


class Product(Copying):
    """A product of matrices, or of many of them."""

    shift_invariant = True

    def bind(self, out_box: Box, in_boxes: Sequence[Box]) -> Local:
        """Rows of all matrices together where the second factor is one: else it is copied for each of them."""
        if len(in_boxes) != 2 or len(in_boxes[1]) != 2 or len(in_boxes[0]) < 3:
            return self.function
        return lambda a, b: self.function(_rows(a, self.computes), b).unflatten(0, a.shape[:-1])

    def _factors(self, at: Extent) -> int:
        """Factors as the library may copy them: cast, in order, and one of fewer dimensions for each of the batch."""
        sizes = [
            _cast(n, size, self.computes, copied=True) for n, size in zip(at.in_bytes, self.itemsizes, strict=False)
        ]
        batch = [prod(lengths(read.box)[:-2]) for read in at.reads[:2]]
        if len(at.in_bytes) == 2 and len(at.reads[1].box) > 2:
            sizes = [n * max(batch) // max(1, own) for n, own in zip(sizes, batch, strict=True)]
        return sum(sizes)

    def _packed(self, at: Extent) -> int:
        sides = [n for read in at.reads[:2] for n in lengths(read.box)[-2:]]
        return packed(max(sides), max(sides), max(sides), self.computes)

    def scratch(self, at: Extent) -> int:
        """Copies of the factors, and blocks of them."""
        return self._factors(at) + self._packed(at)

    def vjp_scratch(self, at: Extent) -> int:
        """Forward again; copies of the factors and of the gradient for each, and the factors' gradients before a sum."""
        return 3 * at.out_bytes + 2 * self._factors(at) + 2 * self._packed(at) + SMALL_TENSORS


PANEL = 640
"""Terms of a sum for which oneDNN packs 16-bit factors at a time."""

TILE, PACK = 256, 64
"""Rows and columns of what is packed."""


def packed(rows: int, columns: int, terms: int, dtype: torch.dtype, gradient: bool = False) -> int:
    """Bytes that oneDNN packs of the factors of a product of 16-bit matrices, and holds of its sums in 32 bits.

    `gradient`: of weights, both factors transposed. Fitted to `ranger_nn.measure` on PyTorch 2.13.
    """
    if dtype.itemsize != 2 or not (dtype == torch.bfloat16 or available(dtype)):
        return 0
    deep = -(-terms // PACK) * PACK
    if not gradient:
        one = 2 * PACK * min(deep, 1024) + 4 * min(columns, PACK) * min(rows, TILE) + 6144
    else:
        wide, panel = min(rows, TILE), min(deep, PANEL)
        one = 2 * panel * (wide + PACK) + 4 * wide * (columns if deep > PANEL // 1.2 else PACK) + SMALL_TENSORS
    return one * torch.get_num_threads()


def _cast(nbytes: int, itemsize: int, dtype: torch.dtype, copied: bool) -> int:
    """Bytes of a factor in the type of a product: 0 where it is of it and need not be copied."""
    return nbytes * dtype.itemsize // itemsize if copied or itemsize != dtype.itemsize else 0


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """All rows of a tensor; what must be copied is copied in the type of the product."""
    if x.is_contiguous():
        return x.flatten(0, -2)
    return x.to(dtype).reshape(-1, x.shape[-1])


class Linear(Kernel):
    """x @ W.T + b; backward without running forward again."""

    shift_invariant = True

    def bind(self, out_box: Box, in_boxes: Sequence[Box]) -> Local:
        """`torch.nn.functional.linear`; in 16 bits on rows: else oneDNN copies the weights for each matrix of the batch."""
        function: Any = torch.nn.functional.linear
        if self.computes.itemsize != 2 or len(out_box) < 3:
            return function

        def local(x: Tensor, *weights: Tensor) -> Any:
            if x.is_contiguous():
                return function(x, *weights)
            return function(_rows(x, self.computes), *weights).unflatten(0, x.shape[:-1])

        return local

    def _casts(self, at: Extent) -> list[int]:
        """Bytes of input, weights and bias in autocast's type; 0 of those that are of it."""
        sizes = zip(at.in_bytes, self.itemsizes, strict=False)
        return [_cast(n, size, self.computes, copied=False) for n, size in sizes]

    def _sides(self, at: Extent) -> tuple[int, int, int]:
        """Rows, and features before and after."""
        box = lengths(at.out_box)
        return prod(box[:-1]), lengths(at.reads[0].box)[-1], box[-1]

    def scratch(self, at: Extent) -> int:
        """A contiguous copy of the input where its region is not, casts, and blocks."""
        whole = self.dense and at.in_bytes[0] == self.whole_bytes
        copied = 0 if whole else _cast(at.in_bytes[0], self.itemsizes[0], self.computes, copied=True)
        rows, before, after = self._sides(at)
        return copied + sum(self._casts(at)) + packed(rows, after, before, self.computes)

    def vjp_scratch(self, at: Extent) -> int:
        """Contiguous copies of input and gradient; casts and, in their type, the gradients; blocks."""
        rows, before, after = self._sides(at)
        x, *weights = self._casts(at)
        blocks = max(
            packed(rows, before, after, self.computes) if at.wanted[0] else 0,
            packed(after, before, rows, self.computes, gradient=True) if at.wanted[1] else 0,
        )
        copied = _cast(at.in_bytes[0], self.itemsizes[0], self.computes, copied=True)
        return at.out_bytes + copied + 2 * x + 2 * sum(weights) + blocks

    def bind_vjp(self, out_box: Box, in_boxes: Sequence[Box], wanted: Sequence[bool]) -> Local:
        """Two matrix products and a sum, in the type of the result."""

        def vjp(*args: Any) -> list[Any]:
            *xs, grad = args
            with torch.autocast(grad.device.type, enabled=False):
                return pull(xs, grad)

        def pull(xs: Sequence[Tensor], grad: Tensor) -> list[Any]:
            x, weight = xs[0], xs[1]
            rows = grad.reshape(-1, grad.shape[-1])
            grads: list[Any] = [None] * len(wanted)
            if wanted[0]:
                grads[0] = (rows @ weight.to(rows.dtype)).to(x.dtype).view(x.shape)
            if wanted[1]:
                grads[1] = (rows.t() @ _rows(x, rows.dtype).to(rows.dtype)).to(weight.dtype)
            if len(wanted) > 2 and wanted[2]:
                grads[2] = rows.sum(0).to(xs[2].dtype)
            return grads

        return vjp


class Fused(Kernel):
    """A chain of pointwise operators, run member by member; what is no longer read is dropped at once."""

    shift_invariant = True

    def __init__(self, steps: Sequence[tuple[Kernel, tuple[int, ...], int]], inputs: int, result: int) -> None:
        """`steps`: (kernel, argument registers, result register); registers below `inputs` are the inputs."""
        self.steps = steps
        self.inputs = inputs
        self.result = result
        self.members = len(steps)
        last: dict[int, int] = {}
        for k, (_, args, _out) in enumerate(steps):
            for a in args:
                last[a] = k
        self.width, live = 1, 0
        for i, (_, _, out) in enumerate(steps):
            live += 1
            self.width = max(self.width, live)
            live -= sum(1 for r, k in last.items() if k == i and r >= inputs and r != out)
        self.drops = [[r for r, k in last.items() if k == i and r >= inputs] for i in range(len(steps))]

    def bind(self, out_box: Box, in_boxes: Sequence[Box]) -> Local:
        """Run the members in order."""
        program = [
            (kernel.bind(out_box, in_boxes), args, out, drops)
            for (kernel, args, out), drops in zip(self.steps, self.drops, strict=True)
        ]
        count, result = self.inputs, self.result

        def local(*xs: Any) -> Any:
            registers: dict[int, Any] = dict(enumerate(xs[:count]))
            for function, args, out, drops in program:
                registers[out] = function(*[registers[a] for a in args])
                for r in drops:
                    del registers[r]
            return registers[result]

        return local

    def scratch(self, at: Extent) -> int:
        """Intermediates that live side by side."""
        return at.out_bytes * (self.width - 1)

    def vjp_scratch(self, at: Extent) -> int:
        """The results, what autograd saves of the members on the way, and a gradient in flight."""
        saved: set[int] = {self.result}
        broadcast = 0
        for kernel, args, out in self.steps:
            if kernel.op in SAVES_RESULT:
                saved.add(out)
            elif kernel.op not in SAVES_NOTHING and not (kernel.op in {"mul", "div"} and len(args) == 1):
                saved.update(a for a in args if a >= self.inputs)
            broadcast = max(broadcast, _products(kernel, len(args)))
        held = len(saved) + (self.members > 1) + broadcast + max(_on_the_way(kernel) for kernel, _, _ in self.steps)
        if any(kernel.op == "batch_norm" for kernel, _, _ in self.steps):
            held = max(held, 3)  # its backward takes as much again as the gradient
        return at.out_bytes * held + SMALL_TENSORS


class Opaque(Kernel):
    """An operator without a region rule: it always sees whole inputs."""

    def __init__(self, function: Callable[..., Any]) -> None:
        """`function` takes the tensor inputs in order and gives a tensor or a tuple of tensors."""
        self.function = function

    def bind(self, out_box: Box, in_boxes: Sequence[Box]) -> Local:
        """The function itself."""
        return self.function

    def scratch(self, at: Extent) -> int:
        """As much again as it reads; transforms work on complex copies of it, too."""
        return sum(at.in_bytes) + (at.out_bytes if "fft" in self.op else 0)

    def vjp_scratch(self, at: Extent) -> int:
        """Forward's result and as much as it reads."""
        return 2 * at.out_bytes + 2 * sum(at.in_bytes)

    def bind_vjp(self, out_box: Box, in_boxes: Sequence[Box], wanted: Sequence[bool]) -> Local:
        """Autograd through the whole operator; the last arguments are the gradients of its outputs (or None)."""
        local = self.bind(out_box, in_boxes)
        count = len(wanted)

        def vjp(*args: Any) -> list[Any]:
            xs, grads = args[:count], args[count:]
            leaves = [x.detach().requires_grad_() if w else x for x, w in zip(xs, wanted, strict=True)]
            with torch.enable_grad():
                outs = local(*leaves)
            outs = (outs,) if isinstance(outs, Tensor) else outs
            pairs = [(o, g) for o, g in zip(outs, grads, strict=False) if g is not None and o.requires_grad]
            asked = [x for x, w in zip(leaves, wanted, strict=True) if w]
            found = iter(
                torch.autograd.grad([o for o, _ in pairs], asked, [g for _, g in pairs], allow_unused=True)
                if pairs
                else [None] * len(asked)
            )
            result = [next(found) if w else None for w in wanted]
            given = [t for t in (*xs, *grads) if isinstance(t, Tensor)]
            return fresh(result, given, [x if w else None for x, w in zip(xs, wanted, strict=True)])

        return vjp


class Attention(Opaque):
    """Scaled dot-product attention: the CPU kernel works in blocks of queries and keys; what it does not take is formed.

    All scores are: with dropout, with a mask that is trained, with heads of two sizes or of no usual rank
    (`sdp_utils_cpp.h` of ATen). Fitted to `ranger_nn.measure` on PyTorch 2.13.
    """

    def __init__(self, function: Any, *, drops: bool = False, trained: bool = False) -> None:
        """`drops`: with dropout; `trained`: the mask takes a gradient."""
        super().__init__(function)
        self.drops, self.trained = drops, trained

    def _forms(self, at: Extent) -> bool:
        queries, _, values = (r.box for r in at.reads[:3])
        return self.drops or self.trained or len(queries) != 4 or lengths(queries)[-1] != lengths(values)[-1]

    def _formed(self, at: Extent, times: int) -> int:
        """So many matrices of scores (in 16 bits computed in 32, and cast), and scaled copies of the inputs."""
        queries, keys = (lengths(r.box) for r in at.reads[:2])
        scores = prod(queries[:-1]) * keys[-2] * self.itemsize
        wide = 1 if self.itemsize >= 4 else 2
        return (times * wide + wide - 1) * scores + 3 * wide * sum(at.in_bytes[:3])

    def scratch(self, at: Extent) -> int:
        """Blocks of scores for each thread, their sums, and a mask in numbers; copies too where that kernel may not run."""
        queries, keys, _ = (r.box for r in at.reads[:3])
        if self._forms(at):
            return self._formed(at, 2 + self.drops + (len(at.reads) > 3))
        if self.itemsize != 4:
            return sum(at.in_bytes) + sum(at.in_bytes[3:]) * self.itemsize + self._blocks(queries, keys)
        sums = at.out_bytes // max(1, lengths(queries)[-1])
        return sums + sum(at.in_bytes[3:]) * self.itemsize + self._blocks(queries, keys)

    def _blocks(self, queries: Box, keys: Box, backward: bool = False) -> int:
        """What the framework's kernel takes for a block of queries and one of keys."""
        return attention(*self._lengths(queries, keys), self.itemsize, backward) + SMALL_TENSORS

    @staticmethod
    def _lengths(queries: Box, keys: Box) -> tuple[int, int, int]:
        rows, width = (lengths(queries)[-2:]) if len(queries) > 1 else (1, 1)
        return rows, lengths(keys)[-2] if len(keys) > 1 else 1, width

    def vjp_scratch(self, at: Extent) -> int:
        """Forward's result and its blocks, and those of backward."""
        if self._forms(at):
            return 2 * at.out_bytes + self._formed(at, 3 + 2 * self.drops + (len(at.reads) > 4))
        blocks = max(self._blocks(at.reads[0].box, at.reads[1].box, backward) for backward in (False, True))
        return 2 * at.out_bytes + 2 * sum(at.in_bytes) + blocks


class Dropout(Kernel):
    """Dropout whose mask depends on the absolute position only: any region, drawn again, gets the same mask.

    The mask of block r of indices along the first cut dimension is drawn by a generator seeded with (seed, r); the seed
    is the second input, drawn once per forward from the global generator, as the untouched network draws.
    """

    def __init__(self, p: float, shape: tuple[int, ...], dim: int, block: int = 1) -> None:
        """`dim`: the dimension along which the mask is drawn, `block` indices at a time."""
        self.p, self.shape, self.dim, self.block = p, shape, dim, block

    def scratch(self, at: Extent) -> int:
        """The mask, and a block of it as it is drawn, whole along all other dimensions."""
        place = at.out_bytes // max(1, prod(lengths(at.out_box)))
        return at.out_bytes + self.block * prod(n for d, n in enumerate(self.shape) if d != self.dim) * place

    def vjp_scratch(self, at: Extent) -> int:
        """The same, and the product that autograd differentiates."""
        return self.scratch(at) + at.out_bytes + SMALL_TENSORS

    def bind(self, out_box: Box, in_boxes: Sequence[Box]) -> Local:
        """Multiply by the mask of this box."""
        dim, shape, p, block = self.dim, self.shape, self.p, self.block
        lo, hi = out_box[dim] if out_box else (0, 1)
        crops = [(d, a, b - a) for d, (a, b) in enumerate(out_box) if d != dim and b - a < shape[d]]
        slab = [block if d == dim else n for d, n in enumerate(shape)]
        scale = 0.0 if p >= 1 else 1.0 / (1.0 - p)

        def mask(seed: int, like: Tensor) -> Tensor:
            generator = torch.Generator(device=like.device)
            rows = like.new_empty(lengths(out_box))
            for r in range(lo // block, -(-hi // block)):
                generator.manual_seed((seed * 1000003 + r * 7919) % (2**63))
                row = torch.empty(slab, dtype=like.dtype, device=like.device).bernoulli_(1 - p, generator=generator)
                for d, start, length in crops:
                    row = row.narrow(d, start, length)
                a, b = max(lo, r * block), min(hi, (r + 1) * block)
                rows.narrow(dim, a - lo, b - a).copy_(row.narrow(dim, a - r * block, b - a))
            return rows.mul_(scale)

        def local(x: Tensor, seed: Tensor) -> Tensor:
            return x * mask(int(seed), x)

        return local
