"""A bounded cache: it never overflows, says what it drops, and keeps what is pinned."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edge_csp.context
from edge_csp import Context, Pruning, Sampling, Session, VisionModel, make_policy, open_session, parse_budget
from edge_csp.errors import BudgetError, ContextError, NativeError, PolicyError
from edge_csp.native import IMAGE
from tests.session.test_session import GREEDY, ask, logits, picture

CELLS = 300


@pytest.fixture(scope="module")
def model(demo_files: tuple[Path, Path]) -> Iterator[VisionModel]:
    with VisionModel(*demo_files, n_threads=1) as opened:
        yield opened


class Watched(Context):
    """A context that remembers the most cells that were ever in use."""

    most = 0

    def decode_tokens(self, tokens: Any) -> None:
        super().decode_tokens(tokens)
        self.most = max(self.most, self.n_cell)

    def decode_picture(self, part: Any, embeddings: Any, **settings: Any) -> None:
        super().decode_picture(part, embeddings, **settings)
        self.most = max(self.most, self.n_cell)


@pytest.fixture
def context(model: VisionModel) -> Iterator[Watched]:
    with Watched(model, n_ctx=CELLS) as opened:
        yield opened


def bounded(context: Context, cells: int = CELLS, budget: str | None = None, **settings: Any) -> Session:
    pruning = Pruning(parse_budget(budget) if budget else None, cells=cells)
    return Session(context, pruning=pruning, **{"sampling": GREEDY, **settings})


@pytest.mark.parametrize("policy", ["csp", "random"])
def test_layers_are_chosen_in_groups_as_all_at_once(
    context: Watched, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the scores of a large cache never lie in memory as a whole."""
    chosen = []
    for observed in (1 << 18, 1):
        monkeypatch.setattr(edge_csp.context, "OBSERVED_CELLS", observed)
        chat = Session(context, pruning=Pruning(parse_budget("30%"), make_policy(policy)), sampling=GREEDY)
        ask(chat, "What is in picture 1?", *[picture(seed) for seed in range(3)])
        chosen.append(context.cells()[0])
        assert len(context.layer_groups()) == (1 if observed > 1 else 4)
        context.clear()
    assert np.array_equal(*chosen)


def test_a_prompt_of_any_length_fits(context: Watched) -> None:
    notices: list[str] = []
    chat = bounded(context, on_notice=notices.append)
    ask(chat, "What is in picture 1?", *[picture(seed) for seed in range(30)])
    use = chat.cache_use()
    assert use.n_token > 30 * 64
    assert use.n_cell <= context.most <= CELLS
    assert use.n_cell == pytest.approx(use.text_kept + sum(p.kept for p in use.pictures))
    assert chat.counters.n_evicted + use.n_cell == use.n_token
    assert f"the cache of {CELLS} cells was full while reading: evicted " in notices[0]
    assert len([notice for notice in notices if "reading" in notice]) == 1


def test_an_answer_of_any_length_fits(context: Watched) -> None:
    notices: list[str] = []
    sampling = Sampling(temperature=0, grammar='root ::= "a" root')
    chat = bounded(context, sampling=sampling, on_notice=notices.append)
    ask(chat, "What?", n_predict=3 * CELLS)
    assert (chat.finish_reason, chat.counters.n_generated) == ("length", 3 * CELLS)
    assert context.most <= CELLS
    assert "full while answering" in notices[0]


def test_text_only_prompts_fit(context: Watched) -> None:
    chat = bounded(context)
    ask(chat, "word " * 1000)
    assert chat.n_token > 1000
    assert context.most <= CELLS


def test_nothing_is_evicted_while_there_is_room(model: VisionModel, context: Watched) -> None:
    """With room to spare the logits are those of a plain context."""
    chat = bounded(context)
    chat.prefill([{"role": "user", "content": [{"type": "image", "picture": picture(1)}]}])
    assert chat.counters.n_eviction == 0
    with Context(model, n_ctx=CELLS, prune=False) as plain:
        other = Session(plain)
        other.prefill([{"role": "user", "content": [{"type": "image", "picture": picture(1)}]}])
        np.testing.assert_array_equal(logits(context), logits(plain))


