"""Overlapping patches, taken out of a map and added up into one, cut along the rows of their places."""

from __future__ import annotations

from typing import Any

import pytest
from keras import ops

from tests.keras.between import check

SHAPE = (2, 22, 20, 3)
"""More columns than parts of a step, were they not rows and columns of a map."""


@pytest.mark.parametrize(
    ("kernel", "dilation", "padding", "stride"), [(3, 1, 1, 1), ((3, 2), (1, 2), (2, 1), (2, 1)), (2, 1, 1, 3)], ids=str
)
def test_unfold_and_fold(kernel: Any, dilation: Any, padding: Any, stride: Any) -> None:
    """Windows that overlap, with holes, and apart."""

    def patches(h: Any) -> Any:
        found = ops.nn.unfold(ops.transpose(h, (0, 3, 1, 2)), kernel, dilation, padding, stride)
        added = ops.nn.fold(ops.sin(found), SHAPE[1:3], kernel, dilation, padding, stride)
        return ops.transpose(added, (0, 2, 3, 1))

    check(patches, SHAPE, 4)


def test_extract_patches() -> None:
    """With and without a border, dilated, of volumes."""
    take = ops.image.extract_patches
    check(lambda h: take(h, (3, 2), (2, 1), 1, "same"), SHAPE, 4)
    check(lambda h: take(h, 3, 1, 2, "valid"), SHAPE, 4)
    check(lambda h: take(h, (2, 3, 2), (1, 2, 1), 1, "same"), (1, 9, 7, 5, 3), 2)
