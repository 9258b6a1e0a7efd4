"""Selection over the rows [n_layer, n_head_kv] of scores, in numpy and, where numba is installed, compiled.

Both give the same cells. numba is imported at the first large selection only: importing and loading it takes longer
than numpy needs for a small one.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import TypeVar, cast

import numpy as np

from edge_csp.policy.base import BoolArray, FloatArray

Array = TypeVar("Array", FloatArray, BoolArray)
SelectRows = Callable[[FloatArray, FloatArray, BoolArray, int, int, int], BoolArray]

COMPILE_FROM = 1 << 21  # cells of all rows together; below, numpy is done before numba is imported


def csp_select(
    scores_self: FloatArray, scores_cross: FloatArray, protected: BoolArray, k_self: int, k_cross: int, n_keep: int
) -> BoolArray:
    """The CSP rule (arXiv 2412.04652), as llama_csp_select() has it: True for the cells that stay.

    scores_self, scores_cross: f32 [..., n_cell]; protected: bool [..., n_cell], at most n_keep per row.
    Every row keeps its protected cells. The places left are split in the ratio k_self : k_cross, rounded in favour of
    k_self, and go to the best of scores_self, then to the best of scores_cross among the rest. Only scores > 0 count;
    a ranking that runs out passes its places to the other one, then they go to the earliest cells. Ties go to the
    earlier cell.
    """
    own, cross = _rows(scores_self), _rows(scores_cross)
    select = compiled_select() if protected.size >= COMPILE_FROM else None
    return (select or select_numpy)(own, cross, _rows(protected), k_self, k_cross, n_keep).reshape(protected.shape)


def top_select(scores: FloatArray, protected: BoolArray, n_keep: int) -> BoolArray:
    """The protected cells and the best of one ranking; same rules and shapes as csp_select."""
    return csp_select(scores, scores, protected, 1, 0, n_keep)


def pool(scores: FloatArray, width: int) -> FloatArray:
    """Mean over `width` (odd) neighbouring cells, cells beyond the ends counting 0; f32 [..., n_cell] as given."""
    half, n_cell = width // 2, scores.shape[-1]
    padded = np.pad(scores, [(0, 0)] * (scores.ndim - 1) + [(half, half)])
    total: FloatArray = padded[..., :n_cell].copy()
    for shift in range(1, width):
        total += padded[..., shift : shift + n_cell]
    total /= np.float32(width)
    return total


def _rows(array: Array) -> Array:
    return cast(Array, np.ascontiguousarray(array).reshape(-1, array.shape[-1]))


def select_numpy(
    scores_self: FloatArray, scores_cross: FloatArray, protected: BoolArray, k_self: int, k_cross: int, n_keep: int
) -> BoolArray:
    """csp_select for rows [n_row, n_cell]."""
    kept: BoolArray = protected.copy()
    for own, cross, keep in zip(scores_self, scores_cross, kept, strict=True):
        places = n_keep - int(keep.sum())
        n_cross = k_cross * places // max(k_self + k_cross, 1)
        n_self = places - n_cross
        n_self -= _take(own, keep, n_self)
        n_cross -= _take(cross, keep, n_cross)
        n_self -= _take(cross, keep, n_self)
        n_cross -= _take(own, keep, n_cross)
        keep[np.flatnonzero(~keep)[: n_self + n_cross]] = True
    return kept


def _take(score: FloatArray, keep: BoolArray, n: int) -> int:
    """Keep the n best cells that have a score and are not kept yet; returns how many there were."""
    if n == 0:
        return 0
    cells = np.flatnonzero(~keep & (score > 0))
    best = cells[np.argsort(-score[cells], kind="stable")[:n]]
    keep[best] = True
    return len(best)


@cache
def compiled_select() -> SelectRows | None:
    """select_numpy compiled by numba, or None where numba is missing."""
    try:
        return cast(SelectRows, importlib.import_module("edge_csp.policy.kernels_numba").select)
    except ImportError:
        return None
