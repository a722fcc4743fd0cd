"""The allocator keeps what is freed: in a process of its own, since it stays so."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
import torch
from ranger_nn.execute.allocator import keep_freed_blocks

torch.set_num_threads(1)
if sys.argv[1] == "keep":
    assert keep_freed_blocks()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

torch.ones(24_000_000)  # 96 MB: above the largest adaptive threshold
before = faults()
for _ in range(20):
    torch.ones(24_000_000)
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="an allocator of another C library")
def test_freed_blocks_are_taken_again_without_new_pages() -> None:
    """Pages that are mapped for the same block again and again: fewer where freed blocks are kept."""

    def pages(how: str) -> int:
        found = subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True)
        return int(found.stdout)

    assert 2 * pages("keep") < pages("leave")