def test_a_chat_that_fits_is_that_of_a_plain_context(model: VisionModel) -> None:
    """With the defaults: the answers and logits of ten turns, bit for bit; then it goes on where the other one ends."""
    found = []
    for prune in (True, False):
        with Context(model, n_ctx=1024, prune=prune) as context:
            chat, turns = Session(context, sampling=GREEDY), []
            for turn in range(10):
                pictures = [picture(turn)] if turn % 2 == 0 else []
                turns.append((ask(chat, "What is in picture 1?", *pictures), logits(context).tobytes()))
            assert (chat.counters.n_eviction, chat.n_token) == (0, context.n_cell)
            found.append(turns)
            if prune:
                ask(chat, "What is in picture 1?", *[picture(turn) for turn in range(20, 32)])
                assert chat.counters.n_eviction > 0
                assert (chat.counters.n_restart, chat.counters.n_turn) == (0, 11)
            else:
                with pytest.raises(ContextError, match="the context has 1024"):
                    ask(chat, "What is in picture 1?", *[picture(turn) for turn in range(20, 32)])
    assert found[0] == found[1]


@pytest.mark.parametrize("cells", [16, 48, CELLS])
def test_the_first_cell_stays(context: Watched, cells: int) -> None:
    """In every head, whatever the size of the cache and whatever is evicted how often."""
    chat = bounded(context, cells)
    for turn in range(4):
        ask(chat, "What is in picture 1?", picture(turn), picture(turn + 10))
        assert (context.cells()[0][..., 0] == 0).all()
    assert chat.counters.n_eviction > 4


def test_a_share_keeps_at_least_some_cells(model: VisionModel) -> None:
    """Below them, decoding gets no faster."""
    with Context(model, n_ctx=1024) as context:
        chat = Session(context, pruning=Pruning(parse_budget("20%"), min_cells=100), sampling=GREEDY)
        ask(chat, "What?", n_predict=2)
        assert chat.counters.n_eviction == 0
        ask(chat, "What is in picture 1?", picture(1), picture(2), n_predict=1)
        assert context.n_cell - chat.counters.n_generated <= 100 < chat.n_token


