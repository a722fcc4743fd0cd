"""From a path to a module: look through the archive, then let PyTorch load the very same bytes."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import torch

from ranger_nn.cli.archive.container import check_container
from ranger_nn.cli.archive.payload import check_sample_inputs, check_tensors
from ranger_nn.cli.archive.program import Misplaced, check_payload, check_program
from ranger_nn.cli.archive.words import Forbidden
from ranger_nn.errors import InputError

_LONGEST_REASON = 160  # characters of PyTorch's own words
_WAY_OUT = "Make one with torch.export.save(torch.export.export(model, inputs), path), or give package.module:factory."


def load_archive(path: str) -> Any:
    """The module of a .pt2 archive.

    Raises:
        InputError: it is none, or a text in it breaks its rule; nothing of it was run then.
    """
    with open(path, "rb") as file:  # one file for the check and for PyTorch: nobody can put another in its place
        try:
            check_archive(file)
        except (Forbidden, Misplaced) as error:
            raise InputError(
                f"MODEL {path!r} is not an archive that is safe to load: it {error}. {_WAY_OUT}"
            ) from error
        except Exception as error:
            raise _none_of_ours(path, error) from error
        file.seek(0)
        with nothing_unpickled(), _no_remarks():
            try:
                return torch.export.load(file).module()
            except Exception as error:
                # The reader raises many kinds of error on a file that is not an archive.
                raise _none_of_ours(path, error) from error


def check_archive(file: IO[bytes]) -> None:
    """Hold every text of the archive to its rule, read by PyTorch's own reader of records."""
    expected = check_container(file)
    file.seek(0)
    reader = torch._C.PyTorchFileReader(file)
    names = reader.get_all_records()
    if set(names) != expected:
        raise Forbidden("must read the same for every reader of zip files")
    sizes = {name.rpartition("/")[2]: reader.get_record_size(name) for name in names if name.startswith("data/")}
    for name in names:
        try:
            _check_record(reader, name, sizes)
        except (Forbidden, Misplaced) as error:
            raise Forbidden(f"breaks a rule in {name}: {error}") from error


def _check_record(reader: Any, name: str, sizes: dict[str, int]) -> None:
    if name.startswith("models/"):
        check_program(_parsed(reader, name))
    elif name.endswith("_config.json"):
        _check_table(_parsed(reader, name), sizes)
    elif name.startswith("data/sample_inputs/"):
        check_sample_inputs(reader.get_record(name))


def _check_table(table: Any, sizes: dict[str, int]) -> None:
    check_payload(table)
    check_tensors(table, sizes)


def _parsed(reader: Any, name: str) -> Any:
    return json.loads(reader.get_record(name).decode("utf-8"))


def _none_of_ours(path: str, error: Exception) -> InputError:
    reason = (str(error).strip().splitlines() or ["no message"])[0][:_LONGEST_REASON]
    return InputError(
        f"MODEL {path!r} is not an archive of torch.export whose tensors load without unpickling objects "
        f"({type(error).__name__}: {reason}). {_WAY_OUT}"
    )


@contextmanager
def nothing_unpickled() -> Iterator[None]:
    """PyTorch's own switch: whatever a file asks for, only tensors are loaded. A model file may come from anyone."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def _no_remarks() -> Iterator[None]:
    """The loader logs a whole traceback before it raises; one line is ours to print."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)
