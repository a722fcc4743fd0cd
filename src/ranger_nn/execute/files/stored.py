"""A value between two sweeps, in a file of the working folder. Enter at `Stored`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ranger_nn.core.graph import Value
from ranger_nn.core.reach import Box
from ranger_nn.execute.files.framework import Framework, Tensor
from ranger_nn.io.rows import RowFile


class Stored:
    """A value between two sweeps, in a file; `again`: the file is there and is gone on with."""

    def __init__(self, path: Path, value: Value, framework: Framework, again: bool) -> None:
        self._dtype, self._framework = value.dtype, framework
        sized = (1, *value.shape)  # the file keeps its first axis whole; none of the value's is
        self.file = RowFile(path, sized, np.dtype(framework.kept_dtype(value.dtype)), again=again)

    def load(self, box: Box) -> Tensor:
        """Read a region."""
        return self._framework.restored(self.file.read(box)[0], self._dtype)

    def write(self, box: Box, region: Tensor) -> None:
        """Write a region."""
        self.file.write(box, self._framework.kept(region)[np.newaxis])
