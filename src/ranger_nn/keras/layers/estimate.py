"""How many regions run at once under a stated memory, from the shapes of the local network's layers.

Keras has no counter of bytes that all back ends share, so this is an estimate: the outputs of all layers for one region,
twice in training (their gradients), and the region itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import keras

from ranger_nn.errors import BudgetError
from ranger_nn.planning.budget import format_bytes


def at_once(allowed: int, layer: Any, region: Sequence[int], regions: int, place: str, dtype: str) -> int:
    """Regions of shape `region` (batch first) that run together: the largest divisor of `regions` that fits.

    Raises:
        BudgetError: one region is more than is allowed.
    """
    one = region_bytes(layer, region, dtype)
    if one > allowed:
        raise BudgetError(
            f"one region must fit into memory: allowed {format_bytes(allowed)}, one of {place} needs about "
            f"{format_bytes(one)} (shape {tuple(region)}); allow that much, or cut smaller",
            allowed=allowed,
            least=one,
            binding=place,
        )
    return max(k for k in range(1, regions + 1) if regions % k == 0 and k * one <= allowed)


def region_bytes(layer: Any, region: Sequence[int], dtype: str) -> int:
    """Bytes of one region's activations and their gradients."""
    return 2 * _elements(layer, tuple(region)) * (2 if "16" in dtype else 8 if "64" in dtype else 4)


def _elements(layer: Any, shape: tuple[int, ...]) -> int:
    """Elements of the region and of the outputs of all layers."""
    own = prod(shape)
    if not isinstance(layer, keras.layers.Layer):
        return own
    if isinstance(layer, keras.Sequential):
        for sub in layer.layers:
            own += _elements(sub, shape) - prod(shape)
            shape = tuple(n or 1 for n in sub.compute_output_shape(shape))
        return own
    if isinstance(layer, keras.Model) and hasattr(layer, "operations"):
        return own + sum(prod(n or 1 for n in op.output.shape[1:]) * shape[0] for op in layer.operations)
    return own + prod(n or 1 for n in layer.compute_output_shape(shape))
