"""Which region rule and kernel each ATen operator gets. To add an operator, add a function under `@rule(...)`.

A rule function receives an `Operator` (arguments by schema name, value indices for tensors) and returns the value
index of the result, or None to say "this form has no rule": the operator then stays whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node as FxNode

from ranger_nn.aggregate.monoid import Extremum, Moments, Sum
from ranger_nn.core.graph import Rule
from ranger_nn.core.reach import Border, Link
from ranger_nn.ops import contraction, movement, reduction, resample, window
from ranger_nn.ops.pointwise import opaque, pointwise
from ranger_nn.torch import kernels as K
from ranger_nn.torch import kernels_convolution as V
from ranger_nn.torch import kernels_movement as M
from ranger_nn.torch import kernels_reduce as R
from ranger_nn.torch import kernels_resample as S
from ranger_nn.torch import kernels_window as W
from ranger_nn.torch.aliases import NORMS, running
from ranger_nn.torch.lower import SAME, Lower, Ref, Static, resolve
from ranger_nn.torch.lowering_contraction import depends_on_input, lower_bilinear, lower_einsum, lower_product
from ranger_nn.torch.lowering_dims import (
    LOSSES,
    REDUCTIONS,
    SCANS,
    emit_extremum,
    emit_pointwise,
    emit_reduce,
    lower_grid,
    lower_loss,
    lower_one_hot,
    lower_reduction,
    lower_scan,
    lower_search,
    results_read,
)
from ranger_nn.torch.lowering_indices import lower_flip, lower_indices, lower_repeat, lower_rotation, lower_select
from ranger_nn.torch.lowering_parts import taken_apart
from ranger_nn.torch.lowering_patches import lower_fold, lower_unfold, lower_windows
from ranger_nn.torch.lowering_random import emit_dropout, seeded
from ranger_nn.torch.lowering_recurrent import lower_recurrent
from ranger_nn.torch.operator import Operator

aten = torch.ops.aten
RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")
RULES: dict[str, Callable[[Operator], Any]] = {}
POINTWISE = {
    *(
        "hardswish",
        "log_sigmoid",
        "rsub",
        "fill",
        "zero",
        "complex",
        "polar",
        "real",
        "imag",
        "resolve_conj",
        "resolve_neg",
    ),
    *("special_ndtr", "special_polygamma", "alias_copy", "fake_quantize_per_tensor_affine", "_add_relu", "lift"),
}
"""Pointwise operators that ATen does not tag: found by running all operators on permuted elements, here those left over
by the rules below and by `taken_apart`."""


def rule(*names: str) -> Callable[[Callable[[Operator], Any]], Callable[[Operator], Any]]:
    """Register a rule function for ATen operators."""

    def register(function: Callable[[Operator], Any]) -> Callable[[Operator], Any]:
        for name in names:
            RULES[name] = function
        return function

    return register


def lower_operator(lower: Lower, node: FxNode, target: Any) -> Any:
    """Value index (or list of them) of an operator's result."""
    like = node.meta["val"]
    schema = getattr(target, "_schema", None)
    if schema is None:
        return _whole(Operator(lower, node, target, str(target), like, {}), "higher-order operator")
    name = schema.name.split("::")[1]
    arguments = dict(zip((a.name for a in schema.arguments), resolve(lower, node.args), strict=False))
    arguments.update({k: resolve(lower, v) for k, v in node.kwargs.items()})
    for a in schema.arguments:
        if a.name not in arguments and a.has_default_value():
            arguments[a.name] = a.default_value
    op = Operator(lower, node, target, name, like, arguments)
    if _empty(op):
        return _whole(op, "a tensor without elements")
    if name in RULES:
        result = RULES[name](op)
        if result is not None:
            return result
    elif (torch.Tag.pointwise in target.tags or name in POINTWISE) and isinstance(like, Tensor) and not _draws(op):
        return _pointwise(op)
    elif (result := taken_apart(op)) is not None:
        return result
    return _whole(op, f"{name} has no region rule" if name not in RULES else f"this form of {name} has no region rule")


def _empty(op: Operator) -> bool:
    """Regions of nothing: an operator that reads or makes an empty tensor is one call, and costs none."""
    likes = op.like if isinstance(op.like, (list, tuple)) else [op.like]
    shapes = [tuple(t.shape) for t in likes if isinstance(t, Tensor)] + [op.shape(i) for i in op.tensors()]
    return op.name not in NORMS and any(0 in shape for shape in shapes)


