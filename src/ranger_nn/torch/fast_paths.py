"""PyTorch's own transformer modules take another way in inference than while they are exported: what that changes.

`nn.TransformerEncoderLayer` runs one fused operator where nothing needs a gradient; an export takes the operators one by
one, which is what regions need. The numbers are the same, with two exceptions, mended here while a twin is exported:

    CPU autocast           the fused operator gives autocast's type, the operators one by one float32: cast
    a padding mask         `nn.TransformerEncoder` packs sequences and gives zeros at padded places, if the mask's values let
                           it: that follows from data, so it is refused by name

The conditions are those of `torch/nn/modules/transformer.py` (PyTorch 2.13). Enter at `as_called`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ranger_nn.errors import CaptureError


@contextmanager
def as_called(twin: nn.Module) -> Iterator[None]:
    """While a twin is exported its transformer modules give what they give when they are called.

    Raises:
        CaptureError: a `TransformerEncoder` whose result depends on the values of its padding mask.
    """
    hooks: list[Any] = []
    for name, module in twin.named_modules() if torch.backends.mha.get_fastpath_enabled() else ():
        if isinstance(module, nn.TransformerEncoder):
            hooks.append(module.register_forward_pre_hook(_refusal(name), with_kwargs=True))
        elif isinstance(module, nn.TransformerEncoderLayer) and _fused(module):
            hooks.append(module.register_forward_hook(_cast))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _fused(layer: nn.TransformerEncoderLayer) -> bool:
    """Whether the layer runs as one operator, for batched inputs and where no gradient is needed."""
    attention = layer.self_attn
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in layer.modules())
    plain = attention.batch_first and attention.in_proj_bias is not None and attention._qkv_same_embed_dim
    usual = layer.activation_relu_or_gelu and layer.norm1.eps == layer.norm2.eps and attention.num_heads % 2 == 0
    return bool(plain and usual and not (layer.training or hooked or torch.is_autocast_enabled()))


def _differentiated(module: nn.Module, x: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in (x, *module.parameters()))


def _cast(layer: nn.Module, args: tuple[Any, ...], result: Tensor) -> Tensor:
    kind = result.device.type
    low = result.dim() == 3 and torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    if not low or result.dtype != torch.float32 or _differentiated(layer, result):
        return result
    return result.to(torch.get_autocast_dtype(kind))


def _refusal(name: str) -> Any:
    def refuse(encoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(("src", "mask", "src_key_padding_mask"), args, strict=False)) | kwargs
        src, first = given.get("src"), encoder.layers[0]
        packs = getattr(encoder, "use_nested_tensor", False) and given.get("src_key_padding_mask") is not None
        if (
            not packs
            or given.get("mask") is not None
            or first.training
            or not isinstance(src, Tensor)
            or src.dim() != 3
        ):
            return
        if _differentiated(first, src):
            return
        raise CaptureError(
            f"{name or type(encoder).__name__} is a TransformerEncoder with src_key_padding_mask, which in inference packs "
            "its sequences and gives zeros at padded places where the mask's values allow it: what it gives depends on data. "
            "Make it with enable_nested_tensor=False, or call torch.backends.mha.set_fastpath_enabled(False), which the "
            "untouched model then follows as well."
        )

    return refuse
