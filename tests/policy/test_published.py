"""What is special about each published policy, against plain loops over single cells."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edge_csp.policy import (
    H2oPolicy,
    KeyDiffPolicy,
    LookMPolicy,
    Observation,
    Policy,
    SnapKvPolicy,
    StreamingPolicy,
)
from edge_csp.policy.keydiff import similarity_to_mean

SHAPE = (2, 2, 50)
NOTHING = np.zeros(SHAPE, np.bool_)


def observe(**measured: npt.NDArray[np.float32]) -> Observation:
    """Cells 0 .. 9 and 30 .. 39 are text, the others a picture."""
    pos = np.broadcast_to(np.arange(SHAPE[2], dtype=np.int32), SHAPE)
    tag = ((pos // 10) % 3 > 0).astype(np.uint8)
    return Observation(tag, pos, **measured)  # type: ignore[arg-type]


def random(*size: int) -> npt.NDArray[np.float32]:
    """No two alike, none 0."""
    values = np.random.default_rng(len(size)).permutation(math.prod(size)).reshape(size)
    return ((values + 1) / math.prod(size)).astype(np.float32)


def best(values: Any, n: int) -> list[int]:
    """The n highest of a row and its last cell, ascending."""
    order = sorted(range(len(values) - 1), key=lambda cell: (-values[cell], cell))
    return sorted([*order[: n - 1], len(values) - 1])


@pytest.mark.parametrize("pooling", ["avg", "max"])
def test_snapkv(pooling: Any) -> None:
    scores = random(2, 2, 3, 50)
    cells = SnapKvPolicy(pool=3, pooling=pooling).select(observe(scores=scores), 12, NOTHING)
    for il, head in np.ndindex(2, 2):
        attention = [float(scores[il, head, :, cell].sum()) for cell in range(50)]
        around = [[attention[c] for c in (cell - 1, cell, cell + 1) if 0 <= c < 50] for cell in range(50)]
        pooled = [max(near) if pooling == "max" else sum(near) for near in around]
        assert cells[il, head].tolist() == best(pooled, 12)


def test_snapkv_ignores_modality() -> None:
    scores = random(2, 2, 2, 50)
    swapped = np.ascontiguousarray(scores[:, :, ::-1])
    one, other = (SnapKvPolicy(pool=1).select(observe(scores=given), 12, NOTHING) for given in (scores, swapped))
    assert np.array_equal(one, other)


@pytest.mark.parametrize("recent", [0, 0.29, 0.5, 1])
def test_h2o(recent: float) -> None:
    mass = random(2, 2, 50)
    n_keep = 20
    cells = H2oPolicy(recent=recent).select(observe(mass=mass), n_keep, NOTHING)
    n_recent = max(round(recent * 100) * n_keep // 100, 1)
    for il, head in np.ndindex(2, 2):
        last = list(range(50 - n_recent, 50))
        heavy = sorted(range(50 - n_recent), key=lambda cell: -mass[il, head, cell])[: n_keep - n_recent]
        assert cells[il, head].tolist() == sorted(heavy + last)


def test_h2o_has_the_later_of_the_recent_cells_if_protected_ones_leave_little() -> None:
    protected = NOTHING.copy()
    protected[..., :15] = True
    cells = H2oPolicy(recent=0.5).select(observe(mass=random(2, 2, 50)), 20, protected)
    assert cells[0, 0].tolist() == [*range(15), *range(45, 50)]


def test_streaming() -> None:
    observation = observe()
    assert StreamingPolicy().select(observation, 10, NOTHING)[1, 1].tolist() == [*range(4), *range(44, 50)]
    assert StreamingPolicy(sink=0).select(observation, 10, NOTHING)[1, 1].tolist() == [*range(40, 50)]
    assert StreamingPolicy(sink=99).select(observation, 10, NOTHING)[1, 1].tolist() == [*range(9), 49]


def test_keydiff() -> None:
    keys = np.random.default_rng(0).standard_normal((2, 2, 50, 6), np.float32)
    keys[0, 0, 7] = 0
    cells = KeyDiffPolicy().select(observe(keys=keys), 12, NOTHING)
    for il, head in np.ndindex(2, 2):
        rows = [[float(x) for x in row] for row in keys[il, head]]
        length = [math.hypot(*row) or 1 for row in rows]
        mean = [sum(row[i] / size for row, size in zip(rows, length, strict=True)) / 50 for i in range(6)]
        like = [
            sum(x * y for x, y in zip(row, mean, strict=True)) / size / math.hypot(*mean)
            for row, size in zip(rows, length, strict=True)
        ]
        assert np.allclose(similarity_to_mean(keys[il])[head], like, atol=1e-6)
        assert cells[il, head].tolist() == best([-x for x in like], 12)


def test_lookm_keeps_text_first() -> None:
    mass = random(2, 2, 50)
    mass[..., :5] = 0  # text without attention
    observation = observe(mass=mass)
    text = [*range(10), *range(30, 40)]
    cells = LookMPolicy().select(observation, 30, NOTHING)
    few = LookMPolicy().select(observation, 8, NOTHING)
    for il, head in np.ndindex(2, 2):
        pictures = sorted(set(range(49)) - {*text}, key=lambda cell: -mass[il, head, cell])
        assert cells[il, head].tolist() == sorted([*text, 49, *pictures[:9]])
        best_text = sorted(text, key=lambda cell: -mass[il, head, cell])[:7]
        assert few[il, head].tolist() == sorted([*best_text, 49])


def merged_one_by_one(merge: str, k: Any, v: Any, kept: list[int]) -> tuple[Any, Any]:
    """One head, in double precision: every evicted row looks for its nearest row, which takes all of its own."""
    new_k, new_v = k.astype(float), v.astype(float)
    guests: dict[int, list[tuple[int, float]]] = {cell: [] for cell in kept}
    for cell in range(len(k)):
        if cell in kept:
            continue
        nearest, highest = -1, -math.inf
        for other in kept:
            product = sum(float(x) * float(y) for x, y in zip(k[cell], k[other], strict=True))
            size = math.hypot(*map(float, k[cell])) * math.hypot(*map(float, k[other]))
            similarity = product / size if size else 0.0
            if similarity > highest:
                nearest, highest = other, similarity
        guests[nearest].append((cell, highest))
    for new, old in ((new_k, k.astype(float)), (new_v, v.astype(float))):
        for cell, merged in guests.items():
            total = old[cell].copy()
            for guest, similarity in merged:
                total += {
                    "average": old[guest],
                    "pivotal": (old[guest] + old[cell]) / 2,
                    "weighted": similarity * old[guest],
                }[merge]
            new[cell] = total / (len(merged) + 1)
    return new_k, new_v


@pytest.mark.parametrize("n_keep", [1, 7, 49])
@pytest.mark.parametrize("merge", ["average", "pivotal", "weighted"])
def test_lookm_merges(merge: Any, n_keep: int) -> None:
    generator = np.random.default_rng(n_keep)
    k = generator.standard_normal((2, 50, 6), np.float32)
    v = generator.standard_normal((2, 50, 4), np.float32)
    k[1, 13] = 0
    for array in (k, v):
        array.flags.writeable = False
    policy = LookMPolicy(merge=merge)
    observation = observe(mass=random(2, 2, 50)).of_layer(0)
    cells = policy.select(observation, n_keep, NOTHING[:1])[0]
    assert policy.merges
    new_k, new_v = policy.merge_rows(observation, k, v, cells)
    assert (new_k.dtype, new_v.dtype) == (np.float32, np.float32)
    for head in range(2):
        kept = cells[head].tolist()
        expected_k, expected_v = merged_one_by_one(merge, k[head], v[head], kept)
        assert np.allclose(new_k[head, kept], expected_k[kept], atol=1e-5)
        assert np.allclose(new_v[head, kept], expected_v[kept], atol=1e-5)


def test_lookm_merges_in_chunks_and_ties_go_to_the_earlier_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    k = np.zeros((1, 8, 2), np.float32)
    k[0, :4, 0] = 1, 2, 3, 4  # alike: those of cells 4 .. 7 are, too
    k[0, 4:, 0] = 1
    cells = np.array([[2, 3]], np.int32)
    policy = LookMPolicy(merge="average")
    observation = observe(mass=random(2, 2, 50)).of_layer(0)
    for chunk in (1, 4, 1024):
        monkeypatch.setattr("edge_csp.policy.lookm.CHUNK", chunk)
        new_k, _ = policy.merge_rows(observation, k, k, cells)
        assert new_k[0, 2:4, 0].tolist() == pytest.approx([(3 + 1 + 2 + 1 + 1 + 1 + 1) / 7, 4])


def test_without_merging_rows_are_what_they_were() -> None:
    k = v = np.ones((2, 50, 4), np.float32)
    policies: list[Policy] = [LookMPolicy(), SnapKvPolicy()]
    for policy in policies:
        assert not policy.merges
        new_k, new_v = policy.merge_rows(observe(), k, v, np.zeros((2, 1), np.int32))
        assert np.array_equal(new_k, k)
        assert np.array_equal(new_v, v)
