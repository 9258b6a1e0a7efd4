"""The default policies: what each ranking is for."""

from __future__ import annotations

import numpy as np
import pytest

from edge_csp.errors import PolicyError
from edge_csp.native import IMAGE, TEXT
from edge_csp.policy import BlendPolicy, CspPolicy, Observation, RehearsedBlendPolicy, Span
from edge_csp.policy.base import BoolArray, FloatArray, IntArray
from edge_csp.policy.blend import in_each_picture

SHAPE = 2, 3


def conversation(*spans: Span, seed: int = 0, **measured: FloatArray) -> Observation:
    """With random measurements where none are given; the window is text."""
    generator = np.random.default_rng(seed)
    sizes = [span.n_cell for span in spans]
    shape = (*SHAPE, sum(sizes))
    number = np.broadcast_to(np.repeat(np.arange(len(sizes), dtype=np.int32), sizes), shape)
    offset = np.broadcast_to(np.concatenate([np.arange(size, dtype=np.int32) for size in sizes]), shape)
    tag = np.array([IMAGE if span.is_picture else TEXT for span in spans], np.uint8)[number]
    pos = np.broadcast_to(np.arange(shape[2], dtype=np.int32), shape)
    scores = np.zeros((*SHAPE, 2, shape[2]), np.float32)
    scores[:, :, TEXT] = generator.random(shape, np.float32)
    found = {name: generator.random(shape, np.float32) for name in ("key_norm", "value_norm", "repeated", "described")}
    return Observation(
        tag.copy(),
        pos.copy(),
        span=number.copy(),
        offset=offset.copy(),
        spans=spans,
        **{"scores": scores, **found, **measured},
    )


def protected_of(observation: Observation) -> BoolArray:
    return np.zeros(observation.shape, np.bool_)


def kept_in_spans(observation: Observation, cells: IntArray) -> np.ndarray:
    """Cells of every span that stay, [n_layer, n_head_kv, n_span]."""
    spans = np.take_along_axis(observation.span, cells, axis=-1)
    return np.stack([(spans == i).sum(axis=-1) for i in range(len(observation.spans))], axis=-1)


def picture(n_cell: int = 64) -> Span:
    return Span(n_cell, is_picture=True)


@pytest.mark.parametrize("n_keep", [2, 10, 39])
def test_without_pictures_half_is_csp_and_half_the_newest(n_keep: int) -> None:
    observation = conversation(Span(40))
    expected = CspPolicy().select(observation, n_keep, protected_of(observation))
    policy = BlendPolicy(newest_share=0)
    assert np.array_equal(policy.select(observation, n_keep, protected_of(observation)), expected)
    cells = BlendPolicy(newest_share=5, self_share=4, cross_share=1).select(observation, 21, protected_of(observation))
    scores = observation.scores[0, 0, TEXT, :39].argsort()[::-1]
    assert {*cells[0, 0].tolist()} >= {*scores[:10].tolist(), 39}
    assert (cells[..., -8:] == np.arange(32, 40)).all()


def test_every_picture_keeps_something() -> None:
    """Though the question looks at one of them only, and no key of the others is long."""
    observation = conversation(*[picture()] * 8, Span(40))
    scores, norms = observation.scores.copy(), observation.key_norm.copy()
    scores[..., 64:512] *= np.float32(1e-6)
    norms[..., 64:512] *= np.float32(1e-6)
    one = conversation(*[picture()] * 8, Span(40), scores=scores, key_norm=norms)
    kept = kept_in_spans(one, BlendPolicy().select(one, 110, protected_of(one)))
    assert (kept[..., 1:8] >= 4).all()
    assert (kept[..., 0] > 2 * kept[..., 1:8].max(axis=-1)).all()
    plain = kept_in_spans(one, CspPolicy().select(one, 110, protected_of(one)))
    assert (plain[..., 1:8] == 0).any()


def test_pictures_share_in_proportion_to_their_size() -> None:
    norms = np.random.default_rng(1).random((*SHAPE, 136), np.float32)
    observation = conversation(picture(32), picture(96), Span(8), key_norm=norms)
    policy = BlendPolicy(self_share=0, cross_share=0)
    kept = kept_in_spans(observation, policy.select(observation, 40, protected_of(observation)))
    assert (kept == (10, 29, 1)).all()


