"""The compiled twin of kernels.select_numpy. Import it through kernels.compiled_select()."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt

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
def select(rankings: FloatArray, shares: npt.NDArray[np.int64], protected: BoolArray, n_keep: int) -> BoolArray:
    """share_select for rankings f32 [n_ranking, n_row, n_cell] and rows bool [n_row, n_cell]."""
    kept: BoolArray = protected.copy()
    keys = np.empty(protected.shape[1], np.int32)
    total = max(shares.sum(), 1)
    for row in range(protected.shape[0]):
        keep = kept[row]
        places = n_keep - keep.sum()
        left = places
        quotas = shares * places // total
        quotas[0] = places - quotas[1:].sum()
        for i in range(quotas.size):
            left -= _take(rankings[i, row], keep, quotas[i], keys)
        for i in range(quotas.size):
            left -= _take(rankings[i, row], keep, left, keys)
        for cell in range(keep.size):
            if left == 0:
                break
            if not keep[cell]:
                keep[cell] = True
                left -= 1
    return kept
