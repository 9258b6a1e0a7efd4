"""The CSP rule against a plain reading of it, against the released code's picks, and compiled against numpy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_csp.policy import CspPolicy, Observation, kernels
from edge_csp.policy.base import BoolArray, FloatArray
from edge_csp.policy.csp import n_recent

from ..oracle.numpy_llama import window_scores

ROOT = Path(__file__).parents[2]
RECORDS = sorted((ROOT / "tests/data/oracle").glob("*.npz")) + sorted((ROOT.parent / "shared/oracle").glob("*.npz"))


def plain_csp(
    own: list[float], cross: list[float], protected: set[int], k_self: int, k_cross: int, n_keep: int
) -> set[int]:
    """One row, word for word."""
    kept = set(protected)

    def best(score: list[float], n: int) -> int:
        ranking = sorted((c for c in range(len(score)) if c not in kept and score[c] > 0), key=lambda c: -score[c])
        kept.update(ranking[:n])
        return n - len(ranking[:n])

    places = n_keep - len(kept)
    n_cross = k_cross * places // (k_self + k_cross) if k_self + k_cross else 0
    short_self = best(own, places - n_cross)
    short_cross = best(cross, n_cross)
    left = best(cross, short_self) + best(own, short_cross)
    kept.update([c for c in range(len(own)) if c not in kept][:left])
    return kept


@st.composite
def rows(draw: st.DrawFn) -> tuple[FloatArray, FloatArray, BoolArray, int, int, int]:
    """Few different scores, so that there are ties, and many zeros, so that rankings run out."""
    n_row, n_cell = draw(st.integers(1, 4)), draw(st.integers(1, 60))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    levels = draw(st.sampled_from([1, 3, 50]))
    density = draw(st.sampled_from([0.05, 0.3, 1]))
    own, cross = (
        (generator.integers(1, levels + 1, (n_row, n_cell)) * (generator.random((n_row, n_cell)) < density)).astype(
            np.float32
        )
        for _ in range(2)
    )
    protected = generator.random((n_row, n_cell)) < draw(st.sampled_from([0, 0.2]))
    k_self, k_cross = draw(st.integers(0, 60)), draw(st.integers(0, 60))
    n_keep = draw(st.integers(int(protected.sum(axis=-1).max()), n_cell))
    return own, cross, protected, k_self, k_cross, n_keep


@settings(deadline=None)
@given(case=rows())
def test_rule(case: tuple[FloatArray, FloatArray, BoolArray, int, int, int]) -> None:
    own, cross, protected, *sizes = case
    keep = kernels.csp_select(own, cross, protected, *sizes)
    for row in range(len(keep)):
        expected = plain_csp(own[row].tolist(), cross[row].tolist(), {*np.flatnonzero(protected[row])}, *sizes)
        assert set(np.flatnonzero(keep[row])) == expected


@settings(deadline=None)
@given(case=rows())
def test_compiled_is_numpy(case: tuple[FloatArray, FloatArray, BoolArray, int, int, int]) -> None:
    pytest.importorskip("numba")
    select = kernels.compiled_select()
    assert select is not None
    own, cross, protected, k_self, k_cross, n_keep = case
    arguments = np.stack([own, cross]), np.array([k_self, k_cross]), protected, n_keep
    assert np.array_equal(select(*arguments), kernels.select_numpy(*arguments))


def test_compiled_is_numpy_on_odd_floats() -> None:
    """Subnormal, huge, infinite, negative and missing values rank alike."""
    pytest.importorskip("numba")
    select = kernels.compiled_select()
    assert select is not None
    values = np.array([0, -0.0, 1e-45, 1e-38, 3e38, np.inf, -1, -np.inf, np.nan, 1, np.nextafter(np.float32(1), 2)])
    both, shares = np.random.default_rng(0).choice(values.astype(np.float32), (2, 500, 30)), np.array([3, 4])
    protected = np.zeros((500, 30), np.bool_)
    for n_keep in (1, 7, 15, 29):
        expected = kernels.select_numpy(both, shares, protected, n_keep)
        assert (expected.sum(axis=-1) == n_keep).all()
        assert np.array_equal(select(both, shares, protected, n_keep), expected)


def test_many_selections_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the row on that makes numba worth its import; without numba they are not, with the same result."""
    monkeypatch.setattr(kernels, "_n_selected", 0)
    monkeypatch.setattr(kernels, "COMPILE_AFTER", 12)
    calls = []
    monkeypatch.setattr(kernels, "compiled_select", lambda: calls.append("numba"))
    generator = np.random.default_rng(0)
    own, cross = generator.random((2, 2, 3, 40), np.float32)
    protected = np.zeros((2, 3, 40), np.bool_)
    expected = kernels.csp_select(own, cross, protected, 6, 6, 12)
    assert not calls
    assert np.array_equal(kernels.csp_select(own, cross, protected, 6, 6, 12), expected)
    assert calls
    monkeypatch.undo()
    monkeypatch.setattr(kernels, "COMPILE_AFTER", 0)
    assert np.array_equal(kernels.csp_select(own, cross, protected, 6, 6, 12), expected)


