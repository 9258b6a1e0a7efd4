"""When cells are evicted, and what is asked then. Every protocol compares with the full cache on the same questions.

window   The album and the question are read, then cells are evicted; the last token of the prompt is read again from
         what is left. So the question chose the cells, and every token of the answer comes from them.
first    As the runtime does it: the album and the question are read, which gives the first token of the answer; then
         cells are evicted, and the rest comes from what is left.
before   The album is read and pruned; then questions come, each on its own.
later    As `first`, then further questions in the same chat, without another eviction. The answers in the chat are
         those of the full cache, so that all policies are asked the same.
continue Text is read and pruned; then it goes on, and all that is asked is what comes next (continuing.py).
bounded  A long conversation in a bounded cache, which evicts while it reads; a picture arrives, a question about it
         follows, then one about something older. The answers in the chat are again those of the full cache.

The eviction is chosen by a session with everything that belongs to it, on a cache that has just been read. All policies
and budgets choose from it, before any cell goes; then the cache is put back for each of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from edge_csp.bench.quality import again, cache, downsample
from edge_csp.bench.quality.albums import Album
from edge_csp.bench.quality.cache import State
from edge_csp.bench.quality.continuing import Continuing
from edge_csp.bench.quality.reading import (
    FULL,
    Asked,
    Measured,
    Pair,
    Reading,
    Record,
    Selection,
    ask_full,
    chat_numbers,
    read_again,
    turn_messages,
)
from edge_csp.bench.quality.specs import Spec, groups
from edge_csp.budget import MIN_CELLS, Budget
from edge_csp.context import Context
from edge_csp.errors import BenchError
from edge_csp.policy.base import IntArray
from edge_csp.session import Session

PROTOCOLS = ("window", "first", "before", "later", "bounded")
EVERY = ("continue", *PROTOCOLS)
"""With the one that has no questions."""


@dataclass(frozen=True)
class Plan:
    """What to measure on an album. wanted: tells of a protocol, a policy, a budget (as written) and the number of a
    question whether that answer is still missing.
    """

    specs: Sequence[Spec]
    budgets: Sequence[Budget]
    protocols: Collection[str]
    n_predict: int
    wanted: Callable[[str, str, str, int], bool]

    def lacks(self, pair: Pair, numbers: Mapping[str, Sequence[int]]) -> bool:
        """True if an answer to one of these questions, by protocol, is missing."""
        spec, budget = pair
        return any(
            protocol in self.protocols and self.wanted(protocol, spec.text, budget.text, number)
            for protocol, questions in numbers.items()
            for number in questions
        )

    def pairs(self, specs: Sequence[Spec], numbers: Mapping[str, Sequence[int]]) -> list[Pair]:
        every = [(spec, budget) for spec in specs for budget in self.budgets]
        return [pair for pair in every if self.lacks(pair, numbers)]


def measure(context: Context, album: Album, plan: Plan) -> Iterator[Measured]:
    """Every answer that is missing on an album."""
    for record in _measure(context, album, plan):
        if plan.wanted(record.protocol, record.policy, record.budget, record.question):
            yield record


def _measure(context: Context, album: Album, plan: Plan) -> Iterator[Measured]:
    if album.passage and "continue" in plan.protocols:
        yield from go_on(context, album, plan)
    if album.questions and set(plan.protocols) - {"bounded", "continue"}:
        reading = Reading(context, album, plan.n_predict)
        for group in groups(plan.specs):
            now = replace(plan, protocols=set(plan.protocols) - {"before", "later"}) if group[0].rereads else plan
            yield from ask_now(reading, now, group)
            yield from ask_before(reading, now, group)
        for spec in plan.specs:
            if spec.policy is None:
                yield from ask_downsampled(reading, plan, spec)
            if spec.rereads:
                yield from ask_again(reading, plan, spec)
    if album.turns and "bounded" in plan.protocols:
        yield from ask_bounded(context, album, plan)


def go_on(context: Context, album: Album, plan: Plan) -> Iterator[Measured]:
    """`continue`: the passage is read and pruned, and its continuation given."""
    assert album.passage
    pairs = [plan.pairs(group, {"continue": [0]}) for group in groups(plan.specs)]
    if any(pairs):
        passage = Continuing(context, album.passage)
        for some in filter(None, pairs):
            yield from passage.measure(some)


def ask_now(reading: Reading, plan: Plan, group: Sequence[Spec]) -> Iterator[Record]:
    """`window`, `first` and `later`: the question chooses what stays."""
    n_question = len(reading.album.questions)
    chats = {numbers[0]: numbers for numbers in chat_numbers(n_question)}
    for number in range(n_question):
        later: Sequence[int] = chats.get(number, ())
        pairs = plan.pairs(group, {"window": [number], "first": [number], "later": later})
        if not pairs:
            continue
        asked = reading.asked(number)
        selections = _choose_now(reading, asked, pairs)
        state = reading.before_last(asked)
        for chosen in selections:
            pair = chosen.spec, chosen.budget
            if plan.lacks(pair, {"window": [number]}):
                yield ask_window(reading, state, chosen, asked)
            if plan.lacks(pair, {"first": [number]}):
                yield next(ask_first(reading, state, chosen, "first", [asked]))
            if plan.lacks(pair, {"later": later}):
                yield from ask_first(reading, state, chosen, "later", reading.chats[number])


def _choose_now(reading: Reading, asked: Asked, pairs: Sequence[Pair]) -> list[Selection]:
    """With the album and the question in the cache."""
    n_token = reading.n_token + len(asked.tail)
    session = reading.read(pairs[0][0].pruning(), asked.question)
    if session.n_token != n_token:
        raise BenchError(f"{asked.question.text!r} changes the prompt before it: the chat template cannot be measured")
    return reading.select(session, pairs, n_token)


def ask_window(reading: Reading, before_last: State, chosen: Selection, asked: Asked) -> Record:
    context = reading.context
    cache.restore(context, chosen.merged or before_last)
    if chosen.merged:
        cache.rewind(context, before_last.n_past)
    seconds = _keep(context, None if chosen.cells is None else chosen.cells[..., :-1])
    got = asked.answer(context, cache.decode(context, asked.tail[-1:]), reading.n_predict)
    return asked.record("window", chosen, got, seconds)


def ask_first(
    reading: Reading, before_last: State, chosen: Selection, protocol: str, chat: Sequence[Asked]
) -> Iterator[Record]:
    """The first question of the chat chose the cells."""
    context = reading.context
    cache.restore(context, before_last)
    now = cache.decode(context, chat[0].tail[-1:])
    if chosen.merged:
        cache.restore(context, chosen.merged)
    seconds = _keep(context, chosen.cells)
    for asked in chat:
        if asked.turn:
            now = cache.decode(context, asked.tail)
        got = asked.answer(context, now, reading.n_predict)
        yield asked.record(protocol, chosen, got, seconds)


def ask_before(reading: Reading, plan: Plan, group: Sequence[Spec]) -> Iterator[Record]:
    """One eviction for all questions."""
    context, numbers = reading.context, range(len(reading.album.questions))
    pairs = plan.pairs(group, {"before": numbers})
    if not pairs:
        return
    every = [reading.asked(number) for number in numbers]
    for chosen in reading.select(reading.read(pairs[0][0].pruning()), pairs, reading.n_token):
        cache.restore(context, chosen.merged or reading.state)
        seconds = _keep(context, chosen.cells)
        for asked in every:
            got = asked.answer(context, cache.decode(context, asked.tail), reading.n_predict)
            cache.rewind(context, reading.state.n_past)
            yield asked.record("before", chosen, got, seconds)


def ask_again(reading: Reading, plan: Plan, spec: Spec) -> Iterator[Record]:
    """`before` and `later`, where pictures are read again."""
    for pair in plan.pairs([spec], {"before": range(len(reading.album.questions))}):
        yield from again.ask_before(reading, pair)
    later = [asked.number for chat in reading.chats.values() for asked in chat] if "later" in plan.protocols else []
    for pair in plan.pairs([spec], {"later": later}):
        yield from again.ask_later(reading, pair)


def _keep(context: Context, cells: IntArray | None) -> float:
    """Evict all others; seconds."""
    began = time.perf_counter()
    if cells is not None and cells.shape[2] < context.n_cell:
        context.keep(cells)
    return time.perf_counter() - began


def ask_downsampled(reading: Reading, plan: Plan, spec: Spec) -> Iterator[Record]:
    """Fewer picture tokens, as many as fit into the cells of a budget beside all text, and at least one of a picture.
    Nothing is evicted: the protocols differ in the budget and in what was asked before.
    """
    numbers, protocols = range(len(reading.album.questions)), set(plan.protocols) - {"bounded", "continue"}
    if not plan.pairs([spec], dict.fromkeys(protocols, numbers)):
        return
    context, album = reading.context, downsample.Shrunk(reading)
    for protocol in (name for name in PROTOCOLS if name in protocols):
        every = reading.chats.values() if protocol == "later" else [[reading.asked(number)] for number in numbers]
        for chat in every:
            n_tail = 0 if protocol == "before" else len(chat[0].tail)
            for _, budget in plan.pairs([spec], {protocol: [asked.number for asked in chat]}):
                n_token = reading.n_token + n_tail
                n_budget = budget.cells(n_token, context.bytes_per_cell)
                kept, seconds = album.read(n_budget - n_tail)
                n_cell = round(kept.text + kept.picture) + n_tail
                chosen = Selection(spec, budget, None, n_token, n_budget, n_cell, kept, extra_s=seconds)
                for asked in chat:
                    now = cache.decode(context, asked.tail)
                    got = asked.answer(context, now, reading.n_predict)
                    yield asked.record(protocol, chosen, got)


def ask_bounded(context: Context, album: Album, plan: Plan) -> Iterator[Record]:
    """Sessions as a user has them; only their answers are read here, and taken back."""
    numbers = {"bounded": range(len(album.turns))}
    pairs = [pair for pair in plan.pairs(plan.specs, numbers) if pair[0].policy is not None]
    if not pairs:
        return
    every, n_token = _full_turns(context, album, plan.n_predict)
    for spec, budget in pairs:
        n_budget = max(MIN_CELLS, budget.cells(n_token, context.bytes_per_cell))
        context.clear()
        session = Session(context, pruning=spec.pruning(None if spec.keeps_all else n_budget))
        for asked in every:
            before = replace(session.counters)
            messages = turn_messages(album, asked.number + 1, every)
            session.prefill(messages)
            session.prune()
            _, tags = context.cells()
            chosen = Selection(
                spec,
                budget,
                None,
                session.n_token,
                n_budget,
                tags.shape[2],
                cache.kept(tags),
                seconds=session.counters.evict_s - before.evict_s,
                extra_token=(n_extra := session.counters.n_rehearsed - before.n_rehearsed),
                extra_s=session.counters.rehearse_s - before.rehearse_s if n_extra else 0.0,
                extra_picture=sum(part["type"] == "image" for part in album.turns[asked.number].parts)
                if n_extra
                else 0,
            )
            with again.reading_again(session, chosen) as selections:
                got = asked.answer(context, cache.log_probs(context), plan.n_predict)
            # the next eviction may look at the window, which the answer was in
            n_evaluated = len(asked.begun) + len(asked.full.tokens)
            if n_evaluated > context.n_window // 2 or "mass" in spec.pruning().policy.needs:
                read_again(context, session.template.render(messages))
            yield asked.record("bounded", selections[0], got)


def _full_turns(context: Context, album: Album, n_predict: int) -> tuple[list[Asked], int]:
    """The conversation with the full cache, and the cells that it fills."""
    context.clear()
    session = Session(context, pruning=FULL)
    every: list[Asked] = []
    for number, turn in enumerate(album.turns):
        messages = turn_messages(album, number + 1, every)
        session.prefill(messages)
        now, prompt = cache.log_probs(context), session.template.render(messages)
        every.append(ask_full(context, turn.question, (), now, n_predict, prompt=prompt, number=number, turn=number))
    return every, session.n_token
