"""PyTorch's transformer modules take another way in inference than in an export: results are those of a call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import ranger_nn


@pytest.fixture(autouse=True)
def _fast() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


def layer(**options: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(16, 4, 32, **{"batch_first": True, "dropout": 0.0, **options}).eval()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm_first": True},
        {"activation": "gelu"},
        {"activation": torch.tanh},
        {"batch_first": False},
        {"bias": False},
    ],
    ids=["usual", "norm first", "gelu", "tanh", "batch second", "no bias"],
)
@pytest.mark.parametrize("enabled", [True, False])
def test_types_under_autocast(options: dict[str, Any], enabled: bool) -> None:
    """The fused operator gives autocast's type; where it is not taken, the result is in 32 bits."""
    torch.backends.mha.set_fastpath_enabled(enabled)
    net, x = layer(**options), torch.randn(2, 30, 16)
    for grad in (False, True):
        with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
            want, got = net(x), ranger_nn.regionalize(net)(x)
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)


def _padded() -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[0, 8:] = True
    return torch.randn(2, 12, 16), mask


def test_packed_sequences_are_refused() -> None:
    """Zeros at padded places follow from the mask's values."""
    net = nn.TransformerEncoder(layer(), 2).eval()
    x, mask = _padded()
    with torch.no_grad(), pytest.raises(ranger_nn.CaptureError, match="enable_nested_tensor=False"):
        ranger_nn.regionalize(net)(x, src_key_padding_mask=mask)


@pytest.mark.parametrize("way", ["not nested", "fast path off", "with gradients"])
def test_masks_that_pack_nothing(way: str) -> None:
    """Either way out gives what the untouched model gives then, and so does a call that needs gradients."""
    net = nn.TransformerEncoder(layer(), 2, enable_nested_tensor=way != "not nested").eval()
    torch.backends.mha.set_fastpath_enabled(way != "fast path off")
    x, mask = _padded()
    with torch.set_grad_enabled(way == "with gradients"):
        want = net(x, src_key_padding_mask=mask)
        got = ranger_nn.regionalize(net)(x, src_key_padding_mask=mask)
    torch.testing.assert_close(got, want)
    assert want[0, 8:].abs().min() > 0
