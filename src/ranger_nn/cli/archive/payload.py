"""The tables of weights and constants, and the sample inputs: tensors, and nothing that is unpickled into objects."""

from __future__ import annotations

import io
import math
import re
from typing import Any

import torch

from ranger_nn.cli.archive.words import Forbidden, plain

_VALUES = (torch.Tensor, torch.dtype, torch.device, torch.layout, torch.memory_format, int, float, complex, type(None))
_PAYLOAD = re.compile(r"(weight|tensor)_[0-9]{1,9}")


def check_tensors(table: dict[str, Any], sizes: dict[str, int]) -> None:
    """Each entry of a table (whose types were checked) is a tensor in a record of its own; `sizes`: bytes of records."""
    for name, entry in table.get("config", {}).items():
        record = entry.get("path_name", "")
        if not _PAYLOAD.fullmatch(record):
            raise Forbidden(
                f"{name[:120]!r} must be a tensor; {record[:120]!r} holds an object that would be unpickled"
            )
        if record not in sizes:
            raise Forbidden(f"{name[:120]!r} must have its values in the archive; there is no {record!r}")
        if sizes[record] == 0 and _elements(entry.get("tensor_meta")) > 0:
            raise Forbidden(f"{name[:120]!r} must have its values in the archive; {record!r} is empty")


def check_sample_inputs(record: bytes) -> None:
    """Nested tensors and numbers; keys become generated source, as those of the trees do."""
    if record:
        _check_value(torch.load(io.BytesIO(record), map_location="cpu", weights_only=True))


def _elements(meta: dict[str, Any] | None) -> int:
    return math.prod(size.get("as_int", 1) for size in meta["sizes"]) if meta else 1


def _check_value(value: object) -> None:
    if isinstance(value, dict):
        for key in value:
            if isinstance(key, str):
                plain(key)
            elif not isinstance(key, int | float):
                raise Forbidden(f"the sample inputs must have keys of text or numbers; got {type(key).__name__}")
        _check_value(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            _check_value(part)
    elif isinstance(value, str):
        plain(value)
    elif not isinstance(value, _VALUES):
        raise Forbidden(f"the sample inputs must be tensors and numbers; got {type(value).__name__}")