def _whole(op: Operator, reason: str, **attention: bool) -> Any:
    function, inputs = op.call()
    random = _draws(op) and op.name not in RECURRENT
    if random and any(op.lower.values[i].differentiable for i in inputs):
        function, inputs = seeded(op.lower, function, inputs)
        random = False
    shapes = [op.shape(i) for i in inputs]
    like = op.like
    if isinstance(like, (list, tuple)):
        like = [t for t in like if isinstance(t, Tensor)]
    return op.lower.emit(
        op.name,
        inputs,
        like,
        opaque(shapes, reason),
        K.Attention(function, **attention) if attention else K.Opaque(function),
        random=random,
        differentiable=not random,
        macs=_guess_macs(op, shapes),
    )


def _draws(op: Operator) -> bool:
    """True where the operator draws random numbers."""
    tagged = torch.Tag.nondeterministic_seeded in getattr(op.target, "tags", ())
    return tagged and op.arg("training", True) is not False and op.arg("dropout_p", 1.0) != 0.0


def _guess_macs(op: Operator, shapes: list[tuple[int, ...]]) -> int:
    if op.name in RECURRENT:
        weights = sum(prod(s) for s in shapes[1:] if len(s) == 2)
        return weights * prod(shapes[0][:2]) if shapes else 0
    return 0


def _pointwise(op: Operator) -> Any:
    function, inputs = op.call()
    shapes = [op.shape(i) for i in inputs]
    return op.emit(inputs, pointwise(shapes, op.out), K.Call(function))


@rule(
    *SAME,
    "detach",
    "clone",
    "dropout",
    "feature_dropout",
    "alpha_dropout",
    "to",
    "_to_copy",
    "type_as",
    "feature_alpha_dropout",
)
def _identity_like(op: Operator) -> Any:
    source = op.arg("self", op.arg("input"))
    if not isinstance(source, int):
        return None
    if "dropout" in op.name and op.arg("train", True) and op.arg("p", 0.0) > 0:
        return _dropout(op, source)
    if op.name in {"detach", "detach_"}:
        return op.lower.emit(
            "detach",
            [source],
            op.like,
            pointwise([op.shape(source)], op.out),
            K.Call(torch.detach),
            alias=0,
            differentiable=False,
        )
    return op.in_type(source, op.like.dtype)


def _dropout(op: Operator, source: int) -> Any:
    shape = op.shape(source)
    if op.name != "dropout":
        if op.name != "feature_dropout":
            return None
        p = op.arg("p")
        like = torch.empty((*shape[:2], *([1] * (len(shape) - 2))), dtype=op.like.dtype, device="meta")
        device = op.like.device

        def draw() -> Tensor:
            return torch.empty(like.shape, dtype=like.dtype, device=device).bernoulli_(1 - p).div_(max(1 - p, 1e-30))

        mask = op.lower.emit("mask", [], like, Rule(()), K.Opaque(draw), random=True, differentiable=False)
        return op.lower.emit("mul", [source, mask], op.like, pointwise([shape, like.shape], shape), K.Call(torch.mul))
    along = 2 if len(shape) > 2 else 0
    along = max(range(len(shape)), key=lambda d: shape[d]) if shape[along] == 1 else along
    return emit_dropout(op.lower, source, op.arg("p"), op.like, along)


