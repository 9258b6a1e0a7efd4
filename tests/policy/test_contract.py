"""What every policy promises, whatever its idea."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_csp.errors import PolicyError
from edge_csp.policy import (
    POLICIES,
    CspPolicy,
    FullPolicy,
    H2oPolicy,
    Observation,
    Policy,
    RandomPolicy,
    SnapKvPolicy,
    Span,
    StreamingPolicy,
    make_policy,
)
from edge_csp.policy.base import MEASURED, BoolArray

VARIANTS: list[Policy] = [
    *(policy() for policy in POLICIES.values()),
    CspPolicy(cross_ratio=0, pool=1),
    CspPolicy(cross_ratio=1),
    SnapKvPolicy(pooling="max"),
    H2oPolicy(recent=0),
    StreamingPolicy(sink=0),
    RandomPolicy(seed=7),
]
N_CASE = 2000


def make_observation(generator: np.random.Generator, shape: tuple[int, int, int], n_modality: int = 3) -> Observation:
    """Everything that can be measured, with many zeros and many ties."""
    n_layer, n_head_kv, n_cell = shape
    sizes = {name: shape for name in MEASURED}
    sizes |= {"scores": (n_layer, n_head_kv, n_modality, n_cell), "keys": (*shape, 4)}
    measured = {}
    for name, size in sizes.items():
        values = generator.integers(0, 6, size).astype(np.float32) / 8
        values[generator.random(size) < generator.random()] = 0
        measured[name] = values
    tag = generator.integers(0, n_modality, shape).astype(np.uint8)
    pos = np.sort(generator.integers(0, 10 * n_cell, shape).astype(np.int32), axis=-1)
    spans = [Span(16, is_picture=i % 2 == 1, columns=i % 3 * 4) for i in range(1 + int(pos.max()) // 16)]
    return Observation(tag, pos, span=pos // 16, offset=pos % 16, spans=spans, **measured)


def part_of(observation: Observation, layers: slice, cells: slice = slice(None)) -> Observation:
    """Some layers, counted from 0, and cells."""
    return Observation(
        observation.tag[layers, :, cells],
        observation.pos[layers, :, cells],
        span=observation.span[layers, :, cells],
        offset=observation.offset[layers, :, cells],
        spans=observation.spans,
        first_layer=layers.start or 0,
        **{name: getattr(observation, name)[layers, ..., cells] for name in MEASURED if name != "keys"},
        keys=observation.keys[layers, :, cells],
    )


Case = tuple[Observation, int, BoolArray]


@pytest.fixture(scope="module")
def drawn() -> tuple[Observation, list[Case]]:
    """Random cases with two layers each, and the observation that they are cut from."""
    generator = np.random.default_rng(0)
    everything = make_observation(generator, (2 * N_CASE, 2, 32))
    found = []
    for i in range(N_CASE):
        n_cell = int(generator.integers(1, 33))
        observation = part_of(everything, slice(2 * i, 2 * i + 2), slice(n_cell))
        protected = generator.random(observation.shape) < generator.choice([0, 0.1, 0.5])
        protected[..., int(n_cell * generator.choice([0.7, 1])) :] = True
        protected[..., -1] = True
        n_protected = int(protected.sum(axis=-1).max())
        found.append((observation, int(generator.integers(n_protected, n_cell + 2)), protected))
    return everything, found


@pytest.mark.parametrize("policy", VARIANTS, ids=repr)
def test_contract(policy: Policy, drawn: tuple[Observation, list[Case]]) -> None:
    """Count, protection, determinism, no mutation, and a layer on its own gets what it gets among others."""
    everything, found = drawn
    inputs = [
        everything.tag,
        everything.pos,
        everything.span,
        everything.offset,
        *(getattr(everything, name) for name in MEASURED),
    ]
    before = [array.copy() for array in inputs]
    for observation, budget, protected in found:
        protected_before = protected.copy()
        n_keep = policy.n_keep(budget, observation.n_cell)
        cells = policy.select(observation, budget, protected)
        assert cells.dtype == np.int32
        assert cells.shape == (*observation.shape[:2], n_keep)
        kept = np.zeros(observation.shape, np.bool_)
        np.put_along_axis(kept, cells.astype(np.intp), True, axis=-1)
        assert (kept.sum(axis=-1) == n_keep).all()
        assert (cells[..., 1:] > cells[..., :-1]).all()
        assert kept[protected].all()
        assert np.array_equal(policy.select(observation, budget, protected), cells)
        alone = policy.select(observation.of_layer(1), budget, protected[1:])
        assert np.array_equal(alone, cells[1:])
        assert np.array_equal(protected, protected_before)
    assert all(np.array_equal(array, copy) for array, copy in zip(inputs, before, strict=True))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 40)))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    observation = make_observation(generator, shape, draw(st.integers(1, 4)))
    protected = generator.random(shape) < draw(st.sampled_from([0, 0.1, 0.5, 1]))
    return observation, draw(st.integers(1, 50)), protected


@settings(deadline=None)
@given(case=cases(), policy=st.sampled_from(VARIANTS))
def test_select(case: Case, policy: Policy) -> None:
    """Any shape, budget and protection; what cannot be met is refused."""
    observation, budget, protected = case
    n_keep = policy.n_keep(budget, observation.n_cell)
    needed = protected.copy()
    needed[..., -1] = True
    if (needed.sum(axis=-1) > n_keep).any():
        with pytest.raises(PolicyError, match="protected"):
            policy.select(observation, budget, protected)
        return
    cells = policy.select(observation, budget, protected)
    kept = np.zeros(observation.shape, np.bool_)
    np.put_along_axis(kept, cells.astype(np.intp), True, axis=-1)
    assert (kept.sum(axis=-1) == n_keep).all()
    assert kept[needed].all()


def test_csp_does_not_depend_on_what_other_layers_protect() -> None:
    """A pinned cell beside the recent ones, in one layer: its share is still that of its own recent cells."""
    scores = np.random.default_rng(1).random((2, 1, 2, 60), np.float32)
    pos = np.broadcast_to(np.arange(60, dtype=np.int32), (2, 1, 60))
    observation = Observation((pos % 2).astype(np.uint8), pos, scores=scores)
    protected = np.zeros(observation.shape, np.bool_)
    protected[..., 58:] = True
    protected[0, 0, 54:] = True
    cells = CspPolicy(cross_ratio=0.9).select(observation, 24, protected)
    assert np.array_equal(cells[:1], CspPolicy(cross_ratio=0.9).select(observation.of_layer(0), 24, protected[:1]))


def test_full_keeps_everything_whatever_the_budget() -> None:
    observation = make_observation(np.random.default_rng(0), (2, 2, 10))
    cells = FullPolicy().select(observation, 3, np.zeros(observation.shape, np.bool_))
    assert np.array_equal(cells, np.broadcast_to(np.arange(10), (2, 2, 10)))
    assert all(policy().n_keep(3, 10) == 3 for name, policy in POLICIES.items() if name != "full")


def test_random_is_uniform_and_differs_between_rows_and_seeds() -> None:
    observation = make_observation(np.random.default_rng(0), (20, 20, 50))
    protected = np.zeros(observation.shape, np.bool_)
    protected[..., :5] = True
    cells = RandomPolicy(seed=1).select(observation, 20, protected)
    count = np.bincount(cells.ravel(), minlength=50)
    assert (count[:5] == 400).all()
    assert count[49] == 400
    expected = 400 * 14 / 44
    assert np.abs(count[5:49] - expected).max() < 5 * np.sqrt(expected * (1 - 14 / 44))
    assert len({row.tobytes() for row in cells.reshape(-1, 20)}) == 400
    assert not np.array_equal(cells, RandomPolicy(seed=2).select(observation, 20, protected))


@pytest.mark.parametrize("budget", [0, -1])
def test_budget_below_one(budget: int) -> None:
    observation = make_observation(np.random.default_rng(0), (1, 1, 4))
    with pytest.raises(PolicyError, match=f"budget is {budget} cells"):
        CspPolicy().select(observation, budget, np.zeros((1, 1, 4), np.bool_))


@pytest.mark.parametrize("protected", [np.zeros((1, 1, 5), np.bool_), np.zeros((1, 1, 4), np.uint8)])
def test_wrong_protected(protected: Any) -> None:
    observation = make_observation(np.random.default_rng(0), (1, 1, 4))
    with pytest.raises(PolicyError, match="protected: expected bool"):
        CspPolicy().select(observation, 2, protected)


Pick = Callable[[Observation, int, BoolArray], Any]


def too_many(observation: Observation, n_keep: int, protected: BoolArray) -> Any:
    return np.ones(observation.shape, np.bool_)


def last_protected_is_lost(observation: Observation, n_keep: int, protected: BoolArray) -> Any:
    keep = np.zeros(observation.shape, np.bool_)
    keep[..., :n_keep] = True
    return keep


def writes_scores(observation: Observation, n_keep: int, protected: BoolArray) -> Any:
    observation.scores[...] = 0


def writes_protected(observation: Observation, n_keep: int, protected: BoolArray) -> Any:
    protected[...] = True


def forces_protected(observation: Observation, n_keep: int, protected: BoolArray) -> Any:
    protected.flags.writeable = True
    protected[...] = False
    return last_protected_is_lost(observation, n_keep, protected)


@pytest.mark.parametrize(
    ("pick", "offence"),
    [
        (too_many, "layer 5, head 0 keeps 4 cells instead of 2"),
        (last_protected_is_lost, "layer 5, head 0 evicts cell 3, which is protected"),
        (forces_protected, "layer 5, head 0 evicts cell 3, which is protected"),
        (writes_scores, "changes its input: ValueError: assignment destination is read-only"),
        (writes_protected, "changes its input: ValueError: assignment destination is read-only"),
        (lambda *_: None, r"pick gave NoneType, not bool \(1, 1, 4\)"),
        (lambda *_: np.ones((1, 1, 4)), r"pick gave float64 \(1, 1, 4\), not bool \(1, 1, 4\)"),
        (lambda *_: np.ones((1, 4), np.bool_), r"pick gave bool \(1, 4\), not bool \(1, 1, 4\)"),
        (lambda *_: [][1], "failed: IndexError: list index out of range"),
        (lambda observation, *_: observation.mass, "mass was not measured"),
    ],
)
def test_select_names_the_offence(pick: Pick, offence: str) -> None:
    class Wrong(CspPolicy):
        def pick(self, observation: Observation, n_keep: int, protected: BoolArray) -> Any:
            return pick(observation, n_keep, protected)

    scores = np.zeros((1, 1, 2, 4), np.float32)
    observation = Observation(
        np.zeros((1, 1, 4), np.uint8), np.zeros((1, 1, 4), np.int32), first_layer=5, scores=scores
    )
    with pytest.raises(PolicyError, match=offence):
        Wrong().select(observation, 2, np.zeros((1, 1, 4), np.bool_))


def test_observation_is_read_only_and_leaves_the_callers_arrays_alone() -> None:
    scores, tag, pos = np.zeros((1, 1, 2, 3), np.float32), np.zeros((1, 1, 3), np.uint8), np.zeros((1, 1, 3), np.int32)
    observation = Observation(tag, pos, scores=scores)
    with pytest.raises(ValueError, match="read-only"):
        observation.scores[0] = 1
    scores[0, 0, 1, 2] = 1
    assert observation.scores[0, 0, 1, 2] == 1


def test_observation_refuses_what_does_not_fit() -> None:
    scores, tag, pos = np.zeros((1, 1, 2, 3), np.float32), np.zeros((1, 1, 3), np.uint8), np.zeros((1, 1, 3), np.int32)
    with pytest.raises(PolicyError, match="tag 2 has no scores"):
        Observation(tag + np.uint8(2), pos, scores=scores)
    with pytest.raises(PolicyError, match="pos has the shape"):
        Observation(tag, pos[..., :2], scores=scores)
    with pytest.raises(PolicyError, match="scores: expected float32"):
        Observation(tag, pos, scores=scores.astype(np.float64))  # type: ignore[arg-type]
    with pytest.raises(PolicyError, match="nothing to select from"):
        Observation(tag[..., :0], pos[..., :0], scores=scores[..., :0])


def test_scores_by_modality() -> None:
    scores = np.array([[1, 2, 3], [10, 20, 30], [100, 200, 300]], np.float32).reshape(1, 1, 3, 3)
    observation = Observation(np.array([[[0, 1, 2]]], np.uint8), np.zeros((1, 1, 3), np.int32), scores=scores)
    assert observation.score_self.tolist() == [[[1, 20, 300]]]
    assert observation.score_cross.tolist() == [[[110, 202, 33]]]


def test_make_policy() -> None:
    assert make_policy("csp", cross_ratio=0.25) == CspPolicy(cross_ratio=0.25)
    with pytest.raises(
        PolicyError,
        match=r"no policy is named 'best'; there are blend, blend\+, csp, full, h2o, keydiff, lookm, random",
    ):
        make_policy("best")
    with pytest.raises(PolicyError, match="csp does not know budget; its settings are cross_ratio, pool"):
        make_policy("csp", budget=3)
    with pytest.raises(PolicyError, match="it has no settings"):
        make_policy("full", seed=3)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("csp", {"cross_ratio": -0.1}),
        ("csp", {"cross_ratio": 1.1}),
        ("csp", {"cross_ratio": float("nan")}),
        ("csp", {"pool": 0}),
        ("csp", {"pool": 4}),
        ("snapkv", {"pool": 2}),
        ("snapkv", {"pooling": "min"}),
        ("h2o", {"recent": 1.5}),
        ("lookm", {"merge": "some"}),
        ("streaming", {"sink": -1}),
        ("random", {"seed": -1}),
    ],
)
def test_settings_out_of_range(name: str, values: dict[str, Any]) -> None:
    with pytest.raises(PolicyError, match=f"{next(iter(values))} is "):
        make_policy(name, **values)


@pytest.mark.parametrize("name", POLICIES)
def test_policies_are_frozen_settings(name: str) -> None:
    policy = make_policy(name)
    assert policy.name == name
    assert dataclasses.is_dataclass(policy)
    assert hash(policy) == hash(make_policy(name))
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.name = "other"  # type: ignore[misc]
