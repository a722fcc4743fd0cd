"""What a model is fed from pixels: band selection, nodata, scale, mean and deviation, declared and not hand-coded.

pixels --bands--> --nodata to fill--> * scale --> (x - mean) / std --> the model
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ranger_nn.errors import InputError
from ranger_nn.io.protocol import Array


@dataclass(frozen=True)
class Pixels:
    """How pixels become numbers.

    Args:
        scale: factor; None: 1 / largest value for unsigned integers (so 0..1), 1 for everything else.
        mean: subtracted after scaling, one number or one for each band.
        std: divided by, after that.
        bands: indices of the channels to take, in this order; None: all.
        nodata: value that stands for no data: where all bands have it, the model sees `fill`.
        fill: what the model sees there, after normalisation.
        result: what the result holds there, and statistics leave out; None: whatever the model gives.

    Raises:
        InputError: a scale, mean or deviation that is no finite number, a deviation that is not positive, negative bands,
            `result` without `nodata`.
    """

    scale: float | None = None
    mean: float | tuple[float, ...] = 0.0
    std: float | tuple[float, ...] = 1.0
    bands: tuple[int, ...] | None = None
    nodata: float | None = None
    fill: float = 0.0
    result: float | None = None

    def __post_init__(self) -> None:
        """Lists become tuples; refuse what has no meaning."""
        for name in ("mean", "std", "bands"):
            value = getattr(self, name)
            if isinstance(value, Sequence | np.ndarray) and not isinstance(value, str):
                object.__setattr__(self, name, tuple(value))
        for name in ("scale", "mean", "std", "nodata", "fill", "result"):
            _check_numbers(name, getattr(self, name))
        if self.scale == 0:
            raise InputError("scale of Pixels is 0, which makes all pixels the same; leave it out for the usual one")
        if any(s <= 0 for s in np.atleast_1d(self.std)):
            raise InputError(f"std of Pixels divides, so it is above 0; got {self.std}")
        if self.result is not None and self.nodata is None:
            raise InputError(
                f"result={self.result} of Pixels stands where the input has no data: say which value that is, nodata=..."
            )
        if self.bands is not None and (not self.bands or any(b != int(b) or b < 0 for b in self.bands)):
            raise InputError(f"bands of Pixels are indices from 0 on; got {self.bands}")

    def channels(self, available: int, name: str) -> int:
        """Channels that the model sees.

        Raises:
            InputError: a band that the input does not have, or means for another number of bands.
        """
        if self.bands is not None and max(self.bands) >= available:
            raise InputError(f"band {max(self.bands)} was asked for; {name} has bands 0 to {available - 1}")
        count = available if self.bands is None else len(self.bands)
        for what, value in (("mean", self.mean), ("std", self.std)):
            if isinstance(value, tuple) and len(value) not in (1, count):
                raise InputError(f"{what} has {len(value)} numbers for {count} bands of {name}: give one, or {count}")
        return count

    def apply(self, pixels: Array, dtype: np.dtype[Any]) -> Array:
        """(channels, ...) of `dtype` from (bands, ...) of pixels."""
        return self.applied(pixels, dtype)[0]

    def applied(self, pixels: Array, dtype: np.dtype[Any]) -> tuple[Array, Array | None]:
        """((channels, ...) of `dtype` from (bands, ...) of pixels, where all bands that are taken hold `nodata`: (...) bool).

        The latter is None where no `nodata` is declared.
        """
        if self.bands is not None:
            pixels = pixels[list(self.bands)]
        absent = None if self.nodata is None else self._absent(pixels)
        scale = self.scale
        if scale is None:
            scale = 1 / np.iinfo(pixels.dtype).max if pixels.dtype.kind == "u" else 1.0
        x = pixels.astype(dtype)
        if scale != 1:
            x *= dtype.type(scale)
        if np.any(self.mean):
            x -= self._column(self.mean, x)
        if np.any(np.asarray(self.std) != 1):
            x /= self._column(self.std, x)
        if absent is not None:
            x[:, absent] = self.fill
        return x, absent

    def _absent(self, pixels: Array) -> Array:
        same = np.isnan(pixels) if self.nodata != self.nodata else pixels == self.nodata
        return np.asarray(same.all(axis=0))

    @staticmethod
    def _column(value: float | tuple[float, ...], like: Array) -> Array:
        return np.asarray(value, like.dtype).reshape(-1, *[1] * (like.ndim - 1))


FINITE = ("scale", "mean", "std")
"""A number that is none makes every pixel none; `nodata` and what stands for it may be."""


def _check_numbers(name: str, value: Any) -> None:
    if value is None and name in ("scale", "nodata", "result"):
        return
    try:
        numbers = np.asarray(value, np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{name} of Pixels is a number{' for each band' if name in FINITE[1:] else ''}; got {value!r}"
        ) from error
    if name in FINITE and not np.isfinite(numbers).all():
        raise InputError(f"{name} of Pixels is finite; got {value}")