@rule("conv1d", "conv2d", "conv3d", "convolution")
def _convolution(op: Operator) -> Any:
    x, weight, bias = op.arg("input"), op.arg("weight"), op.arg("bias")
    shape, kernel = op.shape(x), op.shape(weight)[2:]
    rank = len(kernel)
    if len(shape) != rank + 2 or op.arg("transposed"):
        return None
    stride, dilation = _ints(op.arg("stride", 1), rank), _ints(op.arg("dilation", 1), rank)
    padding: Any = op.arg("padding", 0)
    before = after = None
    if isinstance(padding, str):
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
        before = tuple(t // 2 for t in total)
        after = tuple(t - t // 2 for t in total)
    else:
        before = after = _ints(padding, rank)
    native = tuple(b if b == a else -1 for b, a in zip(before, after, strict=True))
    reaches = [window.window_reach(k, s, d, p) for k, s, d, p in zip(kernel, stride, dilation, before, strict=True)]
    others = [weight] + ([bias] if bias is not None else [])
    groups = op.arg("groups", 1)
    macs = prod(op.out) * prod(op.shape(weight)[1:])
    kern = V.Convolution(stride, native, dilation, groups, reaches, bias is not None)
    kern.channels, kern.window = (shape[1], op.out[1]), kernel
    kern.computes, kern.on_cpu, kern.plain = op.like.dtype, op.like.device.type == "cpu", _plain(op.node.args[1])
    wants_weight = op.lower.values[weight].differentiable
    reads = (0, 1) if wants_weight else (1,)
    return op.emit(
        [x, *others], window.window(shape, reaches, [op.shape(o) for o in others]), kern, macs=macs, vjp_reads=reads
    )


def _plain(weight: Any) -> bool:
    """Whether a weight lies in memory in its usual order."""
    found = weight.meta.get("val") if isinstance(weight, FxNode) else None
    return isinstance(found, Tensor) and found.is_contiguous()


def _ints(value: Any, rank: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * rank
    return tuple(value) * rank if len(value) == 1 else tuple(value)


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _transposed(op: Operator) -> Any:
    x, weight, bias = op.arg("input"), op.arg("weight"), op.arg("bias")
    shape, kernel = op.shape(x), op.shape(weight)[2:]
    rank = len(kernel)
    if len(shape) != rank + 2:
        return None
    stride, padding = _ints(op.arg("stride", 1), rank), _ints(op.arg("padding", 0), rank)
    extra, dilation = _ints(op.arg("output_padding", 0), rank), _ints(op.arg("dilation", 1), rank)
    reaches = [
        window.transposed_reach(k, s, d, p) for k, s, d, p in zip(kernel, stride, dilation, padding, strict=True)
    ]
    others = [weight] + ([bias] if bias is not None else [])
    kern = V.TransposedConvolution(
        stride, padding, extra, dilation, op.arg("groups", 1), kernel, (shape[2:], op.out[2:]), bias is not None
    )
    kern.channels = (shape[1], op.out[1])
    kern.computes, kern.on_cpu, kern.plain = op.like.dtype, op.like.device.type == "cpu", _plain(op.node.args[1])
    macs = prod(shape) * prod(op.shape(weight)[1:])
    return op.emit([x, *others], window.window(shape, reaches, [op.shape(o) for o in others]), kern, macs=macs)


@rule("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d")
def _pool(op: Operator) -> Any:
    x = op.arg("self")
    shape, rank = op.shape(x), int(op.name[-2])
    if len(shape) != rank + 2:
        return None
    kernel = _ints(op.arg("kernel_size"), rank)
    stride = _ints(op.arg("stride") or kernel, rank)
    padding, dilation = _ints(op.arg("padding", 0), rank), _ints(op.arg("dilation", 1), rank)
    average = op.name.startswith("avg")
    once = _covered(shape[2:], kernel, stride, padding, dilation, op.out[2:])
    if once:
        return _pool_once(op, x, average, once)
    reaches = [window.window_reach(k, s, d, p) for k, s, d, p in zip(kernel, stride, dilation, padding, strict=True)]
    function, _ = op.call()
    kern = W.Pooling(
        function,
        average,
        kernel,
        stride,
        padding,
        dilation,
        bool(op.arg("ceil_mode")),
        bool(op.arg("count_include_pad", True)),
        op.arg("divisor_override"),
        (shape[2:], op.out[2:]),
        reaches,
    )
    return op.emit([x], window.channelwise_window(shape, reaches), kern)


def _covered(
    sizes: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    out: Sequence[int],
) -> dict[int, int]:
    """Dimensions that one window covers, with the elements and border that it counts; {} where a pool does more than that."""
    found: dict[int, int] = {}
    for d, (size, k, pad) in enumerate(zip(sizes, kernel, padding, strict=True)):
        if out[d] == 1 and dilation[d] == 1 and k - pad >= size:
            found[d + 2] = min(k, size + 2 * pad)
        elif (k, stride[d], pad) != (1, 1, 0):
            return {}
    return found


def _pool_once(op: Operator, x: int, average: bool, counts: dict[int, int]) -> Any:
    """A window as large as the map, or larger: a reduction."""
    if not average:
        return emit_extremum(op, x, counts, True, 1, op.like)
    shape, border = op.shape(x), op.arg("count_include_pad", True)
    divisor = op.arg("divisor_override") or (prod(counts.values()) if border else prod(shape[d] for d in counts))
    if divisor == prod(shape[d] for d in counts):
        return emit_reduce(op, x, counts, True, Sum(mean=True), op.like)
    total = emit_reduce(op, x, counts, True, Sum(), op.like)
    return emit_pointwise(op, lambda t: t / divisor, [total], op.like)


@rule(
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "adaptive_max_pool1d",
    "adaptive_max_pool2d",
    "adaptive_max_pool3d",
)
def _adaptive(op: Operator) -> Any:
    x = op.arg("self")
    shape, rank = op.shape(x), int(op.name[-2])
    average = "avg" in op.name
    like = op.like if isinstance(op.like, Tensor) else op.like[0]
    if len(shape) != rank + 2 or (not average and not results_read(op) <= {0}):
        return None
    x = op.in_type(x, like.dtype)
    out = tuple(int(s) for s in like.shape)
    function, _ = op.call()
    one = function if average else (lambda t: function(t)[0])
    axes = tuple(d for d in range(2, len(shape)) if out[d] != shape[d])
    if axes and all(out[d] == 1 for d in axes):
        if average:
            result = emit_reduce(op, x, axes, True, Sum(mean=True), like)
        else:
            result = emit_extremum(op, x, axes, True, 1, like)
    else:
        reaches = [window.adaptive_reach(n, m) for n, m in zip(shape[2:], out[2:], strict=True)]
        kern = W.AdaptivePooling(one, average, (shape[2:], out[2:]))
        result = op.lower.emit(op.name, [x], like, window.channelwise_window(shape, reaches), kern)
    return result if average else [result, result]


def _reduce(op: Operator, x: int, dims: tuple[int, ...], keepdim: bool, monoid: Any, like: Tensor | None = None) -> Any:
    like = op.like if like is None else like
    function, inputs = op.call()
    whole = function if len(inputs) == 1 else None
    if isinstance(op.like, (list, tuple)):
        whole = None
    kern = R.Reduce(monoid, op.shape(x), dims, keepdim, whole, dtype=like.dtype)
    return op.lower.emit(op.name, [x], like, reduction.reduction(op.shape(x), dims, keepdim), kern)


@rule("mean", "sum", "amax", "amin", "var")
def _reduction(op: Operator) -> Any:
    x = op.arg("self")
    shape = op.shape(x)
    if not shape or 0 in shape:
        return None
    dims = op.arg("dim")
    dims = tuple(range(len(shape))) if dims in (None, []) else dims
    dims = (dims,) if isinstance(dims, int) else dims
    axes = tuple(d % len(shape) for d in dims)
    dtype = str(op.like.dtype)[6:]
    if op.name in {"mean", "sum"} and op.lower.values[x].dtype != dtype:
        x = op.in_type(x, op.like.dtype)
        return _reduce(op, x, axes, bool(op.arg("keepdim", False)), Sum(mean=op.name == "mean"))
    if not op.like.dtype.is_floating_point:
        return None
    correction = op.arg("correction", 1 if op.arg("unbiased", True) else 0)
    monoid: Any = {
        "mean": Sum(mean=True),
        "sum": Sum(),
        "amax": Extremum(),
        "amin": Extremum(-1),
        "var": Moments(1.0 if correction is None else float(correction)),
    }[op.name]
    return _reduce(op, x, axes, bool(op.arg("keepdim", False)), monoid)


@rule(
    "upsample_nearest1d",
    "upsample_nearest2d",
    "upsample_nearest3d",
    "upsample_linear1d",
    "upsample_bilinear2d",
    "upsample_trilinear3d",
    "upsample_bicubic2d",
    "_upsample_nearest_exact1d",
    "_upsample_nearest_exact2d",
    "_upsample_nearest_exact3d",
)
def _resample(op: Operator) -> Any:
    x = op.arg("input", op.arg("self"))
    shape = op.shape(x)
    rank = len(shape) - 2
    mode = (
        "nearest-exact"
        if "exact" in op.name
        else "nearest"
        if "nearest" in op.name
        else "cubic"
        if "cubic" in op.name
        else "linear"
    )
    align = bool(op.arg("align_corners", False))
    factors = op.arg("scale_factors")
    if factors is None:
        factors = [op.arg(k) for k in ("scales_d", "scales_h", "scales_w")][-rank:]
        if rank == 1 and factors == [None]:
            factors = [op.arg("scales")]
    axes = [S.Axis(n, m, f) for n, m, f in zip(shape[2:], op.out[2:], factors, strict=True)]
    links: list[Link | None] = [Link(0), Link(1)]
    for i, a in enumerate(axes):
        scale = Fraction(a.size, a.out) if a.factor is None else 1 / Fraction(a.factor).limit_denominator(10**6)
        links.append(resample.resample_link(2 + i, mode, a.size, a.out, scale, align))
    return op.emit([x], Rule((tuple(links),)), S.Resample(mode, axes, align, op.like.dtype))


@rule("batch_norm", "instance_norm")
def _batch_norm(op: Operator) -> Any:
    x = op.arg("input")
    shape = op.shape(x)
    batch = op.name == "batch_norm"
    if not bool(op.arg("training" if batch else "use_input_stats")):
        return _channel_norm(op, x)
    weight, bias = op.arg("weight"), op.arg("bias")
    axis = (0, *range(2, len(shape) + 1)) if batch else tuple(range(2, len(shape) + 1))
    stats = _stats(op, x, shape[1], axis)
    if running(op.node):
        _running_statistics(op, stats, prod(shape) // (shape[1] if batch else prod(shape[:2])))
    return _apply(op, x, stats, shape[1], float(op.arg("eps")), weight, bias)


def _running_statistics(op: Operator, stats: int, n: int) -> None:
    """Moved where they stand; as values if anything else reads them, or moves them too."""
    lower, momentum = op.lower, float(op.arg("momentum"))
    mean, var = op.arg("running_mean"), op.arg("running_var")
    inputs, nodes = [stats, mean, var], running(op.node)
    shapes = [op.shape(i) for i in inputs]
    kernel = R.RunningStatistics(momentum, n)
    if all(lower.writes.in_place(node) for node in nodes):
        like, region = torch.empty(1), opaque(shapes, "side effect")
        lower.emit("running_statistics", inputs, like, region, kernel, random=True, differentiable=False)
        return
    likes = [node.meta["val"] for node in nodes]
    region = opaque(shapes, "statistics that forward reads")
    moved = lower.emit(
        "running_statistics", inputs, likes, region, K.Opaque(kernel.moved), random=True, differentiable=False
    )
    for node, value in zip(nodes, moved, strict=True):
        lower.writes.write(node, value)


def _stats(op: Operator, x: int, groups: int, axis: tuple[int, ...]) -> int:
    value = op.lower.values[x]
    wide = torch.float64 if value.dtype == "float64" else torch.float32
    rows = 1 if 0 in axis else op.shape(x)[0]
    like = torch.empty((2, rows, groups), dtype=wide, device="meta")
    kern = R.Reduce(Moments(), op.shape(x), axis, True, None, groups=groups)
    return op.lower.emit("moments", [x], like, reduction.moments(op.shape(x)), kern)


def _apply(op: Operator, x: int, stats: int, groups: int, eps: float, weight: Any, bias: Any) -> Any:
    affine = [v for v in (weight, bias) if v is not None]
    shape = op.shape(x)
    rows = op.shape(stats)[1]
    wide = torch.float64 if op.lower.values[stats].dtype == "float64" else torch.float32
    like = torch.empty((2, rows, shape[1]), dtype=wide, device="meta")
    scale = op.lower.emit(
        "norm_scale",
        [stats, *affine],
        like,
        Rule(((None,) * 3, *((None,) * len(op.shape(v)) for v in affine))),
        R.NormScale(groups, shape[1], eps, weight is not None, bias is not None),
    )
    row = tuple(Link(d) if d != 1 else None for d in range(len(shape)))
    return op.lower.emit(op.name, [x, scale], op.like, Rule((row, (None,) * 3), pointwise=True), R.NormApply())


def _channel_norm(op: Operator, x: int) -> Any:
    function, inputs = op.call()
    rank = len(op.out)
    links = []
    for i in inputs:
        shape = op.shape(i)
        links.append(tuple(Link(d) if d != 1 else None for d in range(rank)) if i == x else (None,) * len(shape))
    return op.emit(inputs, Rule(tuple(links), pointwise=True), K.Call(function))


@rule("group_norm")
def _group_norm(op: Operator) -> Any:
    x, groups = op.arg("input"), op.arg("num_groups")
    shape = op.shape(x)
    if len(shape) < 3:
        return None
    stats = _stats(op, x, groups, tuple(range(2, len(shape) + 1)))
    return _apply(op, x, stats, groups, float(op.arg("eps")), op.arg("weight"), op.arg("bias"))


@rule("layer_norm", "rms_norm", "_fused_rms_norm")
def _layer_norm(op: Operator) -> Any:
    x = op.arg("input")
    rank = len(op.shape(x))
    count = len(op.arg("normalized_shape"))
    function, inputs = op.call()
    links = [
        tuple(Link(d) if d < rank - count else None for d in range(rank)) if i == x else (None,) * len(op.shape(i))
        for i in inputs
    ]
    return op.emit(inputs, Rule(tuple(links)), K.ChannelNorm(function))


for _names, _function in (
    (SCANS, lower_scan),
    (REDUCTIONS, lower_reduction),
    (LOSSES, lower_loss),
    (("gather", "index_select"), lower_select),
    (("index",), lower_indices),
    (("flip",), lower_flip),
    (("rot90",), lower_rotation),
    (("repeat", "tile"), lower_repeat),
    (("one_hot",), lower_one_hot),
    (("bucketize", "isin"), lower_search),
    (("im2col",), lower_unfold),
    (("col2im",), lower_fold),
    (("unfold", "unfold_copy"), lower_windows),
    (("grid_sampler", "grid_sampler_2d", "grid_sampler_3d"), lower_grid),
):
    RULES.update(dict.fromkeys(_names, _function))


@rule("linear")
def _linear(op: Operator) -> Any:
    x, weight, bias = op.arg("input"), op.arg("weight"), op.arg("bias")
    others = [weight] + ([bias] if bias is not None else [])
    macs = prod(op.out) * op.shape(weight)[-1]
    if len(op.shape(x)) < 2 or len(op.shape(weight)) != 2:
        return None
    reads = (0, 1) if op.lower.values[weight].differentiable else (1,)
    return op.emit(
        [x, *others],
        contraction.linear(op.shape(x), [op.shape(o) for o in others]),
        K.Linear(),
        macs=macs,
        vjp_reads=reads,
    )


@rule("matmul", "bmm")
def _matmul(op: Operator) -> Any:
    left, right = op.arg("self"), op.arg("other", op.arg("mat2"))
    a, b = op.shape(left), op.shape(right)
    if min(len(a), len(b)) < 2:
        return lower_product(op)
    function, inputs = op.call()
    rows, columns = depends_on_input(op, left), depends_on_input(op, right)
    region = contraction.matmul(a, b, op.out, (columns, b[-1]) > (rows, a[-2]))
    return op.emit(inputs, region, K.Product(function), macs=prod(op.out) * a[-1])


for _name in ("mm", "mv", "inner", "tensordot", "addmm", "addmv", "baddbmm", "addbmm"):
    RULES[_name] = lower_product
RULES["einsum"], RULES["bilinear"] = lower_einsum, lower_bilinear


@rule("scaled_dot_product_attention")
def _attention(op: Operator) -> Any:
    mask = op.arg("attn_mask")
    trained = isinstance(mask, int) and op.lower.values[mask].differentiable
    drops = bool(op.arg("dropout_p", 0.0))
    if op.arg("is_causal") or drops:
        return _whole(op, "this form of scaled_dot_product_attention has no region rule", drops=drops, trained=trained)
    function, inputs = op.call()
    shapes = [op.shape(i) for i in inputs]
    macs = prod(op.out) * shapes[1][-2] * 2
    return op.emit(inputs, contraction.attention(shapes, op.out), K.Attention(function, trained=trained), macs=macs)


@rule("embedding")
def _embedding(op: Operator) -> Any:
    """Rows of a table, one for each index. In training a region's gradient would be as large as the table: whole."""
    function, inputs = op.call()
    if op.lower.grad or inputs != [op.arg("weight"), op.arg("indices")]:
        return None
    table, indices = (op.shape(v) for v in inputs)
    return op.emit(inputs, contraction.embedding(table, indices), K.Call(function))


@rule(*RECURRENT)
def _recurrent(op: Operator) -> Any:
    return lower_recurrent(op)


@rule("cat", "concat", "concatenate")
def _cat(op: Operator) -> Any:
    tensors = [t.index for t in op.arguments["tensors"] if isinstance(t, Ref)]
    if len(tensors) != len(op.arguments["tensors"]) or any(len(op.shape(t)) != len(op.out) for t in tensors):
        return None
    dim = op.dim("dim", len(op.out))
    tensors = [op.in_type(t, op.like.dtype) for t in tensors]
    return op.emit(tensors, movement.concatenate([op.shape(t) for t in tensors], dim), M.Concatenate(dim), vjp_reads=())


@rule("stack")
def _stack(op: Operator) -> Any:
    tensors = [op.in_type(t.index, op.like.dtype) for t in op.arguments["tensors"]]
    dim = op.dim("dim", len(op.out))
    return op.emit(
        tensors,
        movement.stack([op.shape(t) for t in tensors], dim),
        K.Light(op.call()[0]),
        vjp_reads=tuple(range(len(tensors))),
    )


@rule(
    "pad",
    "constant_pad_nd",
    "reflection_pad1d",
    "reflection_pad2d",
    "reflection_pad3d",
    "replication_pad1d",
    "replication_pad2d",
    "replication_pad3d",
)
def _pad(op: Operator) -> Any:
    x = op.arg("self")
    shape = op.shape(x)
    pads = list(op.arg("pad", op.arg("padding")))
    mode = op.arg("mode") or (
        "reflect" if "reflection" in op.name else "replicate" if "replication" in op.name else "constant"
    )
    before = [0] * len(shape)
    for i in range(len(pads) // 2):
        before[len(shape) - 1 - i] = pads[2 * i]
    border = {
        "constant": Border.FILL,
        "reflect": Border.REFLECT,
        "replicate": Border.REPLICATE,
        "circular": Border.CIRCULAR,
    }[mode]
    if border is not Border.FILL and any(p < 0 for p in pads):
        return None
    x = op.in_type(x, op.like.dtype)
    if not any(pads):
        return x
    kern = M.Pad(before, shape, op.out, border, float(op.arg("value") or 0.0))
    return op.emit([x], movement.pad(shape, before, border), kern, alias=0)


def _emit_crop(op: Operator, x: int, dim: int, start: int, step: int, like: Tensor) -> int:
    return op.lower.emit(
        "slice", [x], like, movement.crop(op.shape(x), dim, start, step), M.Crop(dim, start, step), alias=0
    )


@rule("slice", "narrow")
def _slice(op: Operator) -> Any:
    x = op.arg("self")
    shape = op.shape(x)
    dim = op.dim("dim", len(shape))
    start = op.arg("start") or 0
    start = max(0, start + shape[dim]) if start < 0 else min(start, shape[dim])
    if op.out == shape:
        return x
    return _emit_crop(op, x, dim, start, op.arg("step") or 1, op.like) if 0 not in op.out else None


@rule("select")
def _select(op: Operator) -> Any:
    x = op.arg("self")
    shape = op.shape(x)
    dim, index = op.dim("dim", len(shape)), op.arg("index")
    if not isinstance(index, int):
        return None
    index = index + shape[dim] if index < 0 else index
    crop_like = torch.empty([1 if d == dim else n for d, n in enumerate(shape)], dtype=op.like.dtype, device="meta")
    cropped = _emit_crop(op, x, dim, index, 1, crop_like)
    return op.emit([cropped], movement.select(op.lower.shape(cropped), dim), K.Light(lambda t: t.squeeze(dim)), alias=0)


@rule("chunk", "split", "split_with_sizes", "unbind", "unsafe_chunk", "unsafe_split")
def _split(op: Operator) -> Any:
    x = op.arg("self")
    dim = op.dim("dim", len(op.shape(x)))
    results, start = [], 0
    for like in op.like:
        if op.name == "unbind":
            crop_like = torch.empty(
                [1 if d == dim else n for d, n in enumerate(op.shape(x))], dtype=like.dtype, device="meta"
            )
            piece = _emit_crop(op, x, dim, start, 1, crop_like)
            region = movement.select(op.lower.shape(piece), dim)
            results.append(op.lower.emit("select", [piece], like, region, K.Light(lambda t: t.squeeze(dim)), alias=0))
            start += 1
        else:
            results.append(_emit_crop(op, x, dim, start, 1, like))
            start += int(like.shape[dim])
    return results


@rule("permute", "transpose", "t", "movedim", "swapaxes")
def _permute(op: Operator) -> Any:
    x = op.arg("self")
    rank = len(op.shape(x))
    if op.name == "permute":
        order = [d % rank for d in op.arg("dims")]
    elif op.name in {"transpose", "t", "swapaxes"}:
        order = list(range(rank))
        a = op.dim("dim0", rank, op.arg("axis0", 0)) if rank > 1 else 0
        b = op.dim("dim1", rank, op.arg("axis1", 1)) if rank > 1 else 0
        order[a], order[b] = order[b], order[a]
    else:
        probe = op.target(torch.empty(list(range(2, rank + 2)), device="meta"), op.arg("source"), op.arg("destination"))
        order = [n - 2 for n in probe.shape]
    return op.emit([x], movement.permute(order), K.Light(lambda t: t.permute(order)), alias=0)


@rule("view", "reshape", "flatten", "squeeze", "unsqueeze", "unflatten", "_unsafe_view", "view_as", "reshape_as")
def _view(op: Operator) -> Any:
    x = op.arg("self", op.arg("input"))
    if str(op.like.dtype)[6:] != op.lower.values[x].dtype or movement.view_groups(op.shape(x), op.out) is None:
        return None
    if op.out == op.shape(x):
        return x
    return op.emit([x], movement.view(op.shape(x), op.out), M.View(op.shape(x), op.out), alias=0)


@rule("expand", "expand_as", "broadcast_to")
def _expand(op: Operator) -> Any:
    x = op.arg("self")
    if op.out == op.shape(x):
        return x
    links = pointwise([op.shape(x)], op.out).links
    links = (tuple(link if n > 1 else None for link, n in zip(links[0], op.shape(x), strict=True)),)
    return op.emit([x], Rule(links), M.Expand(), alias=0)


@rule("roll")
def _roll(op: Operator) -> Any:
    x, shifts, dims = op.arg("self"), op.arg("shifts"), op.arg("dims")
    if not dims or 0 in op.out:
        return None
    shape = op.shape(x)
    each = {d % len(shape): s % shape[d] for d, s in zip(dims, shifts, strict=True)}
    return op.emit([x], movement.roll(shape, each), M.Roll(each, shape), alias=0)


@rule("pixel_shuffle")
def _pixel_shuffle(op: Operator) -> Any:
    factor = op.arg("upscale_factor")
    return op.emit([op.arg("self")], movement.pixel_shuffle(len(op.out), factor), M.PixelShuffle(factor))


@rule("pixel_unshuffle")
def _pixel_unshuffle(op: Operator) -> Any:
    factor = op.arg("downscale_factor")
    kern = K.Light(op.call()[0])
    return op.emit([op.arg("self")], movement.pixel_unshuffle(len(op.out), factor), kern)


@rule("copy")
def _copy(op: Operator) -> Any:
    """What `x.copy_(source)` and `x[...] = source` leave: the source in the dtype and shape of `x`."""
    source, dtype = op.arg("src"), op.like.dtype
    if not isinstance(source, int):
        return None
    shape = op.shape(source)
    like = torch.empty(shape, dtype=dtype, device="meta")
    if len(shape) > len(op.out):  # leading ones
        like = torch.empty(shape[len(shape) - len(op.out) :], dtype=dtype, device="meta")
        region = movement.view(shape, tuple(like.shape))
        kernel = M.View(shape, tuple(like.shape))
        source, shape = op.lower.emit("view", [source], like, region, kernel, alias=0), tuple(like.shape)
    made = op.lower.emit(op.name, [source], like, pointwise([shape], shape), K.Call(lambda x: x.to(dtype)))
    if shape == op.out:
        return made
    return op.lower.emit("expand", [made], op.like, pointwise([shape], op.out), M.Expand(), alias=0)


@rule("fill", "zero")
def _fill(op: Operator) -> Any:
    """Nothing of the tensor but its shape: its own zeros plus a number (whole where that is a tensor of the graph)."""
    x, value = op.arg("self"), op.arg("value", 0)
    if op.name == "fill" and any(isinstance(a, Ref) for k, a in op.arguments.items() if k == "value"):
        region = pointwise([op.out, op.shape(value)], op.out)
        return op.emit([x, value], region, K.Call(lambda t, v: torch.zeros_like(t) + v.to(t.dtype)))
    return op.emit([x], pointwise([op.out], op.out), K.Call(lambda t: torch.full_like(t, value)))


@rule("prelu")
def _prelu(op: Operator) -> Any:
    x, weight = op.arg("self"), op.arg("weight")
    row = tuple(Link(d) if d != 1 else None for d in range(len(op.out)))
    return op.emit([x, weight], Rule((row, (None,) * len(op.shape(weight))), pointwise=True), K.Call(op.call()[0]))


@rule("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "zeros", "ones", "full")
def _filled(op: Operator) -> Any:
    """One number, expanded where it is read: it takes no memory, and depends on no input."""
    number = 0 if "zeros" in op.name else 1 if "ones" in op.name else op.arg("fill_value")
    if not isinstance(number, (bool, int, float)):
        return None
    one = torch.full((), number, dtype=op.like.dtype)
    source = op.lower.external(op.name, one, "constant", ("constant", one), False)
    return op.emit([source], Rule(((),)), M.Expand(), alias=0) if op.out else source


__all__ = ["Operator", "Static", "aten", "lower_operator", "rule"]