def test_a_ranking_in_each_picture() -> None:
    observation = conversation(picture(4), Span(3), picture(4), Span(1))
    values = np.zeros(observation.shape, np.float32)
    values[..., [1, 2]] = 0.1, 0.2
    values[..., [7, 8]] = 100, 300
    ranking = in_each_picture(values, observation)
    assert (ranking[..., 4:7] == 0).all()
    assert (ranking[..., 2] == ranking[..., 8]).all()  # the best of each picture stand level
    assert (ranking[..., 1] == ranking[..., 7]).all()
    assert (ranking[..., :4] > 0).all()
    assert (ranking[..., 2] > ranking[..., 1]).all()


def test_long_keys_are_looked_for_in_pictures_alone() -> None:
    norms = np.ones((*SHAPE, 80), np.float32)
    norms[..., 5] = norms[..., 70] = 9
    observation = conversation(picture(40), Span(40), key_norm=norms)
    policy = BlendPolicy(self_share=0, cross_share=0)
    assert policy.select(observation, 3, protected_of(observation))[0, 0].tolist() == [0, 5, 79]


@pytest.mark.parametrize("looked_at", ["long", "short"])
def test_long_keys_rank_if_they_are_looked_at(looked_at: str) -> None:
    """A model that looks at short ones is left to csp; before it is known, long ones rank."""
    norms = np.ones((*SHAPE, 80), np.float32)
    norms[..., :10], norms[..., 10:20] = 9, 0.1
    scores = np.zeros((*SHAPE, 2, 80), np.float32)
    scores[:, :, TEXT, slice(5, 10) if looked_at == "long" else slice(12, 15)] = 1
    observation = conversation(picture(40), Span(40), key_norm=norms, scores=scores)
    protected = protected_of(observation)
    policy = BlendPolicy(self_share=0, cross_share=0)
    assert policy.select(observation, 4, protected)[0, 0].tolist() == [0, 1, 2, 79]
    fitted = policy.fit(observation.of_layer(i) for i in range(2))
    assert fitted.long_keys == RehearsedBlendPolicy().fit([observation]).long_keys == ("yes", "no")[looked_at != "long"]
    expected = (policy if looked_at == "long" else CspPolicy()).select(observation, 4, protected)
    assert np.array_equal(fitted.select(observation, 4, protected), expected)
    assert BlendPolicy(long_keys="no").fit([observation]).long_keys == "no"
    nothing = conversation(picture(40), Span(40), key_norm=norms, scores=np.zeros_like(scores))
    assert BlendPolicy().fit([nothing]) == BlendPolicy()


def test_what_was_rehearsed_stays() -> None:
    repeated, described = np.zeros((2, *SHAPE, 60), np.float32)
    repeated[..., [3, 4, 5]] = 1
    described[..., [20, 30]] = 1
    scores = np.zeros((*SHAPE, 2, 60), np.float32)
    values = np.ones((*SHAPE, 60), np.float32)
    values[..., 5] = 0
    measured = {"repeated": repeated, "described": described, "value_norm": values, "scores": scores}
    observation = conversation(Span(10), picture(40), Span(10), **measured)
    policy = RehearsedBlendPolicy(self_share=0, picture_share=0)
    assert policy.select(observation, 5, protected_of(observation))[0, 0].tolist() == [3, 4, 20, 30, 59]


def test_text_shares_with_the_window() -> None:
    """The share of descriptions goes to the other two where there are no pictures, not to one of them."""
    repeated = np.zeros((*SHAPE, 40), np.float32)
    repeated[..., :20] = np.arange(20, 0, -1)
    scores = np.zeros((*SHAPE, 2, 40), np.float32)
    scores[:, :, TEXT, 20:] = np.arange(1, 21)
    observation = conversation(Span(40), repeated=repeated, scores=scores, value_norm=np.ones((*SHAPE, 40), np.float32))
    policy = RehearsedBlendPolicy(repeated_share=1, self_share=1, newest_share=0)
    cells = policy.select(observation, 11, protected_of(observation))
    assert cells[0, 0].tolist() == [*range(5), *range(34, 40)]


@pytest.mark.parametrize("setting", ["self_share", "cross_share", "picture_share", "newest_share"])
def test_settings(setting: str) -> None:
    with pytest.raises(PolicyError, match=f"{setting} is -1"):
        BlendPolicy(**{setting: -1})


def test_long_keys_are_auto_yes_or_no() -> None:
    with pytest.raises(PolicyError, match="long_keys is 'maybe'; it must be one of auto, yes, no"):
        BlendPolicy(long_keys="maybe")  # type: ignore[arg-type]
