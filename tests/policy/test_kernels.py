"""Shares of rankings, and ranks within spans, against a plain reading of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_csp.policy import kernels
from edge_csp.policy.base import BoolArray, FloatArray, IntArray

ODD = np.array([0, -0.0, 1e-45, 1, 2, np.inf, -np.inf, np.nan, -np.nan, -1, 3e38], np.float32)


def plain_ranks(rankings: list[list[float]], protected: set[int]) -> list[int]:
    """Of the cells of one span, word for word."""
    cells = range(len(rankings[0]))
    order = [cell for cell in cells if cell in protected]
    turns = [sorted(cells, key=lambda cell: (scores[cell] != scores[cell], -scores[cell])) for scores in rankings]
    for place in cells:
        order += [turn[place] for turn in turns]
    return [list(dict.fromkeys(order)).index(cell) for cell in cells]


def plain_shares(rankings: list[list[float]], shares: list[int], protected: set[int], n_keep: int) -> set[int]:
    """One row, word for word."""
    kept = set(protected)
    cells = range(len(rankings[0]))

    def take(ranking: list[float], n: int) -> None:
        scored = (cell for cell in cells if cell not in kept and ranking[cell] > 0)
        kept.update(sorted(scored, key=lambda cell: -ranking[cell])[:n])

    places = n_keep - len(kept)
    quotas = [share * places // sum(shares) if sum(shares) else 0 for share in shares]
    quotas[0] = places - sum(quotas[1:])
    for ranking, quota in zip(rankings, quotas, strict=True):
        take(ranking, quota)
    for ranking in rankings:
        take(ranking, n_keep - len(kept))
    kept.update([cell for cell in cells if cell not in kept][: n_keep - len(kept)])
    return kept


@settings(deadline=None)
@given(
    n_ranking=st.integers(1, 4),
    n_cell=st.integers(1, 50),
    density=st.sampled_from([0, 0.1, 0.5, 1]),
    levels=st.sampled_from([1, 3, 50]),
    seed=st.integers(0, 2**32),
)
def test_rankings_share_the_cells(n_ranking: int, n_cell: int, density: float, levels: int, seed: int) -> None:
    """In numpy and compiled."""
    generator = np.random.default_rng(seed)
    shape = (n_ranking, 3, n_cell)
    scores = generator.integers(1, levels + 1, shape) * (generator.random(shape) < density)
    rankings, shares = scores.astype(np.float32), generator.integers(0, 5, n_ranking)
    protected = generator.random((3, n_cell)) < generator.choice([0, 0.2])
    n_keep = int(generator.integers(int(protected.sum(axis=-1).max()), n_cell + 1))
    keep = kernels.share_select([*rankings], shares.tolist(), protected, n_keep)
    for row in range(3):
        of_row = [ranking[row].tolist() for ranking in rankings]
        expected = plain_shares(of_row, shares.tolist(), {*np.flatnonzero(protected[row])}, n_keep)
        assert {*np.flatnonzero(keep[row])} == expected
    if (select := kernels.compiled_select()) is not None:
        assert np.array_equal(select(rankings, shares, protected, n_keep), keep)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[FloatArray], IntArray, BoolArray]:
    """Few different scores, so that there are ties; spans that not every row has."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = draw(st.integers(1, 3)), draw(st.integers(1, 60))
    levels = draw(st.sampled_from([1, 3, 1000]))
    rankings = [
        generator.choice(ODD, shape)
        if draw(st.booleans())
        else generator.integers(-levels, levels, shape).astype(np.float32)
        for _ in range(draw(st.integers(1, 3)))
    ]
    n_span = draw(st.sampled_from([1, 4, 30]))
    span = np.sort(generator.integers(0, n_span, shape), axis=-1).astype(np.int32)
    return rankings, span, generator.random(shape) < draw(st.sampled_from([0, 0.2]))


@settings(deadline=None)
@given(case=cases(), scale=st.sampled_from([1, 1 << 25]))
def test_ranks_in_spans(case: tuple[list[FloatArray], IntArray, BoolArray], scale: int) -> None:
    """Numbers of spans that leave no bits for the others are ranked in another way."""
    rankings, span, protected = case
    rank = kernels.rank_in_spans(rankings, span * np.int32(scale), protected)
    assert rank.dtype == np.float32
    for row, spans in enumerate(span):
        for number in set(spans.tolist()):
            cells = np.flatnonzero(spans == number)
            expected = plain_ranks(
                [ranking[row, cells].tolist() for ranking in rankings], {*np.flatnonzero(protected[row, cells])}
            )
            assert rank[row, cells].tolist() == expected


@pytest.mark.parametrize("scale", [1, 1 << 20])
def test_ranks_of_many_cells(scale: int) -> None:
    """As of a long conversation: every rank of a span is there once, and the best cell first."""
    generator = np.random.default_rng(0)
    scores = generator.random((2, 40_000), np.float32)
    span = np.broadcast_to(np.repeat(np.arange(40, dtype=np.int32), 1000), scores.shape) * np.int32(scale)
    rank = kernels.rank_in_spans([scores], span, np.zeros(scores.shape, np.bool_)).reshape(-1, 1000)
    assert np.array_equal(np.sort(rank, axis=-1), np.broadcast_to(np.arange(1000), rank.shape))
    assert np.array_equal(rank.argmin(axis=-1), scores.reshape(-1, 1000).argmax(axis=-1))
