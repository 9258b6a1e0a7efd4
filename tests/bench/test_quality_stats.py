"""Statistics of `edge-csp bench quality`, against brute force."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from edge_csp.bench.quality import report, stats
from edge_csp.bench.quality.reading import Record


def test_interval_is_that_of_every_possible_draw() -> None:
    """Three albums can be drawn in 27 ways, which are equally likely."""
    albums = {"a": [1.0, 0.0, 1.0], "b": [0.0, -1.0], "c": [1.0, 1.0, 1.0, 0.0]}
    means = sorted(
        float(np.mean([value for name in drawn for value in albums[name]]))
        for drawn in itertools.product(albums, repeat=3)
    )
    values = [value for group in albums.values() for value in group]
    clusters = [name for name, group in albums.items() for _ in group]
    found = stats.difference(values, clusters, n_resample=200_000)
    assert found.mean == pytest.approx(np.mean(values))
    assert found.low == means[0]  # 1/27 of the draws are "bbb", more than 2.5 %
    assert found.high == means[-1]
    assert stats.difference(values, clusters) == stats.difference(values, clusters)


def test_interval_of_many_single_questions_is_the_normal_one() -> None:
    values = np.random.default_rng(1).normal(0.1, 1.0, 400)
    found = stats.difference(list(values), range(400), n_resample=20_000)
    error = values.std() / np.sqrt(400)
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.05 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.05 * error)


def test_questions_of_an_album_count_together() -> None:
    """A hundred copies of a question say no more than it does."""
    once = stats.difference([1, 0, 1, 0], "abcd")
    many = stats.difference([1, 0, 1, 0] * 100, "abcd" * 100)
    assert (once.low, once.high) == (many.low, many.high)
    assert once.high - once.low >= 0.5


def test_one_album_has_no_interval() -> None:
    found = stats.difference([1, 0, 1], "aaa")
    assert (found.low, found.high) == (-np.inf, np.inf)
    assert report.interval(found) == "no interval"


def record(policy: str, question: int, right: bool, **what: Any) -> dict[str, Any]:
    own = Record(
        protocol="later",
        policy=policy,
        budget="20%",
        question=question,
        turn=question,
        kind="",
        n_token=100,
        n_budget=20,
        n_cell=20,
        kept_text=5.0,
        kept_picture=15.0,
        answer="x",
        full="y",
        right=right,
        full_right=True,
        same=right,
        kl=0.5,
        evict_s=0.01,
    )
    about = {"model": "demo", "topic": "", "length": 0, "n_picture": 4, "album": question % 2}
    return about | own.to_dict() | what


def test_summary_pairs_questions_and_sets_the_first_apart() -> None:
    rows = [record("a", n, n % 4 != 3) for n in range(8)] + [record("b", n, True) for n in range(6)]
    rows += [record("b", 7, True, n_cell=21)]
    found = {(one.protocol, one.policy): one for one in stats.summarise(rows, "a")}
    assert set(found) == {(p, c) for p in ("later", "later, first") for c in "ab"}
    later = found["later", "b"]
    assert (later.n, later.n_album, later.accuracy, later.full) == (6, 2, 1.0, 1.0)
    assert later.is_over
    assert not found["later", "a"].is_over
    assert later.to_reference is not None
    assert later.to_reference.mean == pytest.approx(2 / 6)  # a is wrong at 3 and 7; b has no question 6
    assert later.to_reference.low == 0  # all of album 0
    assert found["later", "a"].to_full.mean == pytest.approx(-2 / 7)
    assert (later.kept_text, later.kept_picture, later.kl, later.evict_ms) == (5, 15, 0.5, 10)
