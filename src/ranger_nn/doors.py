"""`regionalize`, `plan` and `run` for the caller's framework: the adapter is chosen by the class of the model.

No framework is imported that the caller has not imported: only the adapter of the model's own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ranger_nn.errors import InputError
from ranger_nn.io.pixels import Pixels

if TYPE_CHECKING:
    from ranger_nn.execute.files.prepared import Prepared
    from ranger_nn.execute.files.report import Report
    from ranger_nn.io.protocol import Array

_ADAPTERS = {"keras": "Layer", "torch": "Module"}
"""Of each framework the class of its models. In this order: with its PyTorch back end a Keras model is an `nn.Module` too."""


def regionalize(
    model: Any,
    memory: int | str | None = None,
    *,
    regions: Sequence[int] | None = None,
    schedule: str | None = None,
    verify: bool = False,
) -> Any:
    """A model that computes what `model` computes, region by region, inside `memory`: see the adapter's own.

    A `torch.nn.Module` gives a `torch.nn.Module` (`ranger_nn.torch.module.regionalize`), a `keras.Model` gives a
    `keras.Model` (`ranger_nn.keras.model.regionalize`); both share the parameters of the one given.

    Raises:
        InputError: the model is of neither framework.
    """
    return _adapter(model, "regionalize").regionalize(model, memory, regions=regions, schedule=schedule, verify=verify)


def plan(
    model: Any,
    x: Any,
    memory: int | str | None = None,
    *,
    regions: Sequence[int] | None = None,
    schedule: str | None = None,
    training: bool = False,
) -> Any:
    """The `Plan` for `model` on `x` (arrays, or a shape); the model is not run.

    Raises:
        InputError: the model is of neither framework.
    """
    return _adapter(model, "plan").plan(model, x, memory, regions=regions, schedule=schedule, training=training)


def run(
    model: Any,
    source: Any,
    sink: Any,
    memory: int | str | None = None,
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
    device: Any = "cpu",
    on_region: Callable[[int, int], None] | None = None,
    prepared: Prepared | None = None,
) -> Report:
    """Apply `model` to an image that need not fit in memory, and write what it gives.

    Args:
        model: a `torch.nn.Module` that takes (1, channels, rows, columns) (or with depth), in the mode that it is to run in
            (`model.eval()`); or a `keras.Model` that takes one input (1, rows, columns, channels), which runs as in `predict`.
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
        regions, schedule: as in `regionalize`; a Keras model is slid along its rows.
        resume: go on with an unfinished run of the same work; False: start it anew.
        overwrite: replace a result that is there (a plain file, or a Zarr array that a run wrote), and start anew.
        skip_bad: fill regions that cannot be read with zeros and list them, instead of stopping.
        device: where PyTorch's kernels run; a Keras model runs where Keras puts it.
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
    files = importlib.import_module("ranger_nn.execute.files.run")
    wanted = files.Wanted.checked(sink, reduce, statistics, overwrite)
    made = prepared or prepare(
        model, source, memory, pixels=pixels, axes=axes, level=level, regions=regions, schedule=schedule,
        skip_bad=skip_bad, device=device,
    )  # fmt: skip
    report: Report = files.run(made, wanted, resume, on_region)
    return report


def prepare(
    model: Any,
    source: Any,
    memory: int | str | None = None,
    *,
    pixels: Pixels | None = None,
    axes: str | None = None,
    level: int = 0,
    regions: Sequence[int] | None = None,
    schedule: str | None = None,
    skip_bad: bool = False,
    device: Any = "cpu",
) -> Prepared:
    """The plan of a `run`; nothing is computed. Arguments and errors as there."""
    made: Prepared = _adapter(model, "run", "prepare").prepare(
        model, source, memory, pixels=pixels, axes=axes, level=level, regions=regions, schedule=schedule,
        skip_bad=skip_bad, device=device,
    )  # fmt: skip
    return made


_ROOMS = {"keras": "model", "torch": "module"}
"""Where an adapter has `regionalize` and `plan`."""


def _adapter(model: Any, door: str, room: str | None = None) -> Any:
    bases = {(base.__module__.partition(".")[0], base.__name__) for base in type(model).__mro__}
    for framework, name in _ADAPTERS.items():
        if (framework, name) in bases:
            return importlib.import_module(f"ranger_nn.{framework}.{room or _ROOMS[framework]}")
    raise InputError(f"{door} takes a torch.nn.Module or a keras.Model, got {type(model).__name__}")
