"""Optional packages: imported when a file needs them, or the error that names the command that installs them."""

from __future__ import annotations

import importlib
from typing import Any

from ranger_nn.errors import MissingExtraError


def import_extra(module: str, extra: str, what: str, package: str | None = None) -> Any:
    """The module.

    Args:
        module: its name.
        extra: of ranger-nn, which brings it.
        what: needs it ("TIFF files").
        package: the name under which it is installed, where that is another one.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{what} need {package or module}, which is not installed. Install it with: pip install 'ranger-nn[{extra}]'"
        ) from error
