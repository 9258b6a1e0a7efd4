"""Pictures that are read again for an answer: it is right, told, and nothing of it is left afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_csp import Context, Pruning, Sampling, Session, VisionModel, make_policy, parse_budget
from edge_csp.bench.quality.albums import Album, draw_album
from edge_csp.errors import PolicyError
from edge_csp.policy import FullPolicy
from tests.session.test_bounded import Watched
from tests.session.test_session import GREEDY, ask, logits

SAME = Sampling(temperature=0, grammar='root ::= "A red circle."')
"""So that conversations are the same, whatever the model sees."""


@pytest.fixture(scope="module")
def model(demo_files: tuple[Path, Path]) -> Iterator[VisionModel]:
    with VisionModel(*demo_files, n_threads=1) as opened:
        yield opened


@pytest.fixture
def context(model: VisionModel) -> Iterator[Watched]:
    with Watched(model, n_ctx=1024) as opened:
        yield opened


@pytest.fixture(scope="module")
def album() -> Album:
    return draw_album(0, 8, 4, 3)


def opened(context: Context, reread: float, policy: str = "random", **settings: Any) -> Session:
    pruning = Pruning(parse_budget("10%"), make_policy(policy), reread=reread)
    return Session(context, pruning=pruning, **{"sampling": SAME, **settings})


def show(session: Session, album: Album, text: str = "What is in picture 1?") -> str:
    return "".join(session.ask_parts([*album.messages[0]["content"], {"type": "text", "text": text}]))


def evict_pictures(session: Session) -> None:
    """All cells of every picture go but for the first one."""
    cells: list[int] = []
    begin = 0
    for item in session._items:
        cells += range(begin, begin + (1 if item.is_picture else item.n_cell))
        begin += item.n_cell
    kept = np.zeros((session.model.info.n_layer, session.context.n_head_kv, len(cells)), np.int32)
    session.context.keep(kept + np.array(cells, np.int32))


@pytest.mark.parametrize("number", [5, 6])
def test_a_picture_that_is_gone_is_read_again(context: Watched, album: Album, number: int) -> None:
    question, notices, answers = f"Which digit is in picture {number}?", list[str](), list[str]()
    for reread, is_gone in ((0.0, False), (0.0, True), (0.1, True)):
        context.clear()
        pruning = Pruning(policy=FullPolicy(), reread=reread)
        chat = Session(context, pruning=pruning, sampling=GREEDY, on_notice=notices.append)
        show(chat, album)
        if is_gone:
            evict_pictures(chat)
        assert notices == []
        n_encoded = chat.model.n_encoded
        answers.append(ask(chat, question))
        assert (chat.model.n_encoded, chat.counters.n_restart) == (n_encoded, 0)
    whole, pruned, again = answers
    assert again == whole != pruned
    assert len(notices) == 1
    assert f"picture {number}" in notices[0].replace("pictures", "picture")
    assert "read again" in notices[0]
    assert "2% of the cells were left" in notices[0]
    assert chat.counters.n_reread >= 1
    assert chat.counters.n_reread_cell > 64


@pytest.mark.parametrize("policy", ["random", "h2o", "blend+"])
def test_afterwards_everything_is_as_without(context: Watched, album: Album, policy: str) -> None:
    """Cells, items, pins and counters, after a turn that read pictures again and after the next one."""
    known = []
    for reread in (0.0, 0.02):
        context.clear()
        chat = opened(context, reread, policy)
        show(chat, album)
        chat.pin_picture(2)
        assert chat.counters.n_reread == 0  # all was there when the question was read
        ask(chat, "What is in picture 3?")
        seen = [chat._items, chat._text, chat._prompts, chat._ends, chat._pins, chat.n_token, context.n_past]
        seen += [context.cells()[0].tolist(), logits(context), chat.counters.n_encoded]
        ask(chat, "What is in picture 4?")
        counters = chat.counters
        assert (counters.n_restart, counters.n_turn) == (0, 3)
        assert (counters.n_reread > 0) == (counters.n_reread_cell > 64) == (reread > 0)
        seen += [chat._items, context.n_cell, counters.n_text_cell, counters.n_picture_cell, counters.n_evicted]
        known.append([*seen, counters.n_generated, counters.n_eviction])
    for without, after in zip(*known, strict=True):
        if isinstance(without, np.ndarray):  # the answer was evaluated in one batch
            np.testing.assert_allclose(after, without, atol=2e-2)
        else:
            assert after == without


def test_while_the_answer_comes(context: Watched, album: Album) -> None:
    """What is told of the cache is that of the conversation; an answer that is closed leaves it so."""
    chat = opened(context, 0.02, sampling=Sampling(temperature=0, grammar='root ::= "a" root'))
    list(chat.ask_parts([*album.messages[0]["content"], {"type": "text", "text": "What?"}], n_predict=2))
    answer = chat.ask("What is in picture 3?", n_predict=20)
    next(answer), next(answer)
    assert chat.counters.n_reread
    use, turns = chat.cache_use(), chat.kept_turns()
    assert use.n_cell == chat.n_cell < context.n_cell - 64
    assert use.n_cell == pytest.approx(use.text_kept + sum(p.kept for p in use.pictures))
    assert use.text_kept == pytest.approx(sum(turn.kept for turn in turns) + 1)  # and the answer has a cell
    said = len(chat._items)
    answer.close()
    assert chat.n_cell == context.n_cell == use.n_cell
    assert context.n_past == sum(item.n_pos for item in chat._items)
    assert len(chat._items) == said
    assert chat.messages[-1]["content"] == "aa"
    ask(chat, "What is in picture 4?", n_predict=3)
    assert chat.counters.n_restart == 0


def test_a_prompt_in_the_midst_of_an_answer(context: Watched, album: Album) -> None:
    chat = opened(context, 0.02)
    show(chat, album)
    messages = [*chat.messages, {"role": "user", "content": "What is in picture 3?"}]
    chat.prefill(messages)
    chat.prune()
    answer = chat.generate()
    next(answer)
    assert chat.n_cell < context.n_cell
    chat.prefill(messages)
    assert chat.n_cell == context.n_cell
    assert context.n_past == sum(item.n_pos for item in chat._items)


def test_undo(context: Watched, album: Album) -> None:
    chat = Session(context, pruning=Pruning(policy=FullPolicy(), reread=0.1), sampling=GREEDY)
    show(chat, album)
    evict_pictures(chat)
    first, n_reread, n_cell = ask(chat, "Which digit is in picture 6?"), chat.counters.n_reread, context.n_cell
    assert chat.undo()
    assert ask(chat, "Which digit is in picture 6?") == first
    assert (chat.counters.n_reread, chat.counters.n_restart, context.n_cell) == (2 * n_reread, 0, n_cell)


def test_what_does_not_fit_is_told(model: VisionModel, album: Album) -> None:
    with Context(model, n_ctx=768) as context:
        notices: list[str] = []
        chat = opened(context, 0.02, on_notice=notices.append)
        show(chat, album)
        chat.pruning = Pruning(policy=FullPolicy(), reread=0.02)
        ask(chat, "word " * ((context.n_ctx - context.n_cell - 100) // 5))
        assert chat.counters.n_reread == 0
        notices.clear()
        ask(chat, "What is in picture 3?")
        assert chat.counters.n_reread == 0
        assert len(notices) == 1
        assert "could not be read again, of which " in notices[0]
        assert "there is room for " in notices[0]


@pytest.mark.parametrize(("cells", "fits"), [(400, True), (120, False)])
def test_bounded(model: VisionModel, album: Album, cells: int, fits: bool) -> None:
    notices: list[str] = []
    with Watched(model, n_ctx=cells) as context:
        pruning = Pruning(policy=make_policy("random"), cells=cells, reread=0.05)
        endless = Sampling(temperature=0, grammar='root ::= "a" root')
        chat = Session(context, pruning=pruning, sampling=endless, on_notice=notices.append)
        for part in album.messages[0]["content"]:
            list(chat.ask_parts([part, {"type": "text", "text": "What is in picture 1?"}], n_predict=3))
        list(chat.ask("What is in picture 2?", n_predict=2 * cells))  # it goes on where the second reading had to go
        assert chat.finish_reason == "length"
        assert context.most <= cells
        assert chat.counters.n_restart == 0
        assert (chat.counters.n_reread > 0) == fits
        assert any("could not be read again" in notice for notice in notices) == (not fits)
        assert chat.counters.n_text_cell + chat.counters.n_picture_cell == chat.n_token
        assert context.n_past == sum(item.n_pos for item in chat._items)


def test_a_share_of_attention() -> None:
    with pytest.raises(PolicyError, match="reread is 2"):
        Pruning(reread=2)
