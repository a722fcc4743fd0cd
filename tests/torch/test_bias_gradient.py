"""A bias's gradient is a sum over every pixel: it must not lose digits over many of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ranger_nn
from tests.support import difference


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 4, 2, stride=2), nn.ConvTranspose2d(4, 4, 2, stride=2)])
def test_near_float64(layer: nn.Module) -> None:
    """In float32, within 1e-6 of the sum in float64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 512, 512, generator=generator)
    y = ranger_nn.regionalize(layer, regions=(128,))(x)
    grad = 1 + torch.randn(y.shape, generator=generator)
    layer.zero_grad()
    y.backward(grad)
    assert difference(layer.bias.grad.double(), grad.double().sum((0, 2, 3))) < 1e-6
