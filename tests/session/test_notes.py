"""What a session notes while it reads: the attention of all queries, and that of rehearsals, which leave no trace."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_csp import Context, Pruning, Session, VisionModel, make_policy, parse_budget
from edge_csp.errors import ModelError
from edge_csp.rehearsal import CUES, cues_of
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


def read(session: Session, *seeds: int, text: str = QUESTION) -> None:
    parts: list[dict[str, Any]] = [{"type": "image", "picture": picture(seed)} for seed in seeds]
    session.prefill([{"role": "user", "content": [*parts, {"type": "text", "text": text}]}])


def test_a_rehearsal_leaves_no_trace(model: VisionModel) -> None:
    """Neither before the first token of an answer, which may come from the logits of before, nor after it."""
    found = []
    for policy in ("blend", "blend+"):
        with Context(model, n_ctx=768) as context:
            session = chat(context, policy)
            read(session, 1, 2)
            session.select(60)
            before = logits(context).tobytes(), context.n_cell, context.n_past, session.n_token
            found.append((before, "".join(session.generate(n_predict=8)), logits(context).tobytes()))
    assert found[0] == found[1]
    assert session.counters.n_rehearsed > session.n_token - 2 * 64
    assert session.counters.rehearse_s > 0
    assert session.counters.n_text_cell + session.counters.n_picture_cell == session.n_token


def test_a_rehearsal_keeps_the_scores_of_the_window(context: Context) -> None:
    """The window is gone after it; a second selection sees the same."""
    session = chat(context, "blend+")
    read(session, 1, 2)
    expected = context.scores(32, 1.0)
    first = session.select(60)
    n_rehearsed = session.counters.n_rehearsed
    assert not np.array_equal(context.scores(32, 1.0), expected)
    assert session._pruner._seen is not None
    np.testing.assert_array_equal(session._pruner._seen[1], expected)
    assert np.array_equal(session.select(60), first)
    assert session.counters.n_rehearsed == n_rehearsed


def test_repeated_is_the_attention_of_the_text_read_again(model: VisionModel, context: Context) -> None:
    """Against a context that reads it in one go, with a window for all of it."""
    session = chat(context, "blend+")
    read(session, 3)
    tokens = [item.key for item in session._items if isinstance(item.key, int)]
    n_cell = context.n_cell
    session.select(60)
    noted = session._pruner._noted["repeated"]
    with Context(model, n_ctx=768, n_window=len(tokens)) as other:
        read(chat(other, "full"), 3)
        lead = session._rehearsal._repeat_tokens()
        for begin in range(0, len(lead), 32):
            other.decode_tokens(lead[begin : begin + 32])
        other.decode_tokens(tokens)
        most = np.zeros_like(noted)
        for end in range(len(tokens), 0, -32):  # the last queries, less those before them
            begin = (end - 1) // 32 * 32
            rest = other.mass(len(tokens) - end, 1.0) if end < len(tokens) else 0
            mass = (other.mass(len(tokens) - begin, 1.0) - rest) / (end - begin)
            most = np.maximum(most, mass[..., :n_cell])
    assert noted.shape[-1] == n_cell
    assert np.abs(noted - most).max() <= 2e-3 * most.max()


def test_described_is_the_attention_of_a_cue(model: VisionModel, context: Context) -> None:
    session = chat(context, "blend+")
    session._pruner = session._pruner.replaced(replace(session.pruning, cue_predict=0))
    read(session, 3)
    session.select(60)
    noted = session._pruner._noted["described"]
    with Context(model, n_ctx=768) as other:
        read(chat(other, "full"), 3)
        n_cell = other.n_cell
        tokens = session._rehearsal.cue_tokens(CUES[0], 1)
        assert len(tokens) > 4
        other.decode_tokens(tokens)
        expected = other.mass(len(tokens), 1.0)[..., :n_cell]
    assert np.abs(noted - expected).max() <= 1e-4 * expected.max()


def test_an_interrupted_rehearsal_leaves_no_cells(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    session = chat(context, "blend+")
    read(session, 1, 2)
    before = context.n_cell, context.n_past
    mass, calls = context.mass, []

    def interrupted(*arguments: Any) -> np.ndarray:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return mass(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(context, "mass", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.select(60)
    assert (context.n_cell, context.n_past) == before
    session.select(60)
    assert session._pruner._noted["described"].any()


def test_cues_come_with_the_model(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    assert cues_of(model) == CUES
    (tmp_path / "other.cues").write_text("desc #{n}?\n\n And {n}? \n", encoding="utf-8")
    assert cues_of(tmp_path / "other.gguf") == ("desc #{n}?", "And {n}?")
    for number, data in enumerate((b"\n \n", b"\xff\xfe")):
        (tmp_path / f"{number}.cues").write_bytes(data)
        with pytest.raises(ModelError, match=rf"{number}\.cues (holds no cue|cannot be read)"):
            cues_of(tmp_path / f"{number}.gguf")


def test_other_cues_look_elsewhere(context: Context) -> None:
    noted = []
    for cues in ((), ("Which digit is in picture {n}?",)):
        context.clear()
        session = chat(context, "blend+")
        session.pruning = replace(session.pruning, cues=cues)
        read(session, 3)
        session.select(60)
        noted.append(session._pruner._noted["described"])
    assert not np.array_equal(*noted)


def test_only_what_is_new_is_rehearsed(context: Context) -> None:
    session = chat(context, "blend+", "50%")
    session.pruning = replace(session.pruning, min_cells=0)
    read(session, 1, 2)
    session.prune()
    first = session.counters.n_rehearsed
    assert context.n_cell == session.n_token // 2
    ask(session, "Which shape is in picture 1?")
    session.prune()
    n_new = session.n_token - session._prompts[0].n_item
    assert first < session.counters.n_rehearsed <= first + n_new + 64
    assert session._pruner._noted["repeated"].shape[-1] == context.n_cell


def test_rehearsals_in_a_bounded_cache(context: Context) -> None:
    """There is always room for them, and they never go over the bound."""
    session = chat(context, "blend+", cells=256)
    answer = ask(session, QUESTION, *[picture(seed) for seed in range(6)])
    assert answer
    assert session.counters.n_rehearsed > 0
    assert context.n_cell <= session.n_cell_max == 192
    assert session.counters.n_restart == 0


def test_a_tiny_cache_goes_without_rehearsals(context: Context) -> None:
    session = chat(context, "blend+", cells=48)
    ask(session, QUESTION, picture(1), picture(2))
    assert context.n_cell <= session.n_cell_max == 48


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
