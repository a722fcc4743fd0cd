"""Operators that read some dimensions whole and are local in the others: scans, sorting, transforms, reductions, look-ups.

An operator with several results is one node for each result that is read, since a region rule speaks of one. Losses and
deviations are taken apart into what is pointwise and a sum, as far as that gives the same gradient.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence
from math import isinf
from typing import Any

import torch
from torch import Tensor

from ranger_nn.aggregate.monoid import Extremum, Moments, Monoid, Sum
from ranger_nn.core.graph import Rule
from ranger_nn.core.reach import Link
from ranger_nn.ops import cumulative, reduction
from ranger_nn.ops.pointwise import Row, Shape, aligned, pointwise
from ranger_nn.torch import kernels as K
from ranger_nn.torch import kernels_reduce as R
from ranger_nn.torch import kernels_resample as S
from ranger_nn.torch.kernels_cumulative import FORMS, Cumulative
from ranger_nn.torch.operator import Operator

SCANS = (
    *(
        "softmax",
        "log_softmax",
        "_softmax",
        "_log_softmax",
        "_safe_softmax",
        "cumsum",
        "cumprod",
        "logcumsumexp",
    ),
    *("argsort", "sort", "topk", "cummax", "cummin", "glu", "linalg_cross", "renorm", "channel_shuffle"),
    *(f"fft_{kind}{rank}" for kind in ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft") for rank in ("", "2", "n")),
)
"""They keep the other dimensions where they are; along their own the size may change."""

REDUCTIONS = (
    *("argmax", "argmin", "max", "min", "aminmax", "median", "nanmedian", "mode", "kthvalue", "prod", "any", "all"),
    *("logsumexp", "linalg_vector_norm", "norm", "nansum", "count_nonzero", "var_mean", "std_mean", "std"),
)
"""They take their dimensions away, or leave them with length one."""

FLOATS = ("float64", "float32", "bfloat16", "float16")

FFT_PAIR = (-2, -1)
"""Dimensions of the two-dimensional transforms where none are given."""

LOSSES = (
    *("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "soft_margin_loss", "binary_cross_entropy"),
    "binary_cross_entropy_with_logits",
)


def lower_scan(op: Operator) -> Any:
    """Local in every dimension but those that the operator names."""
    x = op.arg("self", op.arg("input"))
    if not isinstance(x, int):
        return None
    axes = _named(op, x)
    if not axes:
        return None
    if op.name in FORMS and (found := _cumulative(op, x, axes)) is not None:
        return found
    _, inputs = op.call()
    rank = len(op.shape(x))
    plain = ("softmax", "_softmax", "log_softmax", "_log_softmax", "cumsum", "glu")
    kernel = K.Call if op.name in plain else K.Copying
    return emit_each(op, inputs, [_except(op.shape(v), axes, rank) for v in inputs], kernel)


def _cumulative(op: Operator, x: int, axes: Collection[int]) -> Any:
    """All rows so far; which form of them, the axes of the network decide."""
    several, function = not isinstance(op.like, Tensor), op.call()[0]
    like = op.like[0] if several else op.like
    if like.dtype.is_complex or like.dtype == torch.bool or (several and not results_read(op) <= {0}):
        return None
    x, (dim,) = op.in_type(x, like.dtype), axes
    shape = op.shape(x)
    kernel = Cumulative(FORMS[op.name], _pick(function, 0) if several else function, dim, shape[dim], like.dtype)
    found = op.lower.emit(op.name, [x], like, cumulative.so_far(shape), kernel)
    return [found, None] if several else found


def _named(op: Operator, x: int) -> set[int]:
    """The dimensions that an operator reads whole; none where it flattens its input, or has none."""
    rank = len(op.shape(x))
    given = op.arg("dim", op.arg("dims"))
    if op.name.startswith("fft_") and given is None:
        given = FFT_PAIR if op.name.endswith("2") else range(rank)
    if op.name == "channel_shuffle":
        given = 1
    if op.name == "renorm":
        return set(range(rank)) - {op.arg("dim") % rank}
    given = [] if given is None else [given] if isinstance(given, int) else given
    return {d % rank for d in given} if rank else set()


def _except(shape: Shape, axes: Collection[int], rank: int) -> Row:
    return tuple(Link(d) if len(shape) == rank and d not in axes else None for d in range(len(shape)))


def emit_each(op: Operator, inputs: Sequence[int], rows: Sequence[Row], kernel: type[K.Call] = K.Copying) -> Any:
    """One node, or one for each result that is read."""
    function, _ = op.call()
    if isinstance(op.like, Tensor):
        return op.emit(inputs, Rule(tuple(rows)), kernel(function))
    return [
        op.lower.emit(op.name, inputs, like, Rule(tuple(rows)), kernel(_pick(function, n)))
        if n in results_read(op)
        else None
        for n, like in enumerate(op.like)
    ]


def _pick(function: Callable[..., Any], n: int) -> Callable[..., Tensor]:
    return lambda *xs: function(*xs)[n]


def results_read(op: Operator) -> set[int]:
    """Which of several results somebody reads."""
    picked = [user.args[1] for user in op.node.users if user.target is operator.getitem and user.users]
    return {n for n in picked if isinstance(n, int)}


def lower_reduction(op: Operator) -> Any:
    """Local in the dimensions that are kept; what is a sum or an extremum underneath may be cut in the others too."""
    x = op.arg("self")
    if not isinstance(x, int) or len(op.tensors()) != 1 or not op.shape(x) or 0 in op.shape(x):
        return None
    spread = op.name in ("std", "var_mean", "std_mean")
    overall = spread or op.name == "linalg_vector_norm"
    axes = set(range(len(op.shape(x)))) if overall and op.arg("dim") in (None, []) else _named(op, x)
    keep = bool(op.arg("keepdim", False))
    if not axes:
        return None
    if spread and op.arg("dtype") is None:
        return _spread(op, x, axes, keep)
    if op.name == "linalg_vector_norm" and op.lower.values[x].dtype in FLOATS:
        return _norm(op, x, axes, keep)
    if op.name in ("max", "min") and results_read(op) <= {0} and op.like[0].dtype.is_floating_point:
        return [emit_extremum(op, x, axes, keep, 1 if op.name == "max" else -1, op.like[0]), None]
    return emit_each(op, [x], list(reduction.reduction(op.shape(x), axes, keep).links))


def emit_reduce(op: Operator, x: int, axes: Collection[int], keep: bool, monoid: Monoid, like: Tensor) -> int:
    """A reduction by a monoid, which regions may bring in one by one."""
    kernel = R.Reduce(monoid, op.shape(x), tuple(axes), keep, None, dtype=like.dtype)
    found: int = op.lower.emit(op.name, [x], like, reduction.reduction(op.shape(x), axes, keep), kernel)
    return found


def emit_extremum(op: Operator, x: int, axes: Collection[int], keep: bool, sign: int, like: Tensor) -> int:
    """A maximum (sign 1) or minimum; where a gradient flows, it goes to the first element that attains it."""
    if not op.lower.values[x].differentiable:
        return emit_reduce(op, x, axes, keep, Extremum(sign), like)
    kernel = R.FirstExtremum(sign, op.shape(x), tuple(axes), keep, like.dtype)
    found: int = op.lower.emit(op.name, [x], like, reduction.reduction(op.shape(x), axes, keep), kernel)
    return found


def emit_pointwise(op: Operator, function: Callable[..., Tensor], inputs: Sequence[int], like: Tensor) -> int:
    """A pointwise node of its own."""
    shapes = [op.shape(v) for v in inputs]
    found: int = op.lower.emit(op.name, inputs, like, pointwise(shapes, tuple(like.shape)), K.Call(function))
    return found


def root(x: Tensor, p: float = 2) -> Tensor:
    """The p-th root, with gradient 0 at 0, as PyTorch has it for deviations and norms."""
    zero = x == 0
    safe = x.where(~zero, 1)
    return torch.where(zero, x if p > 0 else x.detach().pow(1 / p), safe.sqrt() if p == 2 else safe.pow(1 / p))


def power(x: Tensor, p: float) -> Tensor:
    """The p-th power of magnitudes, with gradient 0 at 0; of p = 0 whether there is any."""
    if p in (0, 1, 2):
        return (x != 0).to(x.dtype) if p == 0 else x.abs() if p == 1 else x.square()
    zero = x == 0
    return torch.where(zero, x.detach().abs().pow(p), x.where(~zero, 1).abs().pow(p))


def _spread(op: Operator, x: int, axes: Collection[int], keep: bool) -> Any:
    """The standard deviation from the variance, and the mean beside it."""
    likes = [op.like] if isinstance(op.like, Tensor) else list(op.like)
    if not likes[0].dtype.is_floating_point:
        return None
    correction = op.arg("correction", 1 if op.arg("unbiased", True) else 0)
    monoid = Moments(1.0 if correction is None else float(correction))
    read = results_read(op) if len(likes) > 1 else {0}
    found: list[Any] = [None] * len(likes)
    if 0 in read:
        found[0] = emit_reduce(op, x, axes, keep, monoid, likes[0])
        if op.name.startswith("std"):
            found[0] = emit_pointwise(op, root, [found[0]], likes[0])
    if 1 in read:
        found[1] = emit_reduce(op, x, axes, keep, Sum(mean=True), likes[1])
    return found if len(likes) > 1 else found[0]


def _norm(op: Operator, x: int, axes: Collection[int], keep: bool) -> Any:
    """Root of the sum of powers of magnitudes, or their extremum, in the precision in which PyTorch adds up."""
    dtype, p = op.like.dtype, float(op.arg("ord"))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    whole, reduced = (torch.empty(shape, dtype=wide, device="meta") for shape in (op.shape(x), op.out))
    each = emit_pointwise(op, lambda t: power(t.to(wide), 1 if isinf(p) else p), [x], whole)
    monoid = Extremum(1 if p > 0 else -1) if isinf(p) else Sum()
    total = emit_reduce(op, each, axes, keep, monoid, reduced)
    plain = isinf(p) or p in (0, 1)
    return emit_pointwise(op, lambda t: (t if plain else root(t, p)).to(dtype), [total], op.like)


def lower_loss(op: Operator) -> Any:
    """Each element's loss is pointwise; their sum or mean a reduction."""
    chosen = op.arg("reduction", 1)
    function, inputs = op.call()
    out = torch.broadcast_shapes(*(op.shape(v) for v in inputs))
    if chosen == 0:
        return emit_pointwise(op, function, inputs, op.like)
    plain = op.each("reduction", 0)
    each = emit_pointwise(op, plain, inputs, torch.empty(out, dtype=op.like.dtype, device="meta"))
    return emit_reduce(op, each, range(len(out)), False, Sum(mean=chosen == 1), op.like) if out else each


