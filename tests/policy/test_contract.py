"""What every policy promises, whatever its idea."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_csp.errors import PolicyError
from edge_csp.policy import POLICIES, CspPolicy, FullPolicy, Observation, Policy, RandomPolicy, make_policy
from edge_csp.policy.base import BoolArray

VARIANTS: list[Policy] = [
    *(policy() for policy in POLICIES.values()),
    CspPolicy(cross_ratio=0, pool=1),
    CspPolicy(cross_ratio=1),
    RandomPolicy(seed=7),
]


def make_observation(generator: np.random.Generator, shape: tuple[int, int, int], n_modality: int = 3) -> Observation:
    """Scores with many zeros and many ties."""
    n_layer, n_head_kv, n_cell = shape
    scores = generator.integers(0, 6, (n_layer, n_head_kv, n_modality, n_cell)).astype(np.float32) / 8
    scores[generator.random(scores.shape) < generator.random()] = 0
    tag = generator.integers(0, n_modality, shape).astype(np.uint8)
    pos = np.sort(generator.integers(0, 10 * n_cell, shape).astype(np.int32), axis=-1)
    return Observation(tag, pos, scores=scores)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Observation, int, BoolArray]:
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 40)))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    observation = make_observation(generator, shape, draw(st.integers(1, 4)))
    protected = generator.random(shape) < draw(st.sampled_from([0, 0.1, 0.5, 1]))
    return observation, draw(st.integers(1, 50)), protected


@pytest.mark.parametrize("policy", VARIANTS, ids=repr)
@settings(deadline=None)
@given(case=cases())
def test_select(policy: Policy, case: tuple[Observation, int, BoolArray]) -> None:
    observation, budget, protected = case
    n_keep = policy.n_keep(budget, observation.n_cell)
    inputs = [observation.scores, observation.tag, observation.pos, protected]
    before = [array.copy() for array in inputs]
    needed = protected.copy()
    needed[..., -1] = True
    if (needed.sum(axis=-1) > n_keep).any():
        with pytest.raises(PolicyError, match="protected"):
            policy.select(observation, budget, protected)
        return
    cells = policy.select(observation, budget, protected)
    assert cells.dtype == np.int32
    assert cells.shape == (*observation.shape[:2], n_keep)
    assert cells.min() >= 0
    assert cells.max() < observation.n_cell
    assert (np.diff(cells, axis=-1) > 0).all()
    kept = np.zeros(observation.shape, np.bool_)
    np.put_along_axis(kept, cells.astype(np.intp), True, axis=-1)
    assert kept[needed].all()
    assert np.array_equal(policy.select(observation, budget, protected), cells)
    assert all(np.array_equal(array, copy) for array, copy in zip(inputs, before, strict=True))


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


def test_a_policy_that_breaks_the_contract_is_caught() -> None:
    class Greedy(CspPolicy):
        def pick(self, observation: Observation, n_keep: int, protected: BoolArray) -> BoolArray:
            return np.ones(observation.shape, np.bool_)

    observation = make_observation(np.random.default_rng(0), (1, 1, 4))
    with pytest.raises(PolicyError, match="contract"):
        Greedy().select(observation, 2, np.zeros((1, 1, 4), np.bool_))


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
    with pytest.raises(PolicyError, match="no policy is named 'best'; there are csp, full, random"):
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
