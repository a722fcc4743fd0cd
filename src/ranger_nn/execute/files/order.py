"""Where the channels of a picture are: files have them first, and a framework may have them last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TypeVar

import numpy as np

from ranger_nn.core.reach import Box
from ranger_nn.io.protocol import Array

Axis = TypeVar("Axis", int, tuple[int, int])


@dataclass(frozen=True)
class Order:
    """The axes of a value that is a picture: (1, channels, *spatial), or with `last` (1, *spatial, channels)."""

    last: bool = False

    def channels(self, shape: Sequence[int]) -> int:
        """How many."""
        return shape[-1] if self.last else shape[1]

    def spatial(self, axes: Sequence[Axis]) -> tuple[Axis, ...]:
        """Of sizes, or of a box, those along rows and columns."""
        return tuple(axes[1:-1] if self.last else axes[2:])

    def others(self, rank: int) -> tuple[int, ...]:
        """The dimensions that are not spatial."""
        return (0, rank - 1) if self.last else tuple(range(min(2, rank)))

    def shape(self, channels: int, sizes: Sequence[int]) -> tuple[int, ...]:
        """Of a value."""
        return (1, *sizes, channels) if self.last else (1, channels, *sizes)

    def value(self, pixels: Array) -> Array:
        """A value's region from (channels, *spatial)."""
        return np.moveaxis(pixels, 0, -1)[np.newaxis] if self.last else pixels[np.newaxis]


def volume(box: Box) -> int:
    """Elements of a region."""
    return prod(hi - lo for lo, hi in box)
