"""The C library's memory allocator, told to keep the blocks that a loop over regions frees and takes again.

glibc gives blocks above a threshold (at most 32 MB, see mallopt(3)) back to the system as soon as they are free, and the
next one of the same size is fresh pages, each of which has to be mapped and cleared: a fifth to a third of the time of a run
over regions. Enter at `keep_freed_blocks`.
"""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MOST = 2**31 - 1


def keep_freed_blocks() -> bool:
    """Keep freed blocks with this process, for all of its code and until it ends: what it held at most stays resident.

    For processes that are Ranger's own, as those of `ranger-nn run` are; a library does not decide this for its host.

    Returns:
        Whether there is such an allocator: False where the C library is not glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    # both: either alone switches the adaptive threshold off and leaves the other small
    return bool(mallopt(M_MMAP_THRESHOLD, MOST)) and bool(mallopt(M_TRIM_THRESHOLD, MOST))