def test_evictions_are_few(context: Watched) -> None:
    """Each frees at least a quarter of the cache, less one batch of text."""
    chat = bounded(context)
    ask(chat, "What?", *[picture(seed) for seed in range(20)], n_predict=1)
    assert chat.counters.n_eviction <= 1.5 * chat.counters.n_evicted / (CELLS // 4)


def test_a_picture_larger_than_the_room_is_read_in_parts(context: Watched) -> None:
    chat = bounded(context, cells=48)
    ask(chat, "What is in picture 1?", picture(1), picture(2))
    assert context.most <= 48
    assert sum(p.kept for p in chat.cache_use().pictures) > 0


def test_a_failed_eviction_in_a_picture_starts_over(context: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_later(cells: np.ndarray) -> None:
        calls.append(1)
        if len(calls) > 2:
            raise NativeError("the device is gone", status=-5)
        keep(cells)

    calls: list[int] = []
    keep = context.keep
    chat = bounded(context, cells=48)
    with monkeypatch.context() as patch:
        patch.setattr(context, "keep", fail_later)
        with pytest.raises(NativeError, match="the device is gone"):
            ask(chat, "What is in picture 1?", picture(1), picture(2))
    assert (chat.n_token, context.n_cell, context.n_past) == (0, 0, 0)
    ask(chat, "What is in picture 1?", picture(1))
    assert chat.counters.n_turn == 1


def test_many_turns(context: Watched) -> None:
    chat = bounded(context)
    for turn in range(40):
        ask(chat, "Which digit is in picture 1?", *([picture(turn)] if turn % 4 == 0 else []), n_predict=8)
    assert chat.counters.n_turn == 40
    assert chat.counters.n_restart == 0
    assert chat.counters.n_text_cell + chat.counters.n_picture_cell == chat.n_token
    assert context.most <= CELLS


def test_a_budget_holds_in_a_bounded_cache(context: Watched) -> None:
    chat = bounded(context, budget="20%")
    stream = chat.ask("What is in picture 1?", [picture(seed) for seed in range(10)])
    next(stream)
    stream.close()
    assert context.n_cell == int(0.2 * chat.n_token)


def test_shares_are_enforced_when_it_pays(model: VisionModel) -> None:
    with Context(model, n_ctx=2048) as context:
        chat = Session(context, pruning=Pruning(parse_budget("50%")), sampling=GREEDY)
        ask(chat, "What?", *[picture(seed) for seed in range(8)], n_predict=1)
        for _ in range(8):
            stream = chat.ask("Which digit?", n_predict=4)
            next(stream)
            stream.close()
            assert context.n_cell <= chat.n_token / 2 * 16 / 15
        assert 1 < chat.counters.n_eviction < 8


def kept_of(chat: Session) -> list[float]:
    return [p.kept for p in chat.cache_use().pictures]


def test_pinned_pictures_stay(context: Watched) -> None:
    chat = bounded(context)
    ask(chat, "What is in picture 1?", picture(1), picture(2))
    chat.pin_picture(2)
    ask(chat, "What is in picture 3?", *[picture(seed) for seed in range(3, 12)])
    kept = kept_of(chat)
    assert kept[1] == 64
    assert all(n < 64 for i, n in enumerate(kept) if i != 1)
    assert [p.pinned for p in chat.cache_use().pictures] == [i == 1 for i in range(11)]
    chat.pin_picture(2, pinned=False)
    ask(chat, "What is in picture 12?", *[picture(seed) for seed in range(12, 18)])
    assert kept_of(chat)[1] < 64
    assert context.most <= CELLS


def test_pinned_pictures_of_the_prompt_stay(context: Watched) -> None:
    parts: list[dict[str, Any]] = [{"type": "image", "picture": picture(seed)} for seed in range(10)]
    parts[0]["pinned"] = True
    chat = bounded(context)
    list(chat.ask_parts([*parts, {"type": "text", "text": "What is in picture 1?"}]))
    assert kept_of(chat)[0] == 64


@pytest.mark.parametrize("restart", [False, True])
def test_pinned_turns_stay(context: Watched, restart: bool) -> None:
    """All cells of the turn stay in every layer and head; other text goes."""
    chat = bounded(context)
    ask(chat, "The code of Zed is 61 24.", n_predict=6)
    begin = chat.n_token
    ask(chat, "The code of Max is 12 34.", n_predict=6)
    end = chat.n_token
    chat.pin_turn(2)
    if restart:
        chat._forget_cells()
    ask(chat, "What is in picture 1?", *[picture(seed) for seed in range(10)])
    pos, _ = context.cells()
    stay = set.intersection(*map(set, pos.reshape(-1, pos.shape[-1]).tolist()))
    if restart:  # answers are tokenised anew: the ends may lie elsewhere
        begin, end = begin + 2, end - 2
    assert set(range(begin, end)) <= stay
    assert not set(range(begin)) <= stay


def test_the_system_message_can_be_pinned(context: Watched) -> None:
    chat = bounded(context, system="Look at this one.")
    chat.pin_turn(0)
    ask(chat, "What is in picture 1?", *[picture(seed) for seed in range(10)])
    chat.undo()
    assert chat.messages[0]["pinned"]


def test_pins_beyond_the_cache_are_an_error_that_loses_nothing(context: Watched) -> None:
    chat = bounded(context)
    ask(chat, "What?", picture(0), n_predict=2)
    messages = list(chat.messages)
    parts: list[dict[str, Any]] = [{"type": "image", "picture": picture(seed), "pinned": True} for seed in range(1, 6)]
    with pytest.raises(BudgetError, match=r"pinned turns and pictures take 256 cells, but only \d+ may stay"):
        list(chat.ask_parts([*parts, {"type": "text", "text": "What?"}]))
    assert chat.messages == messages
    list(chat.ask_parts([*parts[:2], {"type": "text", "text": "What?"}]))
    assert chat.counters.n_turn == 2
    assert kept_of(chat)[1:] == [64, 64]


def test_pins_beyond_the_budget_are_an_error(model: VisionModel) -> None:
    with Context(model, n_ctx=512) as context:
        chat = Session(context, pruning=Pruning(parse_budget("60")), sampling=GREEDY)
        part = {"type": "image", "picture": picture(1), "pinned": True}
        with pytest.raises(BudgetError, match="pinned turns and pictures take 64 cells, but only 60 may stay"):
            list(chat.ask_parts([part, {"type": "text", "text": "What is in picture 1?"}]))


def test_only_what_there_is_can_be_pinned(context: Watched) -> None:
    chat = bounded(context)
    ask(chat, "What?", picture(1), n_predict=1)
    with pytest.raises(ContextError, match="no picture 2: the conversation has 1"):
        chat.pin_picture(2)
    with pytest.raises(ContextError, match="no turn 3: the conversation has 1"):
        chat.pin_turn(3)


def test_the_policy_full_cannot_be_bounded(model: VisionModel, context: Watched) -> None:
    with pytest.raises(PolicyError, match="keeps everything"):
        Session(context, pruning=Pruning(policy=make_policy("full"), cells=CELLS))
    with Context(model, n_ctx=256, prune=False) as plain, pytest.raises(PolicyError, match="cannot hold"):
        bounded(plain)


def test_sizes_of_the_cache(demo_files: tuple[Path, Path]) -> None:
    prompt = [{"role": "user", "content": [{"type": "image", "picture": picture(seed)} for seed in range(4)]}]
    for cells, expected in (("100", 100), ("300KiB", 256), ("50%", 141)):
        with open_session(*demo_files, cells=cells, cells_of=prompt, n_threads=1) as session:
            assert session.pruning.cells == expected
            assert session.context.n_ctx == -(-expected // 256) * 256
    for cells in ("8", "100KiB", "1%"):
        with pytest.raises(ContextError, match=r"a cache of .* cells: it takes at least 16"):  # noqa: SIM117
            with open_session(*demo_files, cells=cells, cells_of=prompt):
                pass
    with pytest.raises(ContextError, match="no prompt"), open_session(*demo_files, cells="50%"):
        pass


@pytest.mark.parametrize("past_trained", ["continue", "stop"])
def test_the_trained_context(model: VisionModel, context: Watched, past_trained: str) -> None:
    notices: list[str] = []
    sampling = Sampling(temperature=0, grammar='root ::= "a" root')
    chat = bounded(context, sampling=sampling, past_trained=past_trained, on_notice=notices.append)
    n_trained = model.info.n_ctx_train
    ask(chat, "Okay " * (n_trained - 50), n_predict=100)
    beyond = [notice for notice in notices if "trained context" in notice]
    if past_trained == "stop":
        assert chat.finish_reason == "trained"
        assert context.n_past == n_trained
        assert not beyond
        with pytest.raises(ContextError, match=f"more than the trained context of {n_trained}"):
            ask(chat, "And now?")
        assert len(chat.messages) == 2
    else:
        assert chat.finish_reason == "length"
        assert context.n_past > n_trained
        ask(chat, "And now?", n_predict=5)
        beyond = [notice for notice in notices if "trained context" in notice]
        assert len(beyond) == 1
    with pytest.raises(ContextError, match="past_trained is 'never'"):
        bounded(context, past_trained="never")


def test_pictures_vote_for_their_own(context: Watched) -> None:
    """An eviction in the midst of pictures keeps picture cells in every layer and head."""
    chat = bounded(context)
    ask(chat, "What is in picture 1?", *[picture(seed) for seed in range(12)], n_predict=1)
    _, tag = context.cells()
    assert ((tag == IMAGE).sum(axis=-1) > 0).all()
