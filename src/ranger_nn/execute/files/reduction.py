"""What is done to a model's output before it is written, region by region.

    output (channels, rows, columns)  --Reduction-->  (channels', rows, columns)

Pixel by pixel only: a region's result must not depend on where regions end. Enter at `reduction`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from ranger_nn.errors import InputError
from ranger_nn.io.fingerprint import NoFingerprintError, fingerprint
from ranger_nn.io.journal import UNKNOWN
from ranger_nn.io.protocol import Array
from ranger_nn.names import nearest

NAMES = ("none", "argmax", "threshold", "uint8")
_THRESHOLD = re.compile(r"threshold(?::(?P<at>[-+0-9.eE]+))?")


@dataclass(frozen=True)
class Reduction:
    """A reduction by name, of any namespace of the array API; or `given`, a callable of the NumPy array of one region."""

    name: str
    function: Callable[[Any], Any]
    given: Any = None

    def identity(self) -> str:
        """What tells it from others: its name; of a callable what it does, or that nobody can tell."""
        if self.given is None:
            return self.name
        try:
            return f"{self.name} {fingerprint(self.given)}"
        except NoFingerprintError as error:
            return f"{UNKNOWN}{self.name} uses {error}"

    def __call__(self, output: Any) -> Any:
        """(channels', rows, columns) of (channels, rows, columns).

        Raises:
            InputError: the result has other rows or columns.
        """
        found = self.function(output)
        found = found[None, ...] if found.ndim == output.ndim - 1 else found
        if tuple(found.shape[1:]) != tuple(output.shape[1:]):
            raise InputError(
                f"reduce={self.name} must keep rows and columns: it got shape {tuple(output.shape)} and gave "
                f"{tuple(found.shape)}"
            )
        return found


def _numbers(name: str, found: Any) -> Array:
    array = np.asarray(found)
    if array.dtype.kind not in "biufc":
        raise InputError(f"reduce={name} gave {type(found).__name__} of {array.dtype}, which is no array of numbers")
    return array


def _argmax(x: Any) -> Any:
    xp = array_namespace(x)
    return xp.astype(xp.argmax(x, axis=0), xp.uint8 if x.shape[0] <= 256 else xp.int32)


def _uint8(x: Any) -> Any:
    xp = array_namespace(x)
    bright = xp.clip(x, 0, 1) * 255
    return xp.astype(xp.round(xp.where(xp.isnan(bright), xp.zeros_like(bright), bright)), xp.uint8)


def _above(x: Any, at: float) -> Any:
    return array_namespace(x).astype(x > at, array_namespace(x).uint8)


def reduction(given: str | Callable[[Any], Any] | None) -> Reduction:
    """The reduction that a name or a callable means.

    - "argmax": class of the largest channel, uint8 (int32 from 257 classes on).
    - "threshold" or "threshold:0.3": 1 where the value is above (0.5), else 0; uint8.
    - "uint8": 0..1 as 0..255, clipped and rounded.
    - None, "none": the output as it is.

    Raises:
        InputError: an unknown name.
    """
    if given is None or given == "none":
        return Reduction("none", lambda x: x)
    if callable(given):
        function = given
        name = getattr(given, "__qualname__", type(given).__name__)
        return Reduction(name, lambda x: _numbers(name, function(x)), given)
    if given == "argmax":
        return Reduction("argmax", _argmax)
    if given == "uint8":
        return Reduction("uint8", _uint8)
    match = _THRESHOLD.fullmatch(given) if isinstance(given, str) else None
    if match is None:
        raise InputError(
            f"unknown reduce={given!r}{nearest(given, NAMES)}; known are {', '.join(NAMES)}, or give a callable"
        )
    try:
        at = float(match["at"] or 0.5)
    except ValueError as error:
        raise InputError(f"reduce={given!r}: {match['at']!r} is no number; for example threshold:0.5") from error
    return Reduction(f"threshold:{at!r}", lambda x: _above(x, at))
