"""Fill a cache with random cells, without evaluating tokens: the state of a sequence, made up. Needs numpy only."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

BLOCK = 4 << 20
"""Bytes of random rows, which repeat."""
_WIDE_TYPES = (0, 30)  # ggml types with 8 bits of exponent: f32, bf16


def random_state(one_cell: Bytes, n_cell: int) -> Bytes:
    """As llama_state_seq_get_data() gives it, for n_cell cells with random rows at positions 0 .. n_cell - 1.

    one_cell: what that function gives for a sequence of one token; it tells the layers, their types and row sizes.

    Raises ValueError if this is not the state of a plain KV cache.
    """
    layout = _read_layout(one_cell.tobytes())
    cells = np.zeros((n_cell, 3 + layout.n_ext), np.int32)  # position, number of sequences, x, y, token, sequence
    cells[:, 0], cells[:, 1] = np.arange(n_cell), 1
    cells[:, 2 : 2 + min(layout.n_ext, 2)] = cells[:, :1]
    count = np.array([1, n_cell], np.uint32)
    meta = b"".join([one_cell[:8].tobytes(), count.tobytes(), cells.tobytes(), layout.head])
    state = _repeated(_random_rows(layout.wide), len(meta) + sum(len(head) + n_cell * row for head, row in layout.rows))
    state[: len(meta)] = np.frombuffer(meta, np.uint8)
    end = len(meta)
    for head, row in layout.rows:
        state[end : end + len(head)] = np.frombuffer(head, np.uint8)
        end += len(head) + n_cell * row
    return state


@dataclass(frozen=True)
class _Layout:
    """n_ext: further numbers per cell (M-RoPE: x, y, token). head: v_trans, n_layer. wide: f32 or bf16.
    rows: head and bytes per cell of the rows of K of every layer, then of V.
    """

    n_ext: int
    head: bytes
    rows: list[tuple[bytes, int]]
    wide: bool


def _read_layout(state: bytes) -> _Layout:
    """Raises ValueError if `state` is anything but one cell of a plain KV cache."""
    for n_ext in (0, 3):
        try:
            return _read_rows(state, n_ext)
        except ValueError as error:
            reason = error
    raise reason


def _read_rows(state: bytes, n_ext: int) -> _Layout:
    begin = 8 + 8 + 4 * (3 + n_ext)  # magic and sequence; streams and cells; the cell
    n_stream, n_cell = np.frombuffer(state, np.uint32, 2, 8)
    v_trans, n_layer = (int(x) for x in np.frombuffer(state, np.uint32, 2, begin))
    if (n_stream, n_cell) != (1, 1) or v_trans > 1 or not 1 <= n_layer <= 512:
        raise ValueError("the cache is no plain KV cache, or this llama.cpp stores it in another way")
    end, rows, types = begin + 8, [], set()
    for is_column in [False] * n_layer + [v_trans == 1] * n_layer:
        types.add(int(np.frombuffer(state, np.int32, 1, end)[0]))
        if is_column:  # type, bytes per value, values
            row = int(np.frombuffer(state, np.uint32, 2, end + 4).prod())
        else:  # type, bytes per row
            row = int(np.frombuffer(state, np.uint64, 1, end + 4)[0])
        rows.append((state[end : end + 12], row))
        end += 12 + row
    if end != len(state):
        raise ValueError(f"the state of a cell has {len(state)} bytes, its rows end at {end}")
    return _Layout(n_ext, state[begin : begin + 8], rows, any(kind in _WIDE_TYPES for kind in types))


def _random_rows(wide: bool) -> Bytes:
    """Good numbers of every type at any even offset: each second byte is a sign and a small exponent.

    f16 (and the scales of quantised blocks): 0.06 to 0.25; wide: f32 and bf16 of 0.03 to 0.5.
    """
    generator = np.random.default_rng(1)
    block = generator.integers(0, 256, BLOCK, np.uint8)
    sign = block[1::2] & 0x80
    block[1::2] = generator.integers(*((0x3D, 0x3F) if wide else (0x2C, 0x34)), BLOCK // 2, np.uint8) | sign
    return block


def _repeated(block: Bytes, size: int) -> Bytes:
    """`size` writable bytes that repeat `block`. On Linux they take next to no memory: the same pages are mapped again
    and again, so that filling a cache does not need its size twice.
    """
    if not sys.platform.startswith("linux"):
        return np.resize(block, size)
    n_map = -(-size // block.size)
    state: Bytes = np.frombuffer(mmap.mmap(-1, n_map * block.size), np.uint8)
    libc: Any = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    file = os.memfd_create("rows")
    try:
        os.write(file, block.tobytes())
        for address in range(state.ctypes.data, state.ctypes.data + n_map * block.size, block.size):
            access, kind = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | 0x10  # MAP_FIXED
            if libc.mmap(address, block.size, access, kind, file, 0) != address:
                raise OSError(ctypes.get_errno(), "mmap failed")
    finally:
        os.close(file)
    return state[:size]
