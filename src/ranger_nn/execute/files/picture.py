"""Outputs of a run on their way: reduced, counted, and handed to the writer, region by region. Enter at `Picture`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ranger_nn.core.reach import Box
from ranger_nn.errors import InputError
from ranger_nn.execute.files.framework import Framework, Tensor
from ranger_nn.execute.files.order import Order
from ranger_nn.execute.files.outlet import Outlet
from ranger_nn.execute.files.reduction import Reduction
from ranger_nn.io.protocol import Array
from ranger_nn.io.rows import RowFile
from ranger_nn.io.tally import Tally


@dataclass
class Picture:
    """An output on its way to a sink: the owner of the handle that the program writes to."""

    name: str
    sink: Any
    reduced: Reduction
    tally: Tally
    outlet: Outlet
    framework: Framework
    absent: RowFile | None = None
    nodata: float | None = None
    written: int = 0

    def write(self, box: Box, region: Tensor) -> None:
        """Reduce, count, hand to the writer."""
        place = Order(self.framework.channels_last).spatial(box)
        output = self.framework.picture(region)
        pixels = reduced_pixels(self.framework, self.reduced, output)
        absent = None
        if self.absent is not None:
            absent = self.absent.read(place)[0] > 0
            pixels = np.where(absent, np.asarray(self.nodata, pixels.dtype), pixels)
        plain = self.framework.array(output)
        self.tally.add(plain.astype(np.float32) if plain.dtype == np.float16 else plain, pixels, absent)
        self.written += pixels.nbytes
        self.outlet.put(lambda: self.sink.write(place, pixels))


def reduced_pixels(framework: Framework, reduced: Reduction, output: Any) -> Array:
    """What is written of a picture (channels, *spatial): contiguous, its own type."""
    found = reduced(output if reduced.given is None else framework.array(output))
    return np.ascontiguousarray(found if isinstance(found, np.ndarray) else framework.array(found))


def check_nodata(value: float | None, dtype: np.dtype[Any]) -> None:
    """Refuse a value that the result cannot hold.

    Raises:
        InputError: it is not one of `dtype`.
    """
    if value is None or dtype.kind == "f":
        return
    kind = np.iinfo(dtype) if dtype.kind in "iu" else None
    if kind is None or not kind.min <= value <= kind.max or value != int(value):
        raise InputError(
            f"result={value} of Pixels stands where the input has no data, and the result is {dtype}: give a value that "
            f"{dtype} holds" + ("" if kind is None else f", {kind.min} to {kind.max}")
        )
