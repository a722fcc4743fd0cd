"""Networks that people use, with random weights: the models that every exactness claim is made on.

The topology is the library's own; depth and width are reduced only where neither is the point, so
that a forward and a backward in float64 take well under a second. Nothing is downloaded.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tests.nets import TCN, Tagger, WaveNet
from tests.support import Entry

ODD = ((1, 3, 133, 101),)
REGION = (37, 29)


class Padded(nn.Module):
    """A network for sizes that are a multiple of `multiple`, on any size: pad, run, crop."""

    def __init__(self, model: nn.Module, multiple: int) -> None:
        super().__init__()
        self.model = model
        self.multiple = multiple

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        extra = (0, -width % self.multiple, 0, -height % self.multiple)
        return self.model(F.pad(x, extra, mode="replicate"))[:, :, :height, :width]


class Decoder(nn.Module):
    """The decoding half of an autoencoder, as diffusers calls it: latent in, image out."""

    def __init__(self, autoencoder: Any) -> None:
        super().__init__()
        self.post_quant_conv = autoencoder.post_quant_conv
        self.decoder = autoencoder.decoder

    def forward(self, latent: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(latent))


class AtTime(nn.Module):
    """A denoiser at a fixed step, so that its only input is the image."""

    def __init__(self, model: nn.Module, step: int) -> None:
        super().__init__()
        self.model = model
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x, self.step, return_dict=False)[0]


def _monai(name: str, *args: Any, **options: Any) -> Callable[[], nn.Module]:
    """A MONAI network; `pretrained` and other downloads stay off by default."""
    return lambda: getattr(importlib.import_module("monai.networks.nets"), name)(*args, **options)


def _transformers(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    """A transformers model from a configuration, random weights, eager by construction."""

    def build() -> nn.Module:
        library = importlib.import_module("transformers")
        return getattr(library, model)(getattr(library, config)(**options))

    return build


def _autoencoder() -> nn.Module:
    """A decoder of four levels with small widths: attention in the middle, group norm everywhere."""
    library = importlib.import_module("diffusers")
    return Decoder(
        library.AutoencoderKL(
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 16, 16, 16),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
        )
    )


def _unet2d() -> nn.Module:
    """The unconditional denoiser of diffusers, with one level of attention."""
    library = importlib.import_module("diffusers")
    model = library.UNet2DModel(
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
    )
    return AtTime(model, 7)


def logits(output: Any) -> tuple[Tensor, ...]:
    """The head's output of a transformers model."""
    return (output.logits,)


def features(output: Any) -> tuple[Tensor, ...]:
    """The feature map, and the pooled vector where there is one."""
    pooled = getattr(output, "pooler_output", None)
    return (output.last_hidden_state,) if pooled is None else (output.last_hidden_state, pooled)


_FLAT: dict[str, Any] = {"spatial_dims": 2, "in_channels": 3, "out_channels": 2}
_SOLID: dict[str, Any] = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2}
_LEVELS: dict[str, Any] = {"channels": (4, 8, 16, 32), "strides": (2, 2, 2)}
_DYNAMIC: dict[str, Any] = {
    "kernel_size": (3, 3, 3, 3),
    "strides": (1, 2, 2, 2),
    "upsample_kernel_size": (2, 2, 2),
    "filters": (6, 12, 16, 24),
}