def lower_gather(op: Operator) -> Any:
    """Indices along one dimension: it is read whole, the others go along."""
    x, index = op.arg("self"), op.arg("index")
    shape, places = op.shape(x), op.shape(index)
    function, inputs = op.call()
    if not shape or inputs != [x, index] or _table(op, x):
        return None
    dim = op.arg("dim") % len(shape)
    own = _except(shape, {dim}, len(shape))
    others = tuple(Link(d) for d in range(len(places))) if op.name == "gather" else (Link(dim),) * len(places)
    return op.emit(inputs, Rule((own, others)), K.Copying(function))


def lower_index(op: Operator) -> Any:
    """`x[:, i, j]`: dimensions with an index are read whole, the others, and those of the indices, are local."""
    x, given = op.arg("self"), op.arguments["indices"]
    indices = [None if i is None else i.index for i in given]
    places = [d for d, v in enumerate(indices) if v is not None]
    tensors: list[int] = [v for v in indices if v is not None]
    function, inputs = op.call()
    whole = any(op.lower.values[v].dtype in ("bool", "uint8") for v in tensors)
    if whole or not places or inputs != [x, *tensors] or _table(op, x):
        return None
    spread = torch.broadcast_shapes(*(op.shape(v) for v in tensors))
    together = places == list(range(places[0], places[-1] + 1))
    first = places[0] if together else 0  # where the indices are apart, their dimensions come first
    rows: list[Row] = []
    kept = [d for d in range(len(op.shape(x))) if d not in places]
    where = {d: n if n < first else n + len(spread) for n, d in enumerate(kept)}
    rows.append(tuple(Link(where[d]) if d in where else None for d in range(len(op.shape(x)))))
    for v in tensors:
        row = aligned(op.shape(v), spread)
        rows.append(tuple(None if link is None else Link(first + link.out_dim) for link in row))
    return op.emit(inputs, Rule(tuple(rows)), K.Copying(function))


