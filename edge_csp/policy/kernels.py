"""Selection over the rows [n_layer, n_head_kv] of scores, in numpy and, where numba is installed, compiled.

Both give the same cells. numba is faster, but takes time to import and load, and memory, as much as many cells of a 7B
model: it is imported when a process has selected very many rows.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt

from edge_csp.policy.base import BoolArray, FloatArray, IntArray

Array = TypeVar("Array", FloatArray, BoolArray)
SelectRows = Callable[[FloatArray, npt.NDArray[np.int64], BoolArray, int], BoolArray]

COMPILE_AFTER = 1 << 20  # rows that this process has selected: a thousand evictions from all heads of a 7B model
_n_selected = 0


def share_select(rankings: Sequence[FloatArray], shares: Sequence[int], protected: BoolArray, n_keep: int) -> BoolArray:
    """Several rankings share the cells that stay: True for these, bool [..., n_cell].

    rankings: f32 [..., n_cell] each. shares: one for each ranking. protected: bool [..., n_cell], at most n_keep per
    row.
    Every row keeps its protected cells. The places left are split in the ratio of the shares, rounded in favour of the
    first ranking, and go to the best of each in turn, among those that are not kept yet. Only scores > 0 count; a
    ranking that runs out passes its places to the others, the first of them first, then they go to the earliest cells.
    Ties go to the earlier cell.
    """
    global _n_selected
    rows = np.stack([_rows(ranking) for ranking in rankings])
    _n_selected += rows.shape[1]
    select = compiled_select() if _n_selected >= COMPILE_AFTER else None
    return (select or select_numpy)(rows, np.array(shares), _rows(protected), n_keep).reshape(protected.shape)


def csp_select(
    scores_self: FloatArray, scores_cross: FloatArray, protected: BoolArray, k_self: int, k_cross: int, n_keep: int
) -> BoolArray:
    """The CSP rule (arXiv 2412.04652), as llama_csp_select() has it; see share_select()."""
    return share_select([scores_self, scores_cross], [k_self, k_cross], protected, n_keep)


def top_select(scores: FloatArray, protected: BoolArray, n_keep: int) -> BoolArray:
    """The protected cells and the best of one ranking; see share_select()."""
    return share_select([scores], [1], protected, n_keep)


def ranked_select(first: FloatArray, second: FloatArray, protected: BoolArray, n_keep: int) -> BoolArray:
    """The protected cells, then the best of `first`, then the best of `second`; see share_select()."""
    return share_select([first, second], [1, 0], protected, n_keep)


def pool(scores: FloatArray, width: int) -> FloatArray:
    """Mean over `width` (odd) neighbouring cells, cells beyond the ends counting 0; f32 [..., n_cell] as given."""
    total = np.zeros_like(scores)
    for here, there in _shifts(width, scores.shape[-1]):
        total[..., here] += scores[..., there]
    total /= np.float32(width)
    return total


def pool_max(scores: FloatArray, width: int) -> FloatArray:
    """Maximum over `width` (odd) neighbouring cells; f32 [..., n_cell] as given."""
    highest = scores.copy()
    for here, there in _shifts(width, scores.shape[-1]):
        np.maximum(highest[..., here], scores[..., there], out=highest[..., here])
    return highest


def rank_in_spans(rankings: Sequence[FloatArray], span: IntArray, protected: BoolArray) -> FloatArray:
    """The rank of every cell within its span, from 0, if the rankings take turns; f32 [..., n_cell].

    rankings: f32 [..., n_cell], the largest first. span: i32 [..., n_cell], ascending. Protected cells come first. A
    cell counts where it stands best; a turn whose cell is taken already passes, so that the same ranking twice is no
    more than once. Ties go to the earlier cell.
    """
    n = len(rankings)
    rank = np.empty(span.shape, np.float32)
    for row in np.ndindex(span.shape[:-1]):
        ranks = _Ranks(span[row])
        turn = n * ranks.of(_descending(rankings[0][row]))
        for i, ranking in enumerate(rankings[1:], start=1):
            np.minimum(turn, n * ranks.of(_descending(ranking[row])) + i, out=turn)
        rank[row] = ranks.of(np.where(protected[row], 0, turn + 1))
    return rank


class _Ranks:
    """Ranks cells of a row within their spans, by sorting 64 bits per cell: span, what to rank by, number of the cell.
    Numbers sort many times as fast as records (np.lexsort), and all of them are different: ties go to the earlier cell.
    """

    def __init__(self, span: IntArray) -> None:
        """span: i32 [n_cell], ascending."""
        number = np.arange(span.size)
        self._span = span
        self._n_bit = int(span.size).bit_length()
        self._fits = int(span[-1]).bit_length() + 32 + self._n_bit <= 64
        self._key = (span.astype(np.uint64) << np.uint64(32 + self._n_bit)) | number.astype(np.uint64)
        begin = np.zeros_like(number)
        begin[1:] = number[1:] * (span[1:] != span[:-1])
        self._rank = number - np.maximum.accumulate(begin)

    def of(self, values: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        """Ranks i64 [n_cell] from 0, the smallest of values 0 .. 2**32 - 1 first."""
        rank = np.empty_like(self._rank)
        rank[self._order(values)] = self._rank
        return rank

    def _order(self, values: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        """Numbers of the cells, span after span, the smallest value first."""
        if not self._fits:  # thousands of spans of a cache of a hundred thousand cells
            return np.lexsort((values, self._span))
        key = values.astype(np.uint64) << np.uint64(self._n_bit)
        key |= self._key
        key.sort()
        key &= np.uint64((1 << self._n_bit) - 1)
        return key.view(np.int64)


def _descending(scores: FloatArray) -> npt.NDArray[np.uint32]:
    """Numbers that ascend where scores descend; scores that are missing (NaN) come last."""
    values = np.float32(0) - scores  # 0 and -0 are the same
    np.copyto(values, np.float32(np.nan), where=np.isnan(values))
    bits = values.view(np.uint32)
    negative = (values.view(np.int32) >> 31).view(np.uint32)
    return bits ^ (negative | np.uint32(1 << 31))


def _shifts(width: int, n_cell: int) -> Iterator[tuple[slice, slice]]:
    """Cells that have a neighbour at a distance, and these neighbours, for the distances of a window, ascending."""
    for distance in range(-(width // 2), width // 2 + 1):
        n = max(n_cell - abs(distance), 0)
        here, there = max(-distance, 0), max(distance, 0)
        yield slice(here, here + n), slice(there, there + n)


def _rows(array: Array) -> Array:
    return cast(Array, np.ascontiguousarray(array).reshape(-1, array.shape[-1]))


def select_numpy(rankings: FloatArray, shares: npt.NDArray[np.int64], protected: BoolArray, n_keep: int) -> BoolArray:
    """share_select for rankings f32 [n_ranking, n_row, n_cell] and rows bool [n_row, n_cell]."""
    kept: BoolArray = protected.copy()
    total = max(int(shares.sum()), 1)
    for row, keep in enumerate(kept):
        places = left = n_keep - int(np.count_nonzero(keep))
        quotas = [int(share) * places // total for share in shares[1:]]
        for ranking, quota in zip(rankings, [places - sum(quotas), *quotas], strict=True):
            left -= _take(ranking[row], keep, quota)
        for ranking in rankings:
            left -= _take(ranking[row], keep, left)
        if left:
            keep[np.flatnonzero(~keep)[:left]] = True
    return kept


def _take(score: FloatArray, keep: BoolArray, n: int) -> int:
    """Keep the n best cells that have a score and are not kept yet; returns how many there were."""
    if n == 0:
        return 0
    cells = np.flatnonzero((score > 0) & ~keep)
    if len(cells) <= n:
        keep[cells] = True
        return len(cells)
    scores = score[cells]
    lowest = np.partition(scores, -n)[-n]  # a full sort takes 20 times as long
    above = cells[scores > lowest]
    ties = cells[scores == lowest]
    keep[above] = True
    keep[ties[: n - len(above)]] = True
    return n


@cache
def compiled_select() -> SelectRows | None:
    """select_numpy compiled by numba, or None where numba is missing."""
    try:
        return cast(SelectRows, importlib.import_module("edge_csp.policy.kernels_numba").select)
    except ImportError:
        return None