def test_numba_is_not_imported_with_the_package() -> None:
    code = "import sys, edge_csp.policy; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def observation_of(record: dict[str, npt.NDArray[np.generic]]) -> Observation:
    """One layer; every recorded head is a KV head."""
    q, k = (record[name].astype(np.float32)[None] for name in "qk")
    n_window, shape = int(record["n_window"]), (1, k.shape[1], k.shape[2])
    modality = record["modality"].astype(np.uint8)
    window = window_scores(
        q[:, :, -n_window:], k, modality[-n_window:], n_window, float(record["softmax_n"]), n_modality=2
    )
    pos = np.broadcast_to(np.arange(shape[2], dtype=np.int32), shape)
    return Observation(np.broadcast_to(modality, shape), pos, scores=window)


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: f"{path.parts[-3]}-{path.stem}")
def test_picks_of_the_released_code(path: Path) -> None:
    """Equal over the tokens with a score; where it keeps a token twice, ours keeps one more of the cross ranking."""
    with np.load(path) as file:
        record = dict(file)
    observation = observation_of(record)
    recent, k_self, k_cross = (int(record[name]) for name in ("n_recent", "k_self", "k_cross"))
    n_past, n_keep = observation.n_cell - recent, k_self + k_cross + recent
    protected = np.zeros(observation.shape, np.bool_)
    protected[..., n_past:] = True
    own, cross = observation.score_self, observation.score_cross
    keep = kernels.csp_select(own, cross, protected, k_self, k_cross, n_keep)
    assert (keep.sum(axis=-1) == n_keep).all()
    assert keep[..., n_past:].all()
    for head in range(observation.shape[1]):
        by_self = [cell for cell in record["kept_self"][head].tolist() if own[0, head, cell] > 0]
        by_cross = [cell for cell in record["kept_cross"][head].tolist() if cross[0, head, cell] > 0]
        assert (len(by_self), len(by_cross)) == (k_self, k_cross)
        assert np.array_equal(np.lexsort((np.arange(n_past), -own[0, head, :n_past]))[:k_self], by_self)
        ranking = [cell for cell in np.argsort(-cross[0, head, :n_past], kind="stable") if cell not in by_self]
        assert set(np.flatnonzero(keep[0, head, :n_past])) == {*by_self, *ranking[:k_cross]}
        assert {*by_self, *by_cross} <= set(np.flatnonzero(keep[0, head]))
        if not {*by_self} & {*by_cross}:
            assert set(np.flatnonzero(keep[0, head, :n_past])) == {*by_self, *by_cross}


