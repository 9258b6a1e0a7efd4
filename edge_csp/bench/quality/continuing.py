"""The protocol `continue`: text is read and pruned, then its true continuation is given, token by token.

After each token the pruned cache and the full one say what they expect next: how far these are apart, whether the
likeliest token is the same one, and how likely the true one is. Policies choose as after a prompt: the last queries are
the window.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_csp.bench.quality import cache
from edge_csp.bench.quality.albums import Passage
from edge_csp.bench.quality.cache import Predictions
from edge_csp.bench.quality.reading import FULL, Measured, Pair, Selection, select, text_tokens
from edge_csp.chat import ChatTemplate
from edge_csp.context import Context
from edge_csp.errors import BenchError
from edge_csp.pruning import Pruning
from edge_csp.session import Session

AS_IT_IS = "{% for message in messages %}{{ message.content }}{% endfor %}"
"""A chat template that adds nothing."""


@dataclass(frozen=True, kw_only=True)
class Continued(Measured):
    """kl: mean over n_ahead tokens. agreement: share of them where both caches have the same likeliest token.
    nll, full_nll: mean negative log-likelihood of the true ones in nats, pruned and with the full cache.
    """

    n_ahead: int
    agreement: float
    nll: float
    full_nll: float


class Continuing:
    """A passage in a context: the state with all its cells, and what the full cache expects behind it."""

    def __init__(self, context: Context, passage: Passage) -> None:
        self.context = context
        self._text, self._ahead = cut(context, passage)
        self.n_token = self.read(FULL).n_token
        self._state = cache.save(context)
        self._full = cache.predictions(context, self._ahead[:-1])

    def read(self, pruning: Pruning) -> Session:
        """A session that has just read the passage."""
        self.context.clear()
        session = Session(self.context, pruning=pruning)
        session.template = _as_it_is(self.context)
        session.prefill([{"role": "user", "content": self._text}], add_generation_prompt=False)
        return session

    def measure(self, pairs: Sequence[Pair]) -> Iterator[Continued]:
        """All these can look at the same cache."""
        for chosen in select(self.read(pairs[0][0].pruning()), pairs, self.n_token):
            yield self._go_on(chosen)

    def _go_on(self, chosen: Selection) -> Continued:
        context = self.context
        cache.restore(context, chosen.merged or self._state)
        began = time.perf_counter()
        if chosen.cells is not None and chosen.n_cell < context.n_cell:
            context.keep(chosen.cells)
        seconds = time.perf_counter() - began
        found = cache.predictions(context, self._ahead[:-1])
        true = np.array(self._ahead[1:])
        return Continued(
            protocol="continue",
            question=0,
            kind="",
            kl=float(cache.kl_rows(self._full, found).mean()),
            n_ahead=len(true),
            agreement=float((self._full.argmax(axis=1) == found.argmax(axis=1)).mean()),
            nll=_nll(found, true),
            full_nll=_nll(self._full, true),
            **chosen.found(seconds),
        )


def _nll(found: Predictions, true: NDArray[np.int64]) -> float:
    return float(-found[np.arange(len(true)), true].mean(dtype=np.float64))


def _as_it_is(context: Context) -> ChatTemplate:
    info = context.model.info
    return ChatTemplate(AS_IT_IS, info.bos_token, info.eos_token)


def cut(context: Context, passage: Passage) -> tuple[str, tuple[int, ...]]:
    """The text that is read, of about passage.n_token tokens, and the tokens that follow: the first one, and n_ahead to
    be expected after it. The cut is before a blank, where vocabularies begin a word.

    Raises BenchError if the passage is too short.
    """
    model, info = context.model, context.model.info
    text = passage.text
    if passage.messages:
        template = ChatTemplate(info.chat_template, info.bos_token, info.eos_token)
        text = template.render(passage.messages, add_generation_prompt=False)
    read = text_tokens(model, text)[: passage.n_token]
    data = b"".join(model.token_bytes(token, special=True) for token in read)
    end = len(data.decode("utf-8", "ignore"))
    while end < len(text) and not text[end].isspace():
        end += 1
    ahead = text_tokens(model, text[end:])[: passage.n_ahead + 1]
    if len(ahead) <= passage.n_ahead:
        raise BenchError(f"the text is too short: nothing is left of it after {passage.n_token} tokens")
    return text[:end], ahead
