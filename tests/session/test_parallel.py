"""Several conversations in one context: each is pruned on its own, as if it were alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_csp import Context, Pruning, Session, VisionModel, make_policy, parse_budget
from edge_csp.errors import ContextError
from tests.session.test_session import GREEDY, ask, picture

PRUNINGS = [Pruning(), Pruning(parse_budget("25%"), min_cells=0), Pruning(cells=256)]


@pytest.fixture(scope="module")
def model(demo_files: tuple[Path, Path]) -> Iterator[VisionModel]:
    with VisionModel(*demo_files, n_threads=1) as opened:
        yield opened


def turns(number: int) -> list[tuple[str, list[int]]]:
    """Questions of a conversation, and the pictures that come with them."""
    first = 100 * number
    return [
        ("What is in picture 1?", [first, first + 1, first + 2]),
        ("Which digit is in picture 2?", []),
        ("What color is the shape in picture 4?", [first + 3, first + 4]),
    ]


def test_interleaved_conversations_are_those_alone(model: VisionModel) -> None:
    """Same answers, same cells, while the others are read, answered, pruned and cleared in between."""
    alone = []
    for number, pruning in enumerate(PRUNINGS):
        with Context(model, n_ctx=512) as context:
            chat = Session(context, pruning=pruning, sampling=GREEDY)
            answers = [ask(chat, text, *map(picture, seeds)) for text, seeds in turns(number)]
            alone.append((answers, chat.cache_use(), context.n_past))
    with Context(model, n_ctx=512, n_seq=4) as shared:
        *contexts, other = shared.sequences()
        chats = [Session(context, pruning=p, sampling=GREEDY) for context, p in zip(contexts, PRUNINGS, strict=True)]
        noise = Session(other, pruning=Pruning(cells=64), sampling=GREEDY)
        said: list[list[str]] = [[] for _ in chats]
        for turn in range(3):
            streams = []
            for number, chat in enumerate(chats):
                text, seeds = turns(number)[turn]
                streams.append(chat.ask(text, list(map(picture, seeds)), n_predict=12))
            for answers, stream in zip(said, streams, strict=True):
                answers.append("".join(stream))
                ask(noise, "What?", picture(turn), n_predict=3)
            noise.clear()
        for answers, chat, expected in zip(said, chats, alone, strict=True):
            assert (answers, chat.cache_use(), chat.context.n_past) == expected
        assert other.n_cell == 0


def test_answers_may_alternate(model: VisionModel) -> None:
    """One token of each conversation in turn gives what each gives alone."""
    with Context(model, n_ctx=512, n_seq=2) as context:
        chats = [Session(one, pruning=Pruning(parse_budget("40%")), sampling=GREEDY) for one in context.sequences()]
        alone = [ask(chat, "What is in picture 1?", picture(number)) for number, chat in enumerate(chats)]
        for chat in chats:
            chat.clear()
        streams = [chat.ask("What is in picture 1?", [picture(n)], n_predict=12) for n, chat in enumerate(chats)]
        said = ["", ""]
        for pieces in iter(lambda: [next(stream, "") for stream in streams], ["", ""]):
            said = [text + piece for text, piece in zip(said, pieces, strict=True)]
        assert said == alone


def test_each_sequence_has_its_own_cells(model: VisionModel) -> None:
    with Context(model, n_ctx=256, n_seq=3) as context:
        first, second, _ = context.sequences()
        assert (first.n_ctx, second.n_ctx) == (256, 256)
        ask(Session(first, sampling=GREEDY), "Okay " * 100, n_predict=1)
        with pytest.raises(ContextError, match="the context has 256"):
            ask(Session(second, sampling=GREEDY, pruning=Pruning(policy=make_policy("full"))), "Okay " * 300)
        ask(Session(second, sampling=GREEDY), "Okay " * 200, n_predict=1)
        assert first.n_cell < second.n_cell


def test_the_number_of_sequences_has_limits(model: VisionModel) -> None:
    for n_seq in (0, 10_000):
        with pytest.raises(ContextError, match=f"{n_seq} sequences were asked for; a context has 1 to"):
            Context(model, n_ctx=256, n_seq=n_seq)