MONAI = (
    Entry("basicunet", _monai("BasicUNet", 2, 3, 2, (8, 8, 16, 24, 32, 8)), ODD, REGION),
    Entry(
        "basicunet_batch",
        _monai("BasicUNet", 2, 3, 2, (8, 8, 16, 24, 32, 8), norm="batch"),
        ODD,
        REGION,
    ),
    Entry(
        "unet",
        _monai("UNet", **_FLAT, **_LEVELS, num_res_units=2, norm="batch"),
        ((1, 3, 136, 104),),
        REGION,
        multiple=8,
    ),
    Entry(
        "unet_padded",
        lambda: Padded(_monai("UNet", **_FLAT, **_LEVELS, num_res_units=1)(), 8),
        ODD,
        REGION,
    ),
    Entry(
        "dynunet",
        _monai("DynUNet", **_FLAT, **_DYNAMIC, res_block=True),
        ((1, 3, 136, 104),),
        REGION,
        multiple=8,
    ),
    Entry(
        "attentionunet",
        _monai("AttentionUnet", **_FLAT, **_LEVELS),
        ((1, 3, 136, 104),),
        REGION,
        multiple=8,
    ),
    Entry(
        "segresnet",
        _monai("SegResNet", spatial_dims=2, init_filters=8, in_channels=3, out_channels=2),
        ((1, 3, 136, 104),),
        REGION,
        multiple=8,
    ),
    Entry(
        "segresnet_padded",
        lambda: Padded(
            _monai(
                "SegResNet",
                spatial_dims=2,
                init_filters=8,
                in_channels=3,
                out_channels=2,
                blocks_down=(1, 2, 2),
                blocks_up=(1, 1),
                upsample_mode="deconv",
            )(),
            4,
        ),
        ODD,
        REGION,
    ),
    Entry("densenet121", _monai("DenseNet121", 2, 3, 5), ODD, REGION, heavy=True),
    Entry(
        "efficientnet_b0",
        _monai(
            "EfficientNetBN", "efficientnet-b0", pretrained=False, spatial_dims=2, num_classes=5
        ),
        ODD,
        REGION,
    ),
    Entry(
        "resnet50",
        _monai("resnet50", spatial_dims=2, n_input_channels=3, num_classes=5),
        ODD,
        REGION,
        heavy=True,
    ),
    Entry(
        "vnet",
        _monai("VNet", 2, 2, 2),
        ((1, 2, 80, 48),),
        REGION,
        multiple=16,
    ),
    Entry(
        "unet_3d",
        _monai("UNet", **_SOLID, **_LEVELS, num_res_units=1),
        ((1, 1, 24, 40, 32),),
        (7, 11, 13),
        multiple=8,
    ),
    Entry("highresnet", _monai("HighResNet", 2, 3, 2), ((1, 3, 53, 41),), (17, 13)),
    Entry(
        "vnet_3d",
        _monai("VNet", 3, 1, 2),
        ((1, 1, 16, 32, 16),),
        (7, 11, 13),
        multiple=16,
        heavy=True,
    ),
    Entry(
        "highresnet_3d",
        _monai(
            "HighResNet",
            3,
            1,
            2,
            layer_params=(
                {"name": "conv_0", "n_features": 4, "kernel_size": 3},
                {"name": "res_1", "n_features": 4, "kernels": (3, 3), "repeat": 1},
                {"name": "res_2", "n_features": 8, "kernels": (3, 3), "repeat": 1},
                {"name": "conv_1", "n_features": 8, "kernel_size": 1},
                {"name": "conv_2", "kernel_size": 1},
            ),
        ),
        ((1, 1, 15, 21, 19),),
        (7, 11, 8),
    ),
)  # fmt: skip

TRANSFORMERS = (
    Entry(
        "convnextv2",
        _transformers(
            "ConvNextV2ForImageClassification",
            "ConvNextV2Config",
            hidden_sizes=[8, 16, 24, 32],
            depths=[1, 1, 2, 1],
        ),
        ODD,
        REGION,
        logits,
    ),
    Entry(
        "mobilenetv2",
        _transformers("MobileNetV2ForImageClassification", "MobileNetV2Config"),
        ODD,
        REGION,
        logits,
    ),
    Entry(
        "regnet",
        _transformers(
            "RegNetForImageClassification",
            "RegNetConfig",
            embedding_size=8,
            hidden_sizes=[16, 24, 32, 48],
            depths=[1, 2, 2, 1],
            groups_width=8,
            layer_type="y",
        ),
        ODD,
        REGION,
        logits,
    ),
    Entry(
        "resnet18",
        _transformers(
            "ResNetForImageClassification",
            "ResNetConfig",
            embedding_size=64,
            hidden_sizes=[64, 128, 256, 512],
            depths=[2, 2, 2, 2],
            layer_type="basic",
        ),
        ODD,
        REGION,
        logits,
    ),
    Entry(
        "segformer",
        _transformers(
            "SegformerForSemanticSegmentation",
            "SegformerConfig",
            hidden_sizes=[8, 16, 20, 32],
            depths=[1, 1, 1, 1],
            decoder_hidden_size=16,
        ),
        ODD,
        REGION,
        logits,
        whole=True,
    ),
    Entry(
        "swin_tiny",
        _transformers(
            "SwinModel",
            "SwinConfig",
            image_size=(133, 101),
            window_size=4,
            embed_dim=24,
            depths=[2, 2, 2, 2],
            num_heads=[1, 2, 4, 8],
        ),
        ODD,
        REGION,
        features,
        whole=True,
    ),
)

DIFFUSERS = (
    Entry("autoencoderkl_decoder", _autoencoder, ((1, 4, 17, 13),), (37, 29)),
    Entry("unet2d", _unet2d, ((1, 3, 68, 52),), (29, 19), multiple=4, whole=True),
)

SERIES = (
    Entry("tcn", TCN, ((2, 2, 517),), (101,)),
    Entry("wavenet", WaveNet, ((2, 1, 517),), (101,)),
    Entry("tagger", Tagger, ((2, 3, 517),), (101,)),
)


def _needing(package: str, entries: tuple[Entry, ...]) -> tuple[Entry, ...]:
    """The entries, marked with the package that they come from."""
    return tuple(replace(entry, needs=package) for entry in entries)


ZOO: tuple[Entry, ...] = (
    *_needing("monai", MONAI),
    *_needing("transformers", TRANSFORMERS),
    *_needing("diffusers", DIFFUSERS),
    *SERIES,
)
