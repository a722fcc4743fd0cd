"""Known gaps: what the issue asks for and this version does not hold yet. Each is a test that is expected to fail.

Taking a line away is how a gap is closed; a test that starts to pass shows up as XPASS.
"""

from __future__ import annotations

import pytest

KNOWN_GAPS: dict[str, str] = {}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the known gaps."""
    for item in items:
        for place, reason in KNOWN_GAPS.items():
            if place in item.nodeid:
                item.add_marker(pytest.mark.xfail(reason=reason, strict=False))
