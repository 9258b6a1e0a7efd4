"""The input-side baseline: the embeddings of every picture are averaged over its grid, and so are fewer tokens."""

from __future__ import annotations

import ctypes
import math
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_csp import native
from edge_csp.bench.quality import cache
from edge_csp.bench.quality.cache import Kept, State
from edge_csp.bench.quality.reading import Reading, content_parts
from edge_csp.context import Context
from edge_csp.errors import BenchError, NativeError
from edge_csp.model import Part, PicturePart, TokenPart, VisionModel

Embeddings = NDArray[np.float32]


class Shrunk:
    """An album with fewer picture tokens, read once for each number of them."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        parts = _parts(reading)
        self._n_part = max(1, sum(isinstance(part, PicturePart) for part in parts))
        self._n_text = sum(len(part.tokens) for part in parts if isinstance(part, TokenPart))
        self._states: dict[int, tuple[State, float]] = {}

    def read(self, n_cell: int) -> tuple[Kept, float]:
        """Have it in the cache in at most n_cell cells, or with one token for every part of a picture. Returns the
        cells and the seconds of reading it.

        Raises BenchError if the model's pictures are no square grids at positions one after the other.
        """
        context = self._reading.context
        n_each = max(1, (n_cell - self._n_text) // self._n_part)
        if n_each not in self._states:
            began = time.perf_counter()
            self._evaluate(n_each)
            self._states[n_each] = cache.save(context), time.perf_counter() - began
        state, seconds = self._states[n_each]
        cache.restore(context, state)
        return cache.kept(context.cells()[1]), seconds

    def _evaluate(self, n_each: int) -> None:
        context = self._reading.context
        context.clear()
        for part in _parts(self._reading):
            if isinstance(part, TokenPart):
                cache.decode(context, part.tokens)
            else:
                check(context.model, part)
                _decode(context, average(context.model.encode(part), n_each))


def _parts(reading: Reading) -> list[Part]:
    model, text = reading.context.model, reading.text
    pictures = [
        part["picture"] for message in reading.messages for part in content_parts(message) if part["type"] == "image"
    ]
    bos = model.info.bos_token
    return model.tokenize(text, pictures, add_special=not (bos and text.startswith(bos)))


def check(model: VisionModel, part: PicturePart) -> None:
    from llama_cpp import mtmd_cpp

    if part.n_pos != part.n_cell or mtmd_cpp.mtmd_decode_use_non_causal(model.mtmd_handle, part.chunk):
        raise BenchError(f"{model.info.path}: its picture tokens are not read one after the other: no downsample")
    if math.isqrt(part.n_cell) ** 2 != part.n_cell:
        raise BenchError(f"{model.info.path}: {part.n_cell} tokens of a picture are no square grid: no downsample")


def grid(side: int, most: int) -> tuple[int, int]:
    """Rows and columns of a coarser grid of a square, as many cells as possible but not more than `most`; of several
    the one that is most like a square, then the one with more columns.
    """
    sizes = ((rows, min(side, most // rows)) for rows in range(1, min(side, most) + 1))
    return max(sizes, key=lambda size: (size[0] * size[1], -abs(size[0] - size[1]), size[1]))


def average(embeddings: Embeddings, most: int) -> Embeddings:
    """f32 [side * side, n_embd] -> [rows * columns, n_embd]: means over areas that cover the grid, see grid()."""
    side = math.isqrt(len(embeddings))
    rows, columns = grid(side, most)
    square = embeddings.reshape(side, side, -1)
    areas = [
        square[_part(side, rows, row), _part(side, columns, column)].mean(axis=(0, 1))
        for row in range(rows)
        for column in range(columns)
    ]
    return np.stack(areas).astype(np.float32)


def _part(n: int, n_part: int, i: int) -> slice:
    """The i-th of n_part parts of n; where they do not fit, neighbours share."""
    return slice(i * n // n_part, -(-(i + 1) * n // n_part))


def _decode(context: Context, embeddings: Embeddings) -> None:
    """Evaluate embeddings at the next positions."""
    import llama_cpp

    for begin in range(0, len(embeddings), context.n_batch):
        rows = np.ascontiguousarray(embeddings[begin : begin + context.n_batch])
        n = len(rows)
        seq_id = ctypes.pointer(ctypes.c_int32(context.seq_id))
        batch: Any = llama_cpp.llama_batch()
        batch.n_tokens = n
        batch.embd = rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        batch.pos = (ctypes.c_int32 * n)(*range(context.n_past, context.n_past + n))
        batch.n_seq_id = (ctypes.c_int32 * n)(*[1] * n)
        batch.seq_id = (ctypes.POINTER(ctypes.c_int32) * n)(*[seq_id] * n)
        batch.logits = (ctypes.c_int8 * n)(*[0] * n)
        native.clear_log_errors()
        if status := llama_cpp.llama_decode(context.handle, batch):
            raise NativeError(f"llama.cpp failed to evaluate: {native.last_log_error()}", status=status)
        context.n_past += n
