"""When cells are evicted, and what is asked then. Every protocol compares with the full cache on the same questions.

window   The album and the question are read, then cells are evicted; the last token of the prompt is read again from
         what is left. So the question chose the cells, and every token of the answer comes from them.
first    As the runtime does it: the album and the question are read, which gives the first token of the answer; then
         cells are evicted, and the rest comes from what is left.
before   The album is read and pruned; then questions come, each on its own.
later    As `first`, then further questions in the same chat, without another eviction. The answers in the chat are
         those of the full cache, so that all policies are asked the same.
bounded  A long conversation in a bounded cache, which evicts while it reads; a picture arrives, a question about it
         follows, then one about something older. The answers in the chat are again those of the full cache.

The eviction is chosen by a session with everything that belongs to it, on a cache that has just been read. All policies
and budgets choose from it, before any cell goes; then the cache is put back for each of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from edge_csp.bench.quality import cache, downsample
from edge_csp.bench.quality.albums import Album, Question
from edge_csp.bench.quality.cache import Answer, Floats, Kept, Reference, State
from edge_csp.bench.quality.specs import Spec, groups, n_window
from edge_csp.budget import Budget
from edge_csp.chat import MEDIA_MARKER, Message
from edge_csp.context import Context
from edge_csp.errors import BenchError, TemplateError
from edge_csp.items import items_of
from edge_csp.model import TokenPart, VisionModel
from edge_csp.policy import FullPolicy
from edge_csp.policy.base import IntArray
from edge_csp.pruning import Pruning
from edge_csp.session import MIN_CELLS, Session

PROTOCOLS = ("window", "first", "before", "later", "bounded")
N_CHAT = 8
"""Questions of a chat in `later`: the first one chooses the cells."""
TURN = 32
"""Tokens that a template may add to a turn, at most; cells are set aside for them."""
ACKNOWLEDGEMENT = "Okay."
"""Said by the assistant between album and question, where the template refuses two messages of the user in a row."""


@dataclass(frozen=True)
class Record:
    """An answer. n_token: cells without pruning, when cells were evicted. n_budget: of them, those that may stay;
    n_cell: those that did; kept_text and kept_picture: of these, means over layers and KV heads. turn: of the chat. evict_s: seconds of choosing and moving
    the cells that the answer came from. extra_token, extra_s: what was run besides to choose them.
    """

    protocol: str
    policy: str
    budget: str
    question: int
    turn: int
    kind: str
    n_token: int
    n_budget: int
    n_cell: int
    kept_text: float
    kept_picture: float
    answer: str
    full: str
    right: bool
    full_right: bool
    same: bool
    kl: float
    evict_s: float
    extra_token: int = 0
    extra_s: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return {name: round(value, 6) if isinstance(value, float) else value for name, value in asdict(self).items()}


Wanted = Callable[[str, str, str, int], bool]
"""Of a protocol, a policy, a budget and the number of a question: whether that answer is still missing."""


@dataclass(frozen=True)
class Plan:
    """What to measure on an album."""

    specs: Sequence[Spec]
    budgets: Sequence[Budget]
    protocols: Sequence[str]
    n_predict: int
    wanted: Wanted

    def missing(self, protocols: Sequence[str], spec: Spec, budget: Budget, question: int) -> list[str]:
        """Those of some protocols that the answer to a question is missing of."""
        return [
            protocol
            for protocol in protocols
            if protocol in self.protocols and self.wanted(protocol, spec.text, budget.text, question)
        ]


@dataclass(frozen=True)
class Selection:
    """Cells that stay i32 [n_layer, n_head_kv, n_keep], None for all of them."""

    spec: Spec
    budget: Budget
    cells: IntArray | None
    n_budget: int
    n_cell: int
    kept: Kept
    seconds: float


@dataclass(frozen=True)
class Asked:
    """A question, the tokens that it adds, what the full cache answers, and where that is recorded."""

    number: int
    question: Question
    tail: tuple[int, ...]
    full: Reference
    turn: int = 0

    def record(self, protocol: str, spec: Spec, budget: Budget, got: Answer, n_token: int, **what: Any) -> Record:
        right, full_right = (self.question.is_right(text) for text in (got.text, self.full.text))
        return Record(
            protocol, spec.text, budget.text, self.number, self.turn, self.question.kind, n_token,
            answer=got.text, full=self.full.text, right=right, full_right=full_right, same=got.same, kl=got.kl, **what,
        )  # fmt: skip


class Reading:
    """An album in a context: the state with all its cells, and what the full cache answers."""

    def __init__(self, context: Context, album: Album, n_predict: int) -> None:
        self.context, self.album, self.n_predict = context, album, n_predict
        self.messages = album.messages
        self._template = Session(context, pruning=Pruning(policy=FullPolicy())).template
        try:
            self._text([])
            self._text([album.questions[0]])
        except TemplateError:
            self.messages = [*album.messages, {"role": "assistant", "content": ACKNOWLEDGEMENT}]
        session = self.read(Pruning(policy=FullPolicy()))
        self.n_token = session.n_token
        self.state: State = cache.save(context)
        self._asked: dict[int, Asked] = {}

    def _text(self, questions: Sequence[Question], answers: Sequence[str] = ()) -> str:
        return self._template.render([*self.messages, *chat_messages(questions, answers)], bool(questions))

    @property
    def text(self) -> str:
        """The rendered album."""
        return self._text([])

    def read(self, pruning: Pruning, question: Question | None = None) -> Session:
        """A session that has just read the album, and the question."""
        self.context.clear()
        session = Session(self.context, pruning=pruning)
        session.prefill(self.messages, add_generation_prompt=False)
        if question:
            session.prefill([*self.messages, *chat_messages([question])])
        return session

    def _tail(self, questions: Sequence[Question], answers: Sequence[str] = ()) -> tuple[int, ...]:
        """Tokens that the last one of these questions adds, with the answer before it."""
        text, before = self._text(questions, answers), self._text(questions[:-1], answers[:-1])
        return new_tokens(self.context.model, text, before)

    def asked(self, number: int) -> Asked:
        """A question right after the album."""
        if number not in self._asked:
            question = self.album.questions[number]
            tail = self._tail([question])
            cache.restore(self.context, self.state)
            full = cache.reference(self.context, cache.decode(self.context, tail), self.n_predict)
            self._asked[number] = Asked(number, question, tail, full)
        return self._asked[number]

    @cached_property
    def chats(self) -> dict[int, list[Asked]]:
        """Chats of questions one after the other, by the number of their first question."""
        chats = {}
        for begin in range(0, len(self.album.questions), N_CHAT):
            questions = self.album.questions[begin : begin + N_CHAT]
            if len(questions) == N_CHAT or (begin == 0 and len(questions) > 1):
                chats[begin] = self._chat(begin, questions)
        return chats

    def _chat(self, begin: int, questions: Sequence[Question]) -> list[Asked]:
        cache.restore(self.context, self.state)
        chat: list[Asked] = []
        for turn, question in enumerate(questions):
            tail = self._tail(questions[: turn + 1], [asked.full.text for asked in chat])
            full = cache.reference(self.context, cache.decode(self.context, tail), self.n_predict)
            chat.append(Asked(begin + turn, question, tail, full, turn))
        return chat

    def select(self, session: Session, pairs: Sequence[tuple[Spec, Budget]], n_token: int) -> list[Selection]:
        """What stays with each policy and budget. A share is one of n_token tokens. Nothing is evicted."""
        _, tags = self.context.cells()
        found = []
        for spec, budget in pairs:
            session.pruning = spec.pruning()
            n_budget = budget.cells(n_token, self.context.bytes_per_cell)
            if spec.keeps_all:
                found.append(Selection(spec, budget, None, n_budget, tags.shape[2], cache.kept(tags), 0.0))
                continue
            began = time.perf_counter()
            cells = session.select(n_budget)
            seconds = time.perf_counter() - began
            found.append(Selection(spec, budget, cells, n_budget, cells.shape[2], cache.kept(tags, cells), seconds))
        return found

    def answer(self, first: Floats, asked: Asked) -> Answer:
        return cache.answer(self.context, first, asked.full, self.n_predict)


def measure(context: Context, album: Album, plan: Plan) -> Iterator[Record]:
    """Every answer that is missing on an album."""
    if album.questions and set(plan.protocols) - {"bounded"}:
        reading = Reading(context, album, plan.n_predict)
        yield from ask_now(reading, plan)
        if "before" in plan.protocols:
            yield from ask_before(reading, plan)
        yield from ask_downsampled(reading, plan)
    if album.turns and "bounded" in plan.protocols:
        yield from ask_bounded(context, album, plan)


def ask_now(reading: Reading, plan: Plan) -> Iterator[Record]:
    """`window`, `first` and `later`: the question chooses what stays."""
    for number in range(len(reading.album.questions)):
        chat = reading.chats[number] if "later" in plan.protocols and number in reading.chats else []
        for group in groups(plan.specs):
            pairs = [
                (spec, budget)
                for spec in group
                for budget in plan.budgets
                if plan.missing(("window", "first"), spec, budget, number)
                or any(plan.missing(("later",), spec, budget, one.number) for one in chat)
            ]
            if pairs:
                yield from _ask_now(reading, plan, reading.asked(number), chat, pairs)


def _ask_now(
    reading: Reading, plan: Plan, asked: Asked, chat: list[Asked], pairs: Sequence[tuple[Spec, Budget]]
) -> Iterator[Record]:
    context = reading.context
    session = reading.read(pairs[0][0].pruning(), asked.question)
    n_token = reading.n_token + len(asked.tail)
    if session.n_token != n_token:
        raise BenchError(f"{asked.question.text!r} changes the prompt before it: the template cannot be measured")
    selections = reading.select(session, pairs, n_token)
    cache.restore(context, reading.state)
    if asked.tail[:-1]:
        cache.decode(context, asked.tail[:-1])
    but_last = cache.save(context)
    for chosen in selections:
        missing = plan.missing(PROTOCOLS, chosen.spec, chosen.budget, asked.number)
        if "window" in missing:
            cache.restore(context, but_last)
            seconds = _keep(context, None if chosen.cells is None else chosen.cells[..., :-1])
            got = reading.answer(cache.decode(context, asked.tail[-1:]), asked)
            yield _record(asked, "window", chosen, got, n_token, seconds)
        if "first" not in missing and not chat:
            continue
        cache.restore(context, but_last)
        first = cache.decode(context, asked.tail[-1:])
        seconds = _keep(context, chosen.cells)
        if "first" in missing:
            yield _record(asked, "first", chosen, reading.answer(first, asked), n_token, seconds)
        for one in chat:
            if one.turn:
                first = cache.decode(context, one.tail)
            if plan.missing(("later",), chosen.spec, chosen.budget, one.number):
                yield _record(one, "later", chosen, reading.answer(first, one), n_token, seconds)


def ask_before(reading: Reading, plan: Plan) -> Iterator[Record]:
    """`before`: one eviction for all questions."""
    context = reading.context
    numbers = range(len(reading.album.questions))
    for group in groups(plan.specs):
        pairs = [
            (spec, budget)
            for spec in group
            for budget in plan.budgets
            if any(plan.missing(("before",), spec, budget, number) for number in numbers)
        ]
        if not pairs:
            continue
        every = [reading.asked(number) for number in numbers]
        session = reading.read(group[0].pruning())
        for chosen in reading.select(session, pairs, reading.n_token):
            cache.restore(context, reading.state)
            seconds = _keep(context, chosen.cells)
            for asked in every:
                if plan.missing(("before",), chosen.spec, chosen.budget, asked.number):
                    got = reading.answer(cache.decode(context, asked.tail), asked)
                    cache.rewind(context, reading.state.n_past)
                    yield _record(asked, "before", chosen, got, reading.n_token, seconds)


def _keep(context: Context, cells: IntArray | None) -> float:
    """Evict all others; seconds."""
    began = time.perf_counter()
    if cells is not None and cells.shape[2] < context.n_cell:
        context.keep(cells)
    return time.perf_counter() - began


def _record(asked: Asked, protocol: str, chosen: Selection, got: Answer, n_token: int, seconds: float) -> Record:
    return asked.record(
        protocol,
        chosen.spec,
        chosen.budget,
        got,
        n_token,
        n_budget=chosen.n_budget,
        n_cell=chosen.n_cell,
        kept_text=chosen.kept.text,
        kept_picture=chosen.kept.picture,
        evict_s=chosen.seconds + seconds,
    )


def ask_downsampled(reading: Reading, plan: Plan) -> Iterator[Record]:
    """Fewer picture tokens, as many as fit into the cells of a budget beside all text; nothing is evicted, so what is
    asked when makes no difference to the album.
    """
    context = reading.context
    n_text = reading.n_token - downsample.n_picture_cell(context, reading.text, reading.messages)
    for spec in plan.specs:
        if spec.policy is not None:
            continue
        done: dict[int, tuple[State, float]] = {}
        for budget in plan.budgets:
            for protocol in ("window", "first", "before", "later"):
                for n_tail, chat in _chats(reading, protocol):
                    if not any(plan.missing((protocol,), spec, budget, asked.number) for asked in chat):
                        continue
                    n_token = reading.n_token + n_tail
                    n_budget = budget.cells(n_token, context.bytes_per_cell)
                    n_each = max(1, (n_budget - n_text - n_tail) // max(1, reading.album.n_picture))
                    if n_each not in done:
                        began = time.perf_counter()
                        downsample.read(context, reading.text, reading.messages, n_each)
                        done[n_each] = cache.save(context), time.perf_counter() - began
                    state, seconds = done[n_each]
                    cache.restore(context, state)
                    kept = cache.kept(context.cells()[1])
                    for asked in chat:
                        got = reading.answer(cache.decode(context, asked.tail), asked)
                        if plan.missing((protocol,), spec, budget, asked.number):
                            yield asked.record(
                                protocol, spec, budget, got, n_token, n_budget=n_budget,
                                n_cell=round(kept.text + kept.picture) + n_tail, kept_text=kept.text + n_tail,
                                kept_picture=kept.picture, evict_s=0.0, extra_s=seconds,
                            )  # fmt: skip


def _chats(reading: Reading, protocol: str) -> list[tuple[int, list[Asked]]]:
    """What is asked one after the other, and the tokens of the question that is read before the eviction."""
    if protocol == "later":
        return [(len(chat[0].tail), chat) for chat in reading.chats.values()]
    every = [reading.asked(number) for number in range(len(reading.album.questions))]
    return [(0 if protocol == "before" else len(asked.tail), [asked]) for asked in every]


def ask_bounded(context: Context, album: Album, plan: Plan) -> Iterator[Record]:
    """`bounded`: sessions as a user has them; only their answers are read here, and taken back."""
    every: list[Asked] = []
    n_token = 0
    for spec in plan.specs:
        for budget in plan.budgets:
            numbers = [n for n in range(len(album.turns)) if plan.missing(("bounded",), spec, budget, n)]
            if not numbers or spec.policy is None:
                continue
            if not every:
                every, n_token = _full_turns(context, album, plan.n_predict)
            cells = max(MIN_CELLS, budget.cells(n_token, context.bytes_per_cell))
            pruning = spec.pruning(None if spec.keeps_all else cells)
            for record in _ask_turns(context, album, plan, every, pruning, spec, budget):
                if record.question in numbers:
                    yield record


def _full_turns(context: Context, album: Album, n_predict: int) -> tuple[list[Asked], int]:
    """The conversation with the full cache, and the cells that it fills."""
    context.clear()
    session = Session(context, pruning=Pruning(policy=FullPolicy()))
    every: list[Asked] = []
    for number, turn in enumerate(album.turns):
        session.prefill(turn_messages(album, number + 1, every))
        full = cache.reference(context, cache.log_probs(context), n_predict)
        every.append(Asked(number, turn.question, (), full, number))
    return every, session.n_token


def _ask_turns(
    context: Context, album: Album, plan: Plan, every: list[Asked], pruning: Pruning, spec: Spec, budget: Budget
) -> Iterator[Record]:
    context.clear()
    session = Session(context, pruning=pruning)
    for asked in every:
        seconds = session.counters.evict_s
        session.prefill(turn_messages(album, asked.number + 1, every))
        session.prune()
        _, tags = context.cells()
        kept = cache.kept(tags)
        got = cache.answer(context, cache.log_probs(context), asked.full, plan.n_predict)
        yield asked.record(
            "bounded",
            spec,
            budget,
            got,
            session.n_token,
            n_budget=pruning.cells or session.n_token,
            n_cell=tags.shape[2],
            kept_text=kept.text,
            kept_picture=kept.picture,
            evict_s=session.counters.evict_s - seconds,
        )


def turn_messages(album: Album, n_turn: int, answered: Sequence[Asked]) -> list[Message]:
    """Messages of the first turns up to the question of the last one."""
    messages: list[Message] = []
    for number, turn in enumerate(album.turns[:n_turn]):
        messages.append({"role": "user", "content": [*turn.parts, {"type": "text", "text": turn.question.text}]})
        if number < n_turn - 1:
            messages.append({"role": "assistant", "content": answered[number].full.text})
    return messages


def chat_messages(questions: Sequence[Question], answers: Sequence[str] = ()) -> list[Message]:
    """Messages of questions, each but for the last followed by its answer."""
    messages: list[Message] = []
    for number, question in enumerate(questions):
        messages.append({"role": "user", "content": question.text})
        if number < len(answers):
            messages.append({"role": "assistant", "content": answers[number]})
    return messages


def new_tokens(model: VisionModel, text: str, before: str) -> tuple[int, ...]:
    """Tokens of what a longer text adds. Raises BenchError if it does not go on from there."""
    if not text.startswith(before):
        raise BenchError(f"{model.info.path}: its chat template rewrites earlier turns, so nothing can be asked later")
    parts = model.tokenize(text[len(before) :])
    return tuple(token for part in parts if isinstance(part, TokenPart) for token in part.tokens)


def open_context(model: VisionModel, album: Album, specs: Sequence[Spec], n_predict: int, **settings: Any) -> Context:
    """A context that holds the album with a chat about it, or all its turns."""
    chat = [
        *(part for message in album.messages for part in content_parts(message)),
        *({"type": "text", "text": question.text} for question in album.questions),
    ]
    turns = [part for turn in album.turns for part in [*turn.parts, {"type": "text", "text": turn.question.text}]]
    n_cell = max(_n_cell(model, chat), _n_cell(model, turns))
    n_turn = max(N_CHAT, len(album.turns))
    return Context(model, n_ctx=n_cell + n_turn * (n_predict + TURN), n_window=n_window(specs), **settings)


def _n_cell(model: VisionModel, parts: list[dict[str, Any]]) -> int:
    text = "\n".join(part["text"] if part["type"] == "text" else MEDIA_MARKER for part in parts)
    pictures = [part["picture"] for part in parts if part["type"] == "image"]
    return sum(item.n_cell for item in items_of(model.tokenize(text, pictures)))


def content_parts(message: Message) -> list[dict[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
