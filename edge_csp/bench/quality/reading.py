"""An album in a context: its prompt, what the full cache answers, what policies choose from it, and the records."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

from edge_csp.bench.quality import cache
from edge_csp.bench.quality.albums import Album, Question
from edge_csp.bench.quality.cache import Answer, Floats, Kept, Reference, State
from edge_csp.bench.quality.specs import AFTERWARDS, Spec, n_window
from edge_csp.budget import Budget
from edge_csp.chat import MEDIA_MARKER, Message
from edge_csp.context import Context
from edge_csp.errors import BenchError, TemplateError
from edge_csp.items import items_of
from edge_csp.model import TokenPart, VisionModel
from edge_csp.policy import FullPolicy
from edge_csp.policy.base import IntArray
from edge_csp.pruning import Pruning
from edge_csp.session import Session

FULL = Pruning(policy=FullPolicy())
N_CHAT = 8
"""Questions of a chat in `later`: the first one chooses the cells."""
TURN = 32
"""Tokens that a template may add to a turn, at most; cells are set aside for them."""
ACKNOWLEDGEMENT = "Okay."
"""Said by the assistant between album and question, where the template refuses two messages of the user in a row."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was found of an eviction. n_token: cells without pruning, when cells were evicted. n_budget: those that may
    stay; n_cell: those that did; kept_text and kept_picture: of these, means over layers and KV heads. turn: of the
    chat. kl: from the full cache. evict_s: seconds of choosing, merging and moving the cells. extra_token, extra_s:
    what was run besides for them; extra_picture: the pictures that this was run for.
    """

    protocol: str
    policy: str
    budget: str
    question: int
    turn: int = 0
    kind: str
    n_token: int
    n_budget: int
    n_cell: int
    kept_text: float
    kept_picture: float
    kl: float
    evict_s: float
    extra_token: int = 0
    extra_s: float = 0.0
    extra_picture: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {name: round(value, 6) if isinstance(value, float) else value for name, value in asdict(self).items()}


@dataclass(frozen=True, kw_only=True)
class Record(Measured):
    """An answer, and that of the full cache. kl: mean over the tokens of the latter."""

    answer: str
    full: str
    right: bool
    full_right: bool
    same: bool


Pair = tuple[Spec, Budget]


@dataclass(frozen=True)
class Selection:
    """What stays. cells: i32 [n_layer, n_head_kv, n_keep], None where nothing has to be evicted any more. n_token,
    n_budget, n_cell, kept, extra_…: see Record. seconds: of choosing them. merged: all cells, before any goes, after
    what goes has been merged into what stays; None for policies that do not merge.
    """

    spec: Spec
    budget: Budget
    cells: IntArray | None
    n_token: int
    n_budget: int
    n_cell: int
    kept: Kept
    seconds: float = 0.0
    extra_token: int = 0
    extra_s: float = 0.0
    extra_picture: int = 0
    merged: State | None = None

    def found(self, seconds: float) -> dict[str, Any]:
        """Of this selection, for a record. seconds: of moving the cells."""
        return {
            "policy": self.spec.text,
            "budget": self.budget.text,
            "n_token": self.n_token,
            "n_budget": self.n_budget,
            "n_cell": self.n_cell,
            "kept_text": self.kept.text,
            "kept_picture": self.kept.picture,
            "evict_s": self.seconds + seconds,
            "extra_token": self.extra_token,
            "extra_s": self.extra_s,
            "extra_picture": self.extra_picture,
        }


@dataclass(frozen=True)
class Asked:
    """A question, the tokens that it adds, what the full cache answers, and where that is recorded. begun: tokens of
    the beginning of the answer that the question gives.
    """

    number: int
    question: Question
    tail: tuple[int, ...]
    full: Reference
    turn: int = 0
    begun: tuple[int, ...] = ()

    @property
    def said(self) -> str:
        """What the chat goes on with."""
        return self.question.said(self.full.text)

    def answer(self, context: Context, now: Floats, n_predict: int) -> Answer:
        """From the cache as it is; now: log-probabilities after the question. The answer is taken back."""
        n_past = context.n_past
        if self.begun:
            now = cache.decode(context, self.begun)
        got = cache.answer(context, now, self.full, self.question.n_predict(n_predict))
        if self.begun:
            cache.rewind(context, n_past)
        return got

    def record(self, protocol: str, chosen: Selection, got: Answer, seconds: float = 0.0) -> Record:
        """seconds: of moving the cells."""
        return Record(
            protocol=protocol,
            question=self.number,
            turn=self.turn,
            kind=self.question.kind,
            answer=got.text,
            full=self.full.text,
            right=self.question.is_right(got.text),
            full_right=self.question.is_right(self.full.text),
            same=got.same,
            kl=got.kl,
            **chosen.found(seconds),
        )


def ask_full(
    context: Context,
    question: Question,
    tail: tuple[int, ...],
    now: Floats,
    n_predict: int,
    *,
    prompt: str,
    number: int,
    turn: int = 0,
) -> Asked:
    """A question with the answer of the full cache, which is taken back.

    now: log-probabilities after it. prompt: its text, which tells whether a blank is missing before the answer.
    """
    n_past, begun = context.n_past, tuple[int, ...]()
    if question.prefix:
        blank = "" if not prompt or prompt[-1].isspace() else " "
        begun = text_tokens(context.model, blank + question.prefix)
        now = cache.decode(context, begun)
    full = cache.reference(context, now, question.n_predict(n_predict))
    if begun:
        cache.rewind(context, n_past)
    return Asked(number, question, tail, full, turn, begun)


class Reading:
    """An album in a context: the state with all its cells, and what the full cache answers."""

    def __init__(self, context: Context, album: Album, n_predict: int) -> None:
        self.context, self.album, self.n_predict = context, album, n_predict
        self.messages = album.messages
        self._template = Session(context, pruning=FULL).template
        try:
            self._text([])
            self._text([album.questions[0]])
        except TemplateError:
            self.messages = [*album.messages, {"role": "assistant", "content": ACKNOWLEDGEMENT}]
        session = self.read(FULL)
        self.n_token = session.n_token
        self.state: State = cache.save(context)
        self._asked: dict[int, Asked] = {}
        self._going_on: dict[tuple[Any, ...], Session] = {}
        self._is_text = all(part["type"] == "text" for message in self.messages for part in content_parts(message))

    def _text(self, questions: Sequence[Question], answers: Sequence[str] = ()) -> str:
        return self._template.render([*self.messages, *chat_messages(questions, answers)], bool(questions))

    @property
    def text(self) -> str:
        """The rendered album."""
        return self._text([])

    def read(self, pruning: Pruning, question: Question | None = None) -> Session:
        """A session that has just read the album, and the question."""
        if question and self._is_text and pruning.policy.needs <= AFTERWARDS:
            return self._go_on(pruning, question)
        self.context.clear()
        session = Session(self.context, pruning=pruning)
        session.prefill(self.messages, add_generation_prompt=False)
        if question:
            session.prefill([*self.messages, *chat_messages([question])])
        return session

    def _go_on(self, pruning: Pruning, question: Question) -> Session:
        """The same from the state behind the album, where nothing has to be known but the cells and the last queries:
        text takes as long to read as many questions to answer.
        """
        context = self.context
        settings = tuple(getattr(pruning, field.name) for field in fields(pruning) if field.name != "policy")
        cache.restore(context, self.state)
        if settings not in self._going_on:
            self._going_on[settings] = self.read(pruning)
        session = self._going_on[settings]
        session.pruning = pruning
        session.prefill(self.messages, add_generation_prompt=False)
        messages = [*self.messages, *chat_messages([question])]
        session.prefill(messages)
        read_again(context, session.template.render(messages))
        return session

    def _tail(self, questions: Sequence[Question], answers: Sequence[str] = ()) -> tuple[int, ...]:
        """Tokens that the last one of these questions adds, with the answer before it."""
        text, before = self._text(questions, answers), self._text(questions[:-1], answers[:-1])
        return new_tokens(self.context.model, text, before)

    def asked(self, number: int) -> Asked:
        """A question right after the album."""
        if number not in self._asked:
            cache.restore(self.context, self.state)
            self._asked[number] = self._ask(number, [self.album.questions[number]])
        return self._asked[number]

    def _ask(self, number: int, questions: Sequence[Question], answers: Sequence[str] = ()) -> Asked:
        """The last one of these questions, from the cache with all before it; that one then stays there."""
        tail = self._tail(questions, answers)
        now = cache.decode(self.context, tail)
        prompt, turn = self._text(questions, answers), len(answers)
        return ask_full(self.context, questions[-1], tail, now, self.n_predict, prompt=prompt, number=number, turn=turn)

    @cached_property
    def chats(self) -> dict[int, list[Asked]]:
        """Chats of questions one after the other, by the number of their first question."""
        return {
            numbers[0]: self._chat(numbers[0], self.album.questions[numbers[0] : numbers[-1] + 1])
            for numbers in chat_numbers(len(self.album.questions))
        }

    def _chat(self, begin: int, questions: Sequence[Question]) -> list[Asked]:
        cache.restore(self.context, self.state)
        chat: list[Asked] = []
        for turn in range(len(questions)):
            chat.append(self._ask(begin + turn, questions[: turn + 1], [asked.said for asked in chat]))
        return chat

    def before_last(self, asked: Asked) -> State:
        """All of the album and the question but its last token."""
        cache.restore(self.context, self.state)
        if asked.tail[:-1]:
            cache.decode(self.context, asked.tail[:-1])
        return cache.save(self.context)

    def select(self, session: Session, pairs: Sequence[Pair], n_token: int) -> list[Selection]:
        """What stays with each policy and budget, of the album and what was read behind it."""
        parts = [part for message in self.messages for part in content_parts(message)]
        return select(session, pairs, n_token, n_picture=sum(part["type"] == "image" for part in parts))


def select(session: Session, pairs: Sequence[Pair], n_token: int, *, n_picture: int = 0) -> list[Selection]:
    """What stays with each policy and budget. A share is one of n_token tokens. Nothing is evicted."""
    context = session.context
    _, tags = context.cells()
    counters = session.counters
    found = []
    for spec, budget in pairs:
        session.pruning = spec.pruning()
        n_budget = budget.cells(n_token, context.bytes_per_cell)
        began, rehearse_s = time.perf_counter(), counters.rehearse_s
        cells = None if spec.keeps_all else session.select(n_budget)
        seconds = time.perf_counter() - began - (counters.rehearse_s - rehearse_s)
        n_cell = tags.shape[2] if cells is None else cells.shape[2]
        merged = None
        if cells is not None and n_cell < tags.shape[2] and spec.pruning().policy.merges:
            merged, merge_s = _merged(session, cells)
            seconds += merge_s
        kept = cache.kept(tags, cells)
        extra: dict[str, Any] = {}
        if counters.n_rehearsed:
            extra = {
                "extra_token": counters.n_rehearsed,
                "extra_s": counters.rehearse_s,
                "extra_picture": n_picture,
            }
        found.append(Selection(spec, budget, cells, n_token, n_budget, n_cell, kept, seconds, merged=merged, **extra))
    return found


def _merged(session: Session, cells: IntArray) -> tuple[State, float]:
    """All cells, merged as before an eviction, and the seconds of that. The cache is put back, row by row, because
    the observation window has to stay.
    """
    context = session.context
    rows = [(layer, kind, context.rows(layer, kind)) for layer in range(cells.shape[0]) for kind in "kv"]
    began = time.perf_counter()
    session.merge(cells)
    seconds = time.perf_counter() - began
    state = cache.save(context)
    for layer, kind, before in rows:
        context.set_rows(layer, kind, before)
    return state, seconds


def read_again(context: Context, prompt: str) -> None:
    """Put the last queries of the prompt back into the window, after others have pushed them out; as many as were read
    since the last eviction.
    """
    assert context.csp
    info = context.csp.info(seq_id=context.seq_id)
    last = text_tokens(context.model, prompt.rpartition(MEDIA_MARKER)[2])[-context.n_window :]
    last = last[len(last) - min(len(last), info.n_cell - info.n_kept) :]
    if last:
        cache.rewind(context, context.n_past - len(last))
        cache.decode(context, last)


def chat_numbers(n_question: int) -> list[range]:
    """Numbers of the questions of every chat: as many as are whole, or one that is shorter."""
    begins = range(0, n_question, N_CHAT)
    numbers = [range(begin, min(begin + N_CHAT, n_question)) for begin in begins]
    return [one for one in numbers if len(one) == N_CHAT or (one[0] == 0 and len(one) > 1)]


def turn_messages(album: Album, n_turn: int, answered: Sequence[Asked]) -> list[Message]:
    """Messages of the first turns up to the question of the last one."""
    messages: list[Message] = []
    for number, turn in enumerate(album.turns[:n_turn]):
        messages.append({"role": "user", "content": [*turn.parts, {"type": "text", "text": turn.question.text}]})
        if number < n_turn - 1:
            messages.append({"role": "assistant", "content": answered[number].said})
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
    return text_tokens(model, text[len(before) :])


def text_tokens(model: VisionModel, text: str) -> tuple[int, ...]:
    return tuple(token for part in model.tokenize(text) if isinstance(part, TokenPart) for token in part.tokens)


def open_context(model: VisionModel, album: Album, specs: Sequence[Spec], n_predict: int, **settings: Any) -> Context:
    """A context that holds the album with a chat about it, or all its turns, or its passage and what follows; and all
    text a second time where policies have it repeated, as there is room for that in the contexts of users.
    """
    chat = [
        *(part for message in album.messages for part in content_parts(message)),
        *(_text(question.text) for question in album.questions),
    ]
    turns = [part for turn in album.turns for part in [*turn.parts, _text(turn.question.text)]]
    asked_about = [*album.questions, *(turn.question for turn in album.turns)]
    n_answer = n_predict + max((_n_cell(model, [_text(one.prefix)]) for one in asked_about), default=0)
    n_cell = max(_n_cell(model, chat), _n_cell(model, turns)) + max(N_CHAT, len(album.turns)) * (n_answer + TURN)
    n_text = _n_cell(model, [part for part in chat if part["type"] == "text"])
    if album.passage:
        n_text = album.passage.n_token
        n_cell = max(n_cell, n_text + album.passage.n_ahead + TURN)
    if any(spec.rehearses for spec in specs):
        n_cell += n_text + TURN
    return Context(model, n_ctx=n_cell, n_window=n_window(specs), **settings)


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _n_cell(model: VisionModel, parts: list[dict[str, Any]]) -> int:
    text = "\n".join(part["text"] if part["type"] == "text" else MEDIA_MARKER for part in parts)
    pictures = [part["picture"] for part in parts if part["type"] == "image"]
    return sum(item.n_cell for item in items_of(model.tokenize(text, pictures)))


def content_parts(message: Message) -> list[dict[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
