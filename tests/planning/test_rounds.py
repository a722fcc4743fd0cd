"""A value computed again shows its worth on short steps only: the search goes on from them, in inference as in training."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import ranger_nn
from ranger_nn import errors


class GlobalResponse(nn.Module):
    """ConvNeXt V2's normalisation: all of a map is read before any of it is scaled."""

    def forward(self, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, 2, dim=(2, 3), keepdim=True)
        return x * (norm / (norm.mean(1, keepdim=True) + 1e-6)) + x


def least(model: nn.Module, training: bool) -> int:
    """The least budget."""
    with pytest.raises(errors.BudgetError) as error:
        ranger_nn.plan(model, (1, 3, 96, 96), 1, training=training)
    return error.value.least or 0


@pytest.mark.parametrize("last", [(), (nn.Conv2d(16, 4, 3, padding=1),)], ids=["norm", "norm and convolution"])
def test_inference_needs_no_more_than_training(last: tuple[nn.Module, ...]) -> None:
    """The one stored value (590 kB) is computed again."""
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), GlobalResponse(), *last)
    needed = least(model, False)
    assert needed <= least(model, True)
    assert needed < 96 * 96 * 16 * 4 // 2
    x = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(ranger_nn.regionalize(model, needed)(x), model(x), rtol=1e-5, atol=1e-5)
