"""Quotas, against a naive loop, and what they promise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_csp.errors import PolicyError
from edge_csp.policy import CuedQuotaPolicy, Observation, QuotaPolicy, Span, kernels
from edge_csp.policy.quota import threshold

GRID = Span(64, is_picture=True, columns=8)


def conversation(*spans: Span, seed: int = 0, **measured: np.ndarray) -> Observation:
    """All cells of a conversation, in two layers of two heads."""
    generator = np.random.default_rng(seed)
    n_cell = sum(span.n_cell for span in spans)
    shape = 2, 2, n_cell
    number = np.broadcast_to(np.arange(n_cell, dtype=np.int32), shape)
    begins = np.cumsum([0, *(span.n_cell for span in spans)])
    span = (np.searchsorted(begins, number, side="right") - 1).astype(np.int32)
    tag = np.array([one.is_picture for one in spans], np.uint8)[span]
    arrays = {"key_norm": generator.random(shape, np.float32), "cue": generator.random(shape, np.float32)}
    arrays["scores"] = generator.random((2, 2, 2, n_cell), np.float32)
    offset = (number - begins[span]).astype(np.int32)
    return Observation(tag, number, span=span, offset=offset, spans=spans, **arrays | measured)


def kept_of(observation: Observation, cells: np.ndarray) -> np.ndarray:
    """Cells that stay of every span, [n_layer, n_head_kv, n_span]."""
    span = np.take_along_axis(observation.span, cells.astype(np.intp), axis=-1)
    return np.stack([(span == i).sum(axis=-1) for i in range(len(observation.spans))], axis=-1)


def protected_of(observation: Observation, *cells: int) -> np.ndarray:
    protected = np.zeros(observation.shape, np.bool_)
    protected[..., [*cells, -1]] = True
    return protected


def naive_ranks(rankings: list[np.ndarray], span: np.ndarray, protected: np.ndarray) -> np.ndarray:
    """One row: in every span the protected cells, then the rankings by turns."""
    ranks = np.zeros(len(span), np.float32)
    for one in np.unique(span):
        cells = np.flatnonzero(span == one)
        order = [int(cell) for cell in cells if protected[cell]]
        lists = [sorted(cells, key=lambda cell: (-ranking[cell], cell)) for ranking in rankings]
        for place in range(len(cells)):
            order += [int(one[place]) for one in lists]
        for rank, cell in enumerate(dict.fromkeys(order)):
            ranks[cell] = rank
    return ranks


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 2**32), st.integers(1, 60), st.integers(1, 3))
def test_ranks_equal_a_naive_loop(seed: int, n_cell: int, n_ranking: int) -> None:
    generator = np.random.default_rng(seed)
    span = np.sort(generator.integers(0, 6, (2, n_cell)).astype(np.int32), axis=-1)
    rankings = [generator.integers(-3, 4, (2, n_cell)).astype(np.float32) for _ in range(n_ranking)]
    protected = generator.random((2, n_cell)) < 0.2
    found = kernels.rank_in_spans(rankings, span, protected)
    for row in range(2):
        expected = naive_ranks([ranking[row] for ranking in rankings], span[row], protected[row])
        assert np.array_equal(found[row], expected)


def test_pictures_keep_equal_shares_and_text_more() -> None:
    observation = conversation(Span(16), GRID, Span(16), GRID, Span(16))
    policy = QuotaPolicy(text_weight=4, question_share=0)
    kept = kept_of(observation, policy.select(observation, 60, protected_of(observation)))
    assert (np.abs(kept[..., [1, 3]] - 60 * 64 / (2 * 64 + 3 * 16 * 4)) <= 1).all()
    assert (np.abs(kept[..., [0, 2, 4]] - 60 * 64 / (2 * 64 + 3 * 16 * 4)) <= 1).all()
    equal = QuotaPolicy(text_weight=1, question_share=0)
    kept = kept_of(observation, equal.select(observation, 44, protected_of(observation)))
    assert (np.abs(kept - [4, 16, 4, 16, 4]) <= 1).all()


def test_what_a_short_text_cannot_use_goes_to_the_others() -> None:
    observation = conversation(Span(2), GRID, Span(2), GRID)
    kept = kept_of(observation, QuotaPolicy(text_weight=100).select(observation, 44, protected_of(observation)))
    assert (kept == [2, 20, 2, 20]).all()


def test_protected_cells_count() -> None:
    """A picture with many protected cells gets no others."""
    observation = conversation(GRID, GRID)
    protected = protected_of(observation, *range(20))
    kept = kept_of(observation, QuotaPolicy().select(observation, 40, protected))
    assert (kept == [20, 20]).all()


def test_patches_are_spread_evenly() -> None:
    """Every quarter of the grid keeps the same number, whatever the keys and the scores are."""
    observation = conversation(GRID, GRID)
    cells = QuotaPolicy().select(observation, 32, protected_of(observation, 64 + 63 - 1))
    first = cells[cells < 64].reshape(4, -1)
    for row in first:
        y, x = np.divmod(row, 8)
        assert np.bincount(2 * (y // 4) + x // 4, minlength=4).tolist() == [4, 4, 4, 4]


@pytest.mark.parametrize(("n_cell", "columns"), [(64, 8), (576, 24), (35, 7), (1, 1), (13, 0), (16, 0)])
def test_spread_is_nested_and_has_no_ties(n_cell: int, columns: int) -> None:
    table = threshold(n_cell, columns)
    assert table.min() == 0
    assert len(set(table.tolist())) == n_cell
    order = np.argsort(table)
    half = order[: n_cell // 2]
    if columns and n_cell >= 35:  # about as many on the left as on the right, above as below
        y, x = np.divmod(half, columns)
        assert abs(int((x < columns / 2).sum()) - len(half) / 2) <= 3 + n_cell / columns / 4
        assert abs(int((y < n_cell / columns / 2).sum()) - len(half) / 2) <= 3 + columns / 4


@pytest.mark.parametrize(("evenness", "sharpness", "factor"), [(1e-6, 1, 3), (1e-6, 2, 9), (0.5, 1, 5 / 3), (1, 1, 1)])
def test_patches_stay_as_densely_as_their_contrast_is_high(evenness: float, sharpness: float, factor: float) -> None:
    """The left half of the picture has three times the contrast of the right half."""
    x = np.arange(1024) % 32
    contrast = np.where(x < 16, 1.5, 0.5).astype(np.float32)
    observation = conversation(Span(1024, is_picture=True, columns=32, contrast=contrast))
    policy = QuotaPolicy(question_share=0, evenness=evenness, sharpness=sharpness)
    for row in policy.select(observation, 128, protected_of(observation)).reshape(4, -1):
        left = int((x[row] < 16).sum())
        assert abs(left / (len(row) - left) / factor - 1) < 0.1
        quarter = 2 * (row // 512) + x[row] // 16
        above, below = np.bincount(quarter, minlength=4).reshape(2, 2)
        assert np.abs(above - below).max() <= 2  # and evenly over each half


def test_where_all_patches_are_alike_nothing_is_divided_by_nothing() -> None:
    blank = Span(64, is_picture=True, columns=8, contrast=np.zeros(64, np.float32))
    with np.errstate(all="raise"):
        found, even = (
            QuotaPolicy(question_share=0).select(observation, 16, protected_of(observation))
            for observation in (conversation(blank), conversation(GRID))
        )
    assert np.array_equal(found, even)


def test_a_contrast_of_other_cells() -> None:
    with pytest.raises(PolicyError, match=r"the shape \(3,\), the span has 4 cells"):
        Span(4, contrast=np.ones(3, np.float32))


def test_text_keeps_long_keys_with_their_neighbours() -> None:
    norms = np.full((2, 2, 40), 1, np.float32)
    norms[..., 20] = 9
    observation = conversation(Span(40), key_norm=norms)
    nothing = QuotaPolicy(question_share=0)
    assert (nothing.select(observation, 4, protected_of(observation)) == [19, 20, 21, 39]).all()
    turned = QuotaPolicy(question_share=0, sign=-1).select(observation, 30, protected_of(observation))
    assert not (turned == 20).any()


def test_layers_that_attend_to_short_keys_keep_them() -> None:
    """The first layer looks at short keys, the second at long ones, the third at any."""
    norms = np.random.default_rng(0).permuted(np.tile(np.linspace(1, 2, 80, dtype=np.float32), (3, 2, 1)), axis=-1)
    scores = np.zeros((3, 2, 2, 80), np.float32)
    scores[0, :, 0], scores[1, :, 0] = 3 - norms[0], norms[1]
    scores[2, :, 0] = np.random.default_rng(1).random((2, 80), np.float32)
    number = np.broadcast_to(np.arange(80, dtype=np.int32), norms.shape)
    observation = Observation(np.zeros(norms.shape, np.uint8), number, key_norm=norms, scores=scores)
    protected = protected_of(observation)
    found, short, long = (
        QuotaPolicy(question_share=0, sign=sign).select(observation, 20, protected) for sign in (0, -1, 1)
    )
    assert np.array_equal(found[0], short[0])
    assert np.array_equal(found[1:], long[1:])
    assert not np.array_equal(short, long)


def test_the_question_has_a_share_unless_a_picture_comes_last() -> None:
    scores = np.zeros((2, 2, 2, 92), np.float32)
    scores[:, :, 0, 5] = 1  # the question looks at the least spread and shortest cells
    scores[:, :, 0, 60] = 1
    arrays = {"scores": scores, "key_norm": np.linspace(1, 2, 4 * 92, dtype=np.float32).reshape(2, 2, 92)}
    observation = conversation(Span(14), GRID, Span(14), **arrays)
    policy = QuotaPolicy(question_share=0.2)
    cells = policy.select(observation, 12, protected_of(observation))
    assert ((cells == 5).sum(axis=-1) == 1).all()
    assert ((cells == 60).sum(axis=-1) == 1).all()
    ends = conversation(Span(28), GRID, **arrays)
    assert np.array_equal(
        policy.select(ends, 12, protected_of(ends)),
        QuotaPolicy(question_share=0).select(ends, 12, protected_of(ends)),
    )


def test_cues_share_text_with_key_norms() -> None:
    cue = np.zeros((2, 2, 40), np.float32)
    cue[..., 3] = 1
    norms = np.linspace(1, 2, 160, dtype=np.float32).reshape(2, 2, 40)
    observation = conversation(Span(40), cue=cue, key_norm=norms)
    without = QuotaPolicy(question_share=0).select(observation, 4, protected_of(observation))
    with_cue = CuedQuotaPolicy(question_share=0).select(observation, 4, protected_of(observation))
    assert not (without == 3).any()
    assert ((with_cue == 3).sum(axis=-1) == 1).all()


@pytest.mark.parametrize(
    "setting", [{"text_weight": 0}, {"question_share": 1.5}, {"sign": 2}, {"evenness": 0}, {"sharpness": 0}]
)
def test_settings_out_of_range(setting: dict[str, float]) -> None:
    with pytest.raises(PolicyError, match=rf"{next(iter(setting))} is {next(iter(setting.values()))}"):
        QuotaPolicy(**setting)  # type: ignore[arg-type]
