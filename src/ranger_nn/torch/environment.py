"""Environment variables that forward reads while it is traced: a plan holds as long as they are what they were.

Enter at `watched`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from ranger_nn.torch.alone import here


@contextmanager
def watched() -> Iterator[dict[str, str | None]]:
    """Variables that this thread reads meanwhile, as they are; None: not set."""
    kind: Any = type(os.environ)
    original, found = kind.__getitem__, dict[str, "str | None"]()

    def read(environment: Any, name: str) -> Any:
        if environment is os.environ:
            found[name] = None
            found[name] = original(environment, name)
        return original(environment, name)

    with patch.object(kind, "__getitem__", here(read, original)):
        yield found


def unchanged(found: Mapping[str, str | None]) -> bool:
    """Whether variables are still what they were."""
    return all(os.environ.get(name) == value for name, value in found.items())