def test_records_have_the_cases_that_matter() -> None:
    """Overlapping picks, and a window that is not the recent cells."""
    overlap = recent_differs = False
    for path in (ROOT / "tests/data/oracle").glob("*.npz"):
        with np.load(path) as record:
            overlap |= any({*a} & {*b} for a, b in zip(record["kept_self"], record["kept_cross"], strict=True))
            recent_differs |= int(record["n_window"]) != int(record["n_recent"])
    assert overlap
    assert recent_differs


@pytest.mark.parametrize(
    ("cross_ratio", "n_past", "expected"),
    [
        (0, 10, (10, 0)),
        (1, 10, (0, 10)),
        (0.5, 11, (6, 5)),
        (0.29, 100, (71, 29)),
        (0.1, 150, (135, 15)),
        (0.9, 150, (15, 135)),
        (0.5, 0, (0, 0)),
    ],
)
def test_shares(cross_ratio: float, n_past: int, expected: tuple[int, int]) -> None:
    assert CspPolicy(cross_ratio).shares(n_past) == expected


def test_policy_is_the_kernel_with_the_shares_of_the_budget() -> None:
    """Recent cells are beside the shares; sink and pinned cells are charged to both."""
    generator = np.random.default_rng(3)
    scores = generator.random((2, 2, 2, 100), np.float32)
    observation = Observation(
        generator.integers(0, 2, (2, 2, 100)).astype(np.uint8), np.zeros((2, 2, 100), "i4"), scores=scores
    )
    protected = np.zeros(observation.shape, np.bool_)
    protected[..., :4] = protected[..., 90:] = True
    protected[1, 0, 20:23] = True
    assert n_recent(protected[0]) == n_recent(protected[1]) == 10
    assert n_recent(np.ones((1, 5), np.bool_)) == 5
    cells = CspPolicy(cross_ratio=0.3, pool=1).select(observation, 40, protected)
    keep = kernels.csp_select(observation.score_self, observation.score_cross, protected, 21, 9, 40)
    assert np.array_equal(cells, np.nonzero(keep)[-1].reshape(2, 2, 40))


def test_pool() -> None:
    scores = np.array([[0, 3, 0, 0, 6]], np.float32)
    assert kernels.pool(scores, 3).tolist() == [[1, 1, 1, 2, 2]]
    assert kernels.pool(scores, 1).tolist() == scores.tolist()
    assert kernels.pool(scores, 9)[0].tolist() == [np.float32(9) / np.float32(9)] * 5
    assert kernels.pool_max(scores, 3).tolist() == [[3, 3, 3, 6, 6]]
    assert kernels.pool_max(scores, 1).tolist() == scores.tolist()
    assert kernels.pool_max(scores, 101).tolist() == [[6] * 5]


@pytest.mark.parametrize(("width", "n_cell"), [(3, 1), (5, 2), (5, 100), (7, 33), (51, 20)])
def test_pool_sums_from_left_to_right(width: int, n_cell: int) -> None:
    """To the last bit: picks must not depend on how the sum is computed."""
    scores = np.random.default_rng(n_cell).random((2, 3, n_cell), np.float32)
    padded = np.pad(scores, [(0, 0), (0, 0), (width // 2, width // 2)])
    for cell in range(n_cell):
        total = np.float32(0)
        for neighbour in range(width):
            total = total + padded[..., cell + neighbour]
        assert np.array_equal(kernels.pool(scores, width)[..., cell], total / np.float32(width))
        assert np.array_equal(kernels.pool_max(scores, width)[..., cell], padded[..., cell : cell + width].max(axis=-1))


def test_pooling_keeps_neighbours() -> None:
    scores = np.zeros((1, 1, 1, 20), np.float32)
    scores[..., 8] = 1
    observation = Observation(np.zeros((1, 1, 20), np.uint8), np.zeros((1, 1, 20), np.int32), scores=scores)
    nothing = np.zeros((1, 1, 20), np.bool_)
    assert CspPolicy(0, pool=1).select(observation, 4, nothing).tolist() == [[[0, 1, 8, 19]]]
    assert CspPolicy(0, pool=3).select(observation, 4, nothing).tolist() == [[[7, 8, 9, 19]]]
