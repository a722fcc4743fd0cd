"""Numbers over a whole output, counted region by region: the class histogram, means, extrema."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ranger_nn.errors import InputError
from ranger_nn.io.protocol import Array
from ranger_nn.names import nearest

STATISTICS = ("histogram", "mean", "max", "min", "mean_probability")


class Tally:
    """Numbers over the whole output, merged from regions in order; plain data between two runs.

    Args:
        names: of "histogram" (pixels of each class, of integer results), "mean", "max", "min" (of each channel of the model's
            output), "mean_probability" (mean of the softmax over channels).
    Raises:
        InputError: an unknown name.
    """

    def __init__(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in STATISTICS:
                raise InputError(
                    f"unknown statistic {name!r}{nearest(name, STATISTICS)}; known are {', '.join(STATISTICS)}"
                )
        self.names = tuple(names)
        self._state: dict[str, Any] = {}

    def take(self, state: Any, channels: int, pixels: int, some: bool) -> None:
        """Go on from `state()` of an unfinished run, over `pixels` of so many channels; `some` of them may be left out.

        Raises:
            ValueError: it is none of such a run.
        """
        if not isinstance(state, dict) or (state and state.keys() != {*self.names, "pixels"}):
            raise ValueError(f"statistics {_short(state)} instead of {', '.join(self.names)}")
        found = {k: np.asarray(v) for k, v in state.items()}
        for name, value in found.items():
            counts = name in ("histogram", "pixels")
            shaped = value.ndim == 0 if name == "pixels" else value.ndim == 1 and (counts or len(value) == channels)
            if not shaped or value.dtype.kind not in ("iu" if counts else "iuf") or (counts and (value < 0).any()):
                raise ValueError(f"statistics {name} are {_short(state[name])}")
        counted = int(found["pixels"]) if found else 0
        if counted != pixels and not (some and counted < pixels):
            raise ValueError(f"statistics of {counted} pixels, and {pixels} are written")
        self._state = found

    def add(self, output: Array, written: Array, absent: Array | None = None) -> None:
        """One region: the model's output (channels, ...) and what is written of it, less where `absent` (...) is True."""
        if absent is not None:
            output, written = output[:, ~absent], written[:, ~absent]
        if not output[0].size:
            return
        rest = tuple(range(1, output.ndim))
        for name in self.names:
            if name == "histogram":
                self._merge(name, np.bincount(written.ravel(), minlength=256), _added)
            elif name == "mean":
                self._merge(name, output.sum(axis=rest, dtype=np.float64), np.add)
            elif name == "mean_probability":
                self._merge(name, _softmax(output).sum(axis=rest, dtype=np.float64), np.add)
            else:
                extreme = output.max(axis=rest) if name == "max" else output.min(axis=rest)
                self._merge(name, extreme.astype(np.float64), np.maximum if name == "max" else np.minimum)
        self._merge("pixels", np.asarray(output[0].size), np.add)

    def _merge(self, name: str, part: Array, how: Callable[[Array, Array], Array]) -> None:
        self._state[name] = how(self._state[name], part) if name in self._state else part

    def state(self) -> dict[str, Any]:
        """Plain data; `take` goes on from it."""
        return {k: v.tolist() for k, v in self._state.items()}

    def result(self) -> dict[str, Any]:
        """The statistics: a list for each name; the histogram ends with the last class that occurs."""
        found: dict[str, Any] = {}
        for name in self.names:
            if name not in self._state:
                continue
            value = self._state[name]
            if name == "histogram":
                value = value[: int(np.flatnonzero(value).max(initial=0)) + 1]
            elif name.startswith("mean"):
                value = value / self._state["pixels"]
            found[name] = value.tolist()
        return found


def _added(a: Array, b: Array) -> Array:
    """Histograms, of which one may know more classes."""
    longer, shorter = (a, b) if len(a) >= len(b) else (b, a)
    return np.asarray(longer + np.pad(shorter, (0, len(longer) - len(shorter))))


def _short(value: Any) -> str:
    return repr(value)[:60]


def _softmax(x: Array) -> Array:
    e = np.exp(x - x.max(axis=0, keepdims=True))
    return np.asarray(e / e.sum(axis=0, keepdims=True))
