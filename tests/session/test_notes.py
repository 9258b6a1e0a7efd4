"""What a session notes while it reads: the attention of all queries, and that of cues, which leave no trace."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_csp import Context, Pruning, Session, VisionModel, make_policy, parse_budget
from edge_csp.cues import CueTokens
from tests.session.test_session import GREEDY, ask, logits, picture

QUESTION = "What is in picture 2?"


@pytest.fixture(scope="module")
def model(demo_files: tuple[Path, Path]) -> Iterator[VisionModel]:
    with VisionModel(*demo_files, n_threads=1) as opened:
        yield opened


@pytest.fixture
def context(model: VisionModel) -> Iterator[Context]:
    with Context(model, n_ctx=768) as opened:
        yield opened


def chat(
    context: Context, policy: str, budget: str | None = None, cells: int | None = None, **settings: Any
) -> Session:
    pruning = Pruning(parse_budget(budget) if budget else None, make_policy(policy, **settings), cells)
    return Session(context, pruning=pruning, sampling=GREEDY)


def test_mass_is_the_attention_of_all_queries(model: VisionModel, context: Context) -> None:
    """Noted in batches of a window, against a window that holds all queries at once."""
    session = chat(context, "h2o")
    ask(session, QUESTION, picture(1), picture(2))
    session._pruner.note_mass()
    noted = session._pruner._noted["mass"]
    with Context(model, n_ctx=768, n_window=700) as whole:
        reference = chat(whole, "full")
        ask(reference, QUESTION, picture(1), picture(2))
        assert whole.n_cell == context.n_cell
        expected = whole.mass(whole.n_cell, 1.0)
    assert noted.shape == expected.shape
    assert np.abs(noted - expected).max() <= 2e-3 * expected.max()


def test_mass_follows_evictions_and_what_is_taken_back(context: Context) -> None:
    session = chat(context, "h2o", "40%")
    ask(session, QUESTION, picture(1), picture(2))
    session._pruner.note_mass()
    n_cell = context.n_cell
    assert session._pruner._noted["mass"].shape[-1] == n_cell
    assert session.counters.n_eviction == 1
    ask(session, "Which shape is in picture 1?")
    session.undo()
    ask(session, "Which digit is in picture 1?")
    session._pruner.note_mass()
    assert session._pruner._noted["mass"].shape[-1] == context.n_cell
    session.clear()
    assert session._pruner._noted["mass"].shape[-1] == 0


def test_cues_leave_no_trace(model: VisionModel) -> None:
    found = []
    for policy in ("quota", "quota+"):
        with Context(model, n_ctx=768) as context:
            session = chat(context, policy)
            answer = ask(session, QUESTION, picture(1), picture(2))
            found.append((answer, logits(context).tobytes(), context.n_cell, context.n_past, session.n_token))
    assert found[0] == found[1]
    assert session.counters.n_cue_token > 2 * 5
    assert session.counters.cue_s > 0
    assert session.counters.n_text_cell + session.counters.n_picture_cell == session.n_token


def test_cue_mass_is_that_of_the_cue(model: VisionModel, context: Context) -> None:
    session = chat(context, "quota+")
    session._pruner = session._pruner.replaced(replace(session.pruning, cue_predict=0))
    session.prefill([{"role": "user", "content": [{"type": "image", "picture": picture(3)}]}])
    noted = session._pruner._noted["cue"]
    with Context(model, n_ctx=768) as other:
        reference = chat(other, "full")
        reference.prefill([{"role": "user", "content": [{"type": "image", "picture": picture(3)}]}])
        end = next(i for i, item in enumerate(reference._items) if item.is_picture)
        n_cell = sum(item.n_cell for item in reference._items[: end + 1])
        assert other.truncate(n_cell)
        tokens = CueTokens(model, reference.template).of(Pruning().cues[0], 1)
        assert len(tokens) > 4
        other.decode_tokens(tokens)
        expected = other.mass(len(tokens), 1.0)[..., :n_cell]
    assert noted.shape[-1] == n_cell
    assert np.abs(noted - expected).max() <= 1e-4 * expected.max()


def test_cues_in_a_bounded_cache(context: Context) -> None:
    session = chat(context, "quota+", cells=256)
    answer = ask(session, QUESTION, *[picture(seed) for seed in range(6)])
    assert answer
    assert context.n_cell <= 256
    assert session.counters.n_restart == 0


def test_merging_changes_what_stays_and_nothing_else(model: VisionModel) -> None:
    rows = []
    for merge in ("none", "average"):
        with Context(model, n_ctx=768) as context:
            session = chat(context, "lookm", "30%", merge=merge)
            ask(session, QUESTION, picture(1), picture(2))
            rows.append((context.cells()[0], context.rows(0, "k"), context.rows(0, "v")))
    (pos, k, v), (merged_pos, merged_k, merged_v) = rows
    n_first = int(0.8 * min(pos.shape[-1], merged_pos.shape[-1]))  # cells from before the answer
    assert np.array_equal(pos[..., :n_first], merged_pos[..., :n_first])
    assert not np.array_equal(k[:, :n_first], merged_k[:, :n_first])
    assert not np.array_equal(v[:, :n_first], merged_v[:, :n_first])
