"""Partitions and aggregators as plain dictionaries: what a saved model holds."""

from __future__ import annotations

import dataclasses
from typing import Any

from ranger_nn.errors import InputError
from ranger_nn.names import nearest


def to_config(made: Any) -> dict[str, Any]:
    """{"class": name, fields ...} of a frozen dataclass of numbers, names and tuples."""
    return {"class": type(made).__name__} | {f.name: getattr(made, f.name) for f in dataclasses.fields(made)}


def from_config(config: dict[str, Any], known: dict[str, type]) -> Any:
    """The object that a dictionary describes.

    Raises:
        InputError: a class that is not known.
    """
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k != "class"}
    name = config.get("class")
    if name not in known:
        raise InputError(
            f"unknown class {name!r} in a configuration{nearest(name, known)}; known are {', '.join(known)}"
        )
    counts = fields.pop("counts", None)
    return known[name](**fields) if counts is None else known[name](*counts, **fields)
