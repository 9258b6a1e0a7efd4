"""`before` and `later` where pictures are read again for answers (specs with reread=…): asked in sessions, which do it.

The same as in protocols.py otherwise; records tell the cells and seconds of reading again as extra ones.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from edge_csp.bench.quality import cache
from edge_csp.bench.quality.reading import Asked, Pair, Reading, Record, Selection, chat_messages
from edge_csp.errors import BenchError
from edge_csp.session import Session


@contextmanager
def reading_again(session: Session, chosen: Selection) -> Iterator[list[Selection]]:
    """A second reading in a `with` block; afterwards the selection is there, with what it took."""
    counters = session.counters
    n_token, seconds = counters.n_reread_cell, counters.reread_s
    found: list[Selection] = []
    with session.second_reading():
        yield found
    extra_token = chosen.extra_token + counters.n_reread_cell - n_token
    extra_s = chosen.extra_s + counters.reread_s - seconds
    found.append(replace(chosen, extra_token=extra_token, extra_s=extra_s))


def ask_before(reading: Reading, pair: Pair) -> Iterator[Record]:
    """One eviction for all questions, each on its own."""
    every = [reading.asked(number) for number in range(len(reading.album.questions))]
    session = reading.read(pair[0].pruning())
    chosen, seconds = _evict(reading, session, pair, reading.n_token)
    for asked in every:
        session.prefill([*reading.messages, *chat_messages([asked.question])])
        yield _answer(reading, session, "before", chosen, asked, seconds)


def ask_later(reading: Reading, pair: Pair) -> Iterator[Record]:
    """The first question of every chat chooses the cells."""
    for chat in reading.chats.values():
        session = reading.read(pair[0].pruning(), chat[0].question)
        chosen, seconds = _evict(reading, session, pair, session.n_token)
        for asked in chat:
            if asked.turn:
                questions, answers = [one.question for one in chat], [one.said for one in chat]
                session.prefill([*reading.messages, *chat_messages(questions[: asked.turn + 1], answers[: asked.turn])])
            yield _answer(reading, session, "later", chosen, asked, seconds)


def _evict(reading: Reading, session: Session, pair: Pair, n_token: int) -> tuple[Selection, float]:
    (chosen,) = reading.select(session, [pair], n_token)
    began = time.perf_counter()
    if chosen.cells is not None and chosen.n_cell < reading.context.n_cell:
        reading.context.keep(chosen.cells)
    return chosen, time.perf_counter() - began


def _answer(
    reading: Reading, session: Session, protocol: str, chosen: Selection, asked: Asked, seconds: float
) -> Record:
    if session.counters.n_restart:
        raise BenchError(f"{asked.question.text!r} changes the prompt before it: the chat template cannot be measured")
    with reading_again(session, chosen) as selections:
        got = asked.answer(reading.context, cache.log_probs(reading.context), reading.n_predict)
    return asked.record(protocol, selections[0], got, seconds)