def _table(op: Operator, x: int) -> bool:
    """A parameter that is trained: each region's gradient would be as large as the table."""
    return op.lower.values[x].differentiable and op.lower.values[x].kind != "computed"


def lower_one_hot(op: Operator) -> Any:
    """A new last dimension."""
    function, inputs = op.call()
    rank = len(op.out) - 1
    if inputs != [op.arg("self")] or op.arg("num_classes", -1) < 0:
        return None
    return op.emit(inputs, Rule((tuple(Link(d) for d in range(rank)),)), K.Copying(function))


def lower_search(op: Operator) -> Any:
    """`bucketize` and `isin`: every element is looked up in a list that is read whole."""
    function, inputs = op.call()
    x = op.arg("self", op.arg("elements"))
    if len(inputs) != 2 or inputs[0] != x or inputs[1] == x:
        return None
    row = tuple(Link(d) for d in range(len(op.shape(x))))
    return op.emit(inputs, Rule((row, (None,) * len(op.shape(inputs[1])))), K.Copying(function))


def lower_grid(op: Operator) -> Any:
    """Samples at the places of a grid: the grid is local, the sampled image is read whole."""
    x, grid = op.arg("input"), op.arg("grid")
    function, inputs = op.call()
    rank = len(op.out)
    if inputs != [x, grid]:
        return None
    image = (Link(0), Link(1), *((None,) * (rank - 2)))
    return op.emit(inputs, Rule((image, (Link(0), *(Link(d) for d in range(2, rank)), None))), S.Sampling(function))
