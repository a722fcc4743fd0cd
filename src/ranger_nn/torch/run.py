"""`run`: from file to file, region by region, inside a stated memory, and on again after a crash.

    source --Reader--> pixels --Pixels--> tensor --program--> output --Reduction--> rows --FileSink--> result
              once        declared                                    + Tally

After each region the rows are on the disk and the journal says so; a run that finds a journal of the same model, input,
plan and options goes on there (`execute/resume.py`). The dry run is `prepare`. Enter at `run`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ranger_nn.errors import InputError
from ranger_nn.io.overlap import overlap
from ranger_nn.io.pixels import Pixels
from ranger_nn.io.protocol import Array
from ranger_nn.io.sinks import check_sink
from ranger_nn.io.tally import Tally
from ranger_nn.torch.module import Memory
from ranger_nn.torch.prepare import Prepared, prepare
from ranger_nn.torch.reduce import reduction
from ranger_nn.torch.work import Report, Work


def run(
    model: nn.Module,
    source: Any,
    sink: Any,
    memory: Memory = None,
    *,
    reduce: str | Callable[[Array], Array] | None = None,
    pixels: Pixels | None = None,
    statistics: Sequence[str] | None = None,
    axes: str | None = None,
    level: int = 0,
    regions: Sequence[int] | None = None,
    schedule: str | None = None,
    resume: bool = True,
    overwrite: bool = False,
    skip_bad: bool = False,
    device: str | torch.device = "cpu",
    on_region: Callable[[int, int], None] | None = None,
    prepared: Prepared | None = None,
) -> Report:
    """Apply `model` to an image that need not fit in memory, and write what it gives.

    Args:
        model: a `torch.nn.Module` that takes (1, channels, rows, columns) (or with depth), in the mode that it is to run in
            (`model.eval()`).
        source: path (TIFF, GeoTIFF, whole slides, Zarr, HDF5, `.npy`, PNG, JPEG), or anything with shape, dtype and slicing.
        sink: path that ends in .zarr, .tif, .npy; or a writable array-like (channels, *spatial) or (*spatial), filled in
            place, which cannot be resumed (the input itself, too: rows then wait in a temporary file). Several pictures: NAME-0.zarr, NAME-1.zarr, ..., or, where the model gives a
            dictionary, NAME-KEY.zarr.
        memory: bytes, or "2GB": allowed for activations, carried rows, workspace, regions read ahead and written. Values
            between sweeps go to files in the working folder. None: no limit.
        reduce: "argmax", "threshold:0.5", "uint8", a callable of the (channels, rows, columns) of one region, or None.
        pixels: scale, mean, std, bands, nodata; None: unsigned integers become 0..1.
        statistics: of "histogram", "mean", "max", "min", "mean_probability", over the whole output; None: the histogram for
            argmax and threshold, else mean and max.
        axes: axes of an array-like source, such as "YXC".
        level: of a pyramid.
        regions, schedule: as in `regionalize`.
        resume: go on with an unfinished run of the same work; False: start it anew.
        overwrite: replace a result that is there (a plain file, or a Zarr array that a run wrote), and start anew.
        skip_bad: fill regions that cannot be read with zeros and list them, instead of stopping.
        device: where kernels run.
        on_region: called with (regions done, regions in all).
        prepared: from `prepare` with the same arguments, if it was made already.

    Raises:
        BudgetError: nothing fits into `memory`.
        InputError: a source or sink that cannot be used, a result that exists, an unfinished run of other work, a run that
            works on the same result now.
        WriteError: the disk is full, or another run took the working folder; what is done stays.
        BadRegionError: a region of the source cannot be read; what is done stays, and the run can go on.
        MissingExtraError: a format needs a package that is not installed.
    """
    chosen = reduction(reduce)
    counted = chosen.given is None and chosen.name.startswith(("argmax", "threshold"))
    default = ("histogram",) if counted else ("mean", "max")
    names = default if statistics is None else tuple(statistics)
    Tally(names)
    target = _target(sink, overwrite)
    made = prepared or prepare(
        model, source, memory, pixels=pixels, axes=axes, level=level, regions=regions, schedule=schedule,
        skip_bad=skip_bad, device=device,
    )  # fmt: skip
    try:
        if isinstance(target, Path) and overlap(made.source, target):
            raise InputError(
                f"the result {str(target)!r} would take the place of its own input, {made.source.name}. Give it another name."
            )
        return Work(made, target, chosen, names, on_region, overwrite).run(resume and not overwrite)
    finally:
        made.source.close()


def _target(sink: Any, overwrite: bool) -> Any:
    """A path, or an array that can be filled.

    Raises:
        InputError: neither, or the path cannot be written.
    """
    if isinstance(sink, str | os.PathLike):
        return check_sink(sink, overwrite)
    if all(hasattr(sink, a) for a in ("shape", "dtype", "__setitem__")):
        return sink
    raise InputError(f"a result is a path, or an array with shape, dtype and slicing; got {type(sink).__name__}")
