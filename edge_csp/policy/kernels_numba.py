"""The compiled twin of kernels.select_numpy. Import it through kernels.compiled_select()."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np

from edge_csp.policy.base import BoolArray, FloatArray, IntArray

Function = TypeVar("Function", bound=Callable[..., Any])


def _compile(function: Function) -> Function:
    try:
        return cast(Function, numba.njit(cache=True)(function))
    except RuntimeError:  # neither the package nor the user's cache folder can be written
        return cast(Function, numba.njit(function))


@_compile
def _take(score: FloatArray, keep: BoolArray, n: int, keys: IntArray) -> int:
    """Keep the n best cells that have a score and are not kept yet; returns how many there were.

    keys: i32 [n_cell], scratch. The bits of floats > 0 are integers in the same order.
    """
    if n == 0:
        return 0
    bits = score.view(np.int32)
    n_candidate = 0
    for cell in range(score.size):
        is_candidate = score[cell] > 0 and not keep[cell]
        keys[cell] = bits[cell] if is_candidate else 0
        n_candidate += is_candidate
    n = min(n, n_candidate)
    if n == 0:
        return 0
    threshold = np.int32(0)  # the largest key that n keys reach, bit by bit
    for bit in range(30, -1, -1):
        guess = np.int32(threshold | (1 << bit))
        n_reach = 0
        for cell in range(keys.size):
            n_reach += keys[cell] >= guess
        if n_reach >= n:
            threshold = guess
        if n_reach == n:
            break
    n_tie = n
    for cell in range(keys.size):
        n_tie -= keys[cell] > threshold
    for cell in range(keys.size):
        if keys[cell] > threshold:
            keep[cell] = True
        elif keys[cell] == threshold and n_tie > 0:
            keep[cell] = True
            n_tie -= 1
    return n


@_compile
def select(
    scores_self: FloatArray, scores_cross: FloatArray, protected: BoolArray, k_self: int, k_cross: int, n_keep: int
) -> BoolArray:
    """csp_select for rows [n_row, n_cell]."""
    kept: BoolArray = protected.copy()
    keys = np.empty(protected.shape[1], np.int32)
    for row in range(protected.shape[0]):
        own, cross, keep = scores_self[row], scores_cross[row], kept[row]
        places = n_keep - keep.sum()
        n_cross = k_cross * places // max(k_self + k_cross, 1)
        n_self = places - n_cross
        n_self -= _take(own, keep, n_self, keys)
        n_cross -= _take(cross, keep, n_cross, keys)
        n_self -= _take(cross, keep, n_self, keys)
        n_cross -= _take(own, keep, n_cross, keys)
        left = n_self + n_cross
        for cell in range(keep.size):
            if left == 0:
                break
            if not keep[cell]:
                keep[cell] = True
                left -= 1
    return kept
