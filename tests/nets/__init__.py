"""Small hand-written networks, one per feature that a regional run has to get right.

Sizes are odd and regions divide nothing, so that every border, halo and remainder is met. `NETS` is
the catalogue.
"""

from __future__ import annotations

from tests.nets.make import between
from tests.nets.movement import MOVEMENT
from tests.nets.norms import NORMS
from tests.nets.operators import ACTIVATIONS, CONVOLUTIONS, POOLS, RESIZES
from tests.nets.recurrent import RECURRENT, Tagger
from tests.nets.reductions import REDUCTIONS
from tests.nets.series import LINES_AND_VOLUMES, TCN, WaveNet
from tests.nets.structure import STRUCTURE, SmallUNet
from tests.support import Entry

__all__ = ["NETS", "RECURRENT", "TCN", "SmallUNet", "Tagger", "WaveNet", "between"]

NETS: tuple[Entry, ...] = (
    *NORMS,
    *ACTIVATIONS,
    *CONVOLUTIONS,
    *POOLS,
    *RESIZES,
    *REDUCTIONS,
    *MOVEMENT,
    *STRUCTURE,
    *LINES_AND_VOLUMES,
    *RECURRENT,
)
