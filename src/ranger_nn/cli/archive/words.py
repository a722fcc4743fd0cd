"""Rules of single words, and the error that all rules of an archive raise."""

from __future__ import annotations

import re

# Longer names are found in no model; a limit keeps what we print and what PyTorch generates readable.
LONGEST = 500
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.\w+)*")


class Forbidden(ValueError):
    """A text of an archive that breaks its rule; the message is the rule."""


def identifier(text: str) -> None:
    """A Python name: PyTorch writes it into generated source as it stands."""
    if not text.isidentifier() or len(text) > LONGEST:
        raise Forbidden("must be a Python identifier")


def identifier_or_nothing(text: str) -> None:
    if text:
        identifier(text)


def plain(text: str) -> None:
    """Text that stays text between quotes of any kind."""
    if not text.isprintable() or set(text) & set("\"'`\\") or len(text) > LONGEST:
        raise Forbidden("must be printable text without quotes and backslashes")


def path(text: str) -> None:
    """Names of modules and parameters with dots between; nothing that leads out of them, as `__class__` does."""
    plain(text)
    if any(part.startswith("__") and part.endswith("__") for part in text.split(".") if part):
        raise Forbidden("must be names of modules and parameters with dots between")


def dotted(text: str) -> None:
    path(text)
    if not _DOTTED.fullmatch(text):
        raise Forbidden("must be identifiers with dots between")


def anything(text: str) -> None:
    """Text that PyTorch keeps as a value or a remark, and quotes itself where it prints it."""
