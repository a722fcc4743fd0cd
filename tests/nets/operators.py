"""One operator each: activations, convolutions, pools, resizes, with odd parameters."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.nets.make import feature, function, net, resize
from tests.nets.reductions import Classifier
from tests.support import Entry


def padding(mode: str, kernel: int = 5, **options: Any) -> Entry:
    return feature(
        f"conv_{mode}",
        lambda: nn.Conv2d(6, 6, kernel, padding=kernel // 2, padding_mode=mode, **options),
    )


ACTIVATIONS = (
    feature("glu", lambda: nn.GLU(1)),
    feature("prelu", nn.PReLU),
    feature("prelu_per_channel", lambda: nn.PReLU(6)),
    feature("softmax_channels", lambda: nn.Softmax(1)),
    feature("log_softmax_channels", lambda: nn.LogSoftmax(1)),
    feature("gelu_tanh", lambda: nn.GELU(approximate="tanh")),
    function("many_pointwise", lambda x: F.elu(x) + F.mish(x) * F.softplus(x) - (x.abs() + 0.1).sqrt()),
    function("more_pointwise", lambda x: torch.atan2(x, 1 + x * x) + x.exp().clamp(max=2.0)),
    function("hard_pointwise", lambda x: F.hardswish(x) + F.hardsigmoid(x) + F.relu6(x) + x.sin()),
    function("maximum_of_channels", lambda x: torch.maximum(x[:, :3], x[:, 3:])),
    function("einsum_channels", lambda x: torch.einsum("nchw,ncwh->nhw", x, x.mT)[:, None] + x),
    function("normalise_channels", lambda x: F.normalize(x, dim=1)),
    function("cumsum_channels", lambda x: x.cumsum(1)),
)

CONVOLUTIONS = (
    *(padding(mode) for mode in ("reflect", "replicate", "circular")),
    feature("conv_stride_dilation", lambda: nn.Conv2d(6, 6, (3, 4), (2, 3), (4, 1), (2, 1))),
    feature("conv_groups", lambda: nn.Conv2d(6, 12, 3, groups=3, padding=1)),
    feature("conv_same_even", lambda: nn.Conv2d(6, 6, (4, 6), padding="same", dilation=(1, 2))),
    feature("conv_valid_stride_over_kernel", lambda: nn.Conv2d(6, 6, 2, stride=5)),
    feature("conv_wide_padding", lambda: nn.Conv2d(6, 6, 3, padding=5)),
    feature("transposed_k2", lambda: nn.ConvTranspose2d(6, 5, 2, stride=2)),
    feature("transposed_k3", lambda: nn.ConvTranspose2d(6, 5, 3, 2, 1, output_padding=1)),
    feature("transposed_k4", lambda: nn.ConvTranspose2d(6, 5, 4, 2, 1)),
    feature(
        "transposed_groups_dilated",
        lambda: nn.ConvTranspose2d(6, 4, 3, 3, 2, output_padding=1, groups=2, dilation=2),
    ),
    feature("transposed_k1_s2", lambda: nn.ConvTranspose2d(6, 5, 1, stride=2)),
    feature("transposed_then_cat", lambda: nn.ConvTranspose2d(6, 5, 5, 1, 2)),
)

POOLS = (
    feature("max_pool", lambda: nn.MaxPool2d(3, 2, 1)),
    feature("max_pool_ceil", lambda: nn.MaxPool2d(3, 2, ceil_mode=True)),
    feature("max_pool_dilated", lambda: nn.MaxPool2d(3, 2, 1, dilation=2, ceil_mode=True)),
    feature("avg_pool", lambda: nn.AvgPool2d(2)),
    feature("avg_pool_ceil", lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True)),
    feature(
        "avg_pool_exclude",
        lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
    ),
    feature("avg_pool_divisor", lambda: nn.AvgPool2d(3, 2, 1, divisor_override=5)),
    feature("avg_pool_same_size", lambda: nn.AvgPool2d(3, 1, 1, count_include_pad=False)),
    # LPPool's derivative is not finite at 0, hence the shift away from it.
    function("lp_pool", lambda x: F.lp_pool2d(x.exp(), 2.0, 3, 2)),
    function("lp_pool_ceil", lambda x: F.lp_pool2d(x.exp(), 3.0, 2, ceil_mode=True)),
    function("adaptive_pool_grid", lambda x: F.adaptive_avg_pool2d(x, (5, 7))),
    function("adaptive_max_pool_grid", lambda x: F.adaptive_max_pool2d(x, (5, 7))),
    net("global_avg_pool", lambda: Classifier(lambda x: F.adaptive_avg_pool2d(x, 1))),
    net("global_max_pool", lambda: Classifier(lambda x: F.adaptive_max_pool2d(x, 1))),
    net("global_amax", lambda: Classifier(lambda x: x.amax((2, 3)))),
    net("global_sum", lambda: Classifier(lambda x: x.sum((2, 3)))),
    net("global_mean_of_flat", lambda: Classifier(lambda x: x.flatten(2).mean(2))),
    net(
        "global_avg_pool2d",
        lambda: Classifier(lambda x: F.avg_pool2d(x, (x.shape[2], x.shape[3]))),
    ),
    net("global_var", lambda: Classifier(lambda x: x.var((2, 3)))),
    net("global_std", lambda: Classifier(lambda x: x.std((2, 3), correction=0))),
    net("global_norm", lambda: Classifier(lambda x: torch.linalg.vector_norm(x, dim=(2, 3)))),
    net("global_logsumexp", lambda: Classifier(lambda x: x.logsumexp((2, 3)))),
    net("global_max_of_flat", lambda: Classifier(lambda x: x.flatten(2).max(2).values)),
    net("flat_head", lambda: Classifier(lambda x: x, features=8 * 10 * 11), whole=True),
)

RESIZES = (
    resize("nearest_up", size=(53, 67), mode="nearest"),
    resize("nearest_down", size=(23, 19), mode="nearest"),
    resize("nearest_exact", size=(53, 19), mode="nearest-exact"),
    resize("nearest_double", scale_factor=2),
    resize("bilinear_double", scale_factor=2, mode="bilinear"),
    resize("bilinear_odd", size=(53, 67), mode="bilinear"),
    resize("bilinear_down", size=(23, 19), mode="bilinear"),
    resize("bilinear_corners", size=(53, 67), mode="bilinear", align_corners=True),
    resize("bilinear_corners_down", size=(23, 19), mode="bilinear", align_corners=True),
    resize("bilinear_factor", scale_factor=1.7, mode="bilinear"),
    resize("bilinear_antialias", size=(23, 19), mode="bilinear", antialias=True),
    resize("bicubic_double", scale_factor=2, mode="bicubic"),
    resize("bicubic_odd", size=(53, 67), mode="bicubic"),
    resize("bicubic_corners", size=(53, 31), mode="bicubic", align_corners=True),
)
