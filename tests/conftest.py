"""Every test starts from the same seeds, so that a run is the same run anywhere.

RANGER_EXAMPLES=200 draws that many new random cases for the property tests of exactness, and new examples elsewhere.
"""

from __future__ import annotations

import gc
import os
import random
import sys

import numpy as np
from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, database=None)
if "RANGER_EXAMPLES" not in os.environ:
    settings.load_profile("repeatable")


def pytest_collection_finish() -> None:
    """What frameworks and tests are made of stays: the garbage collector need not look through it again and again."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup() -> None:
    """Seed whatever is loaded; a test that draws nothing pays nothing."""
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
    if "keras" in sys.modules:
        sys.modules["keras"].utils.set_random_seed(0)
