"""Where the input has no data: kept in a file, since the rows of the result come later than those of the input.

Enter at `absent_file`.
"""

from __future__ import annotations

import numpy as np

from ranger_nn.errors import InputError
from ranger_nn.execute.files.earlier import Earlier
from ranger_nn.execute.files.handle import loaded_boxes
from ranger_nn.execute.files.prepared import Prepared
from ranger_nn.io.reader import Reader
from ranger_nn.io.rows import RowFile
from ranger_nn.io.workplace import Workplace


def absent_file(made: Prepared, workplace: Workplace | None, earlier: Earlier) -> RowFile | None:
    """The file (1, *spatial) of uint8, or None where `Pixels.result` is not asked for.

    Raises:
        InputError: the result is an array, or an output has other sizes than the input.
    """
    if made.pixels.result is None:
        return None
    if workplace is None:
        raise InputError("result= of Pixels keeps where the input has no data in a file: give the result a path")
    sizes = tuple(made.source.shape[1:])
    for v in made.pictures():
        given = made.order.spatial(made.graph.values[v].shape)
        if given != sizes:
            raise InputError(
                f"result= of Pixels stands where the input has no data, and {made.graph.name} gives "
                f"{given} from {sizes}: leave it out where the sizes differ"
            )
    absent = RowFile(workplace.folder / "absent", (1, *sizes), np.uint8)
    if earlier.again and earlier.end is not None:
        _find_again(made, earlier.end.at, absent)
    return absent


def _find_again(made: Prepared, at: int, absent: RowFile) -> None:
    """From the input as far as it was read: what an earlier run noted is not trusted."""
    (v,) = made.graph.inputs
    before = made.program.instructions[:at]
    reader = Reader(made.source, None, made.reader.skip_bad)
    for box in loaded_boxes(before, made.program.external[v], made.graph.values[v].shape):
        place = made.order.spatial(box)
        found = made.pixels.applied(reader.read(place), np.dtype(np.float32))[1]
        assert found is not None
        absent.write(place, found[np.newaxis])
