"""What the binding does besides calling the library."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import numpy as np
import pytest

from edge_csp import native


@pytest.mark.skipif(
    os.name != "posix" or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc"
)
def test_holes_in_the_heap_are_given_back() -> None:
    blocks = [np.ones(64 << 10, np.uint8) for _ in range(1000)]
    kept = blocks[::2]
    del blocks
    before = resident()
    native.trim_heap()
    assert before - resident() > 20 << 20
    assert all(block.all() for block in kept)


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
