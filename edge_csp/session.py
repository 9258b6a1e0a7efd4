"""One conversation: prefill what is new, observe, select, keep, decode.

The cache is never read back from text: a session remembers which tokens and pictures it has evaluated, and evaluates
the rest of the next prompt. Where a prompt takes another turn (undo, templates that rewrite earlier turns), the longest
common beginning stays if the cut lies behind the pruned cells; otherwise everything is evaluated again, from embeddings
in memory.
"""

from __future__ import annotations

import codecs
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edge_csp.budget import Budget, parse_budget, protected_cells
from edge_csp.chat import ChatTemplate, Message
from edge_csp.context import Context
from edge_csp.errors import ContextError, NativeError, TemplateError
from edge_csp.images import Picture
from edge_csp.model import Part, PicturePart, Progress, TokenPart, VisionModel
from edge_csp.policy import CspPolicy, Policy, make_policy
from edge_csp.sampling import Sampler, Sampling


@dataclass(frozen=True)
class Pruning:
    """When and what to evict: after every prompt, down to the budget.

    budget: a share counts all tokens of the conversation, not those that are left. None keeps everything.
    n_obs: queries that vote. n_recent, n_sink: last and first cells that stay in any case; limited by the budget, see
    budget.protected_cells(). softmax_n: n of the scoring softmax.
    """

    budget: Budget | None = None
    policy: Policy = field(default_factory=CspPolicy)
    n_obs: int = 32
    n_recent: int = 32
    n_sink: int = 4
    softmax_n: float = 1.0


@dataclass
class Counters:
    """What a session has done so far. Times in seconds."""

    n_turn: int = 0
    n_text_cell: int = 0
    """Text tokens evaluated, prompts and answers."""
    n_picture_cell: int = 0
    n_picture: int = 0
    """Picture parts evaluated."""
    n_encoded: int = 0
    """Picture parts that went through the encoder; the others came from memory."""
    n_generated: int = 0
    n_evicted: int = 0
    """Cells evicted per layer and KV head."""
    n_restart: int = 0
    """Times that everything had to be evaluated again."""
    encode_s: float = 0.0
    prefill_s: float = 0.0
    evict_s: float = 0.0
    decode_s: float = 0.0


@dataclass(frozen=True)
class PictureUse:
    """A picture in the conversation. n_cell: cells it filled. kept: cells left, mean over layers and KV heads."""

    name: str
    n_cell: int
    kept: float


@dataclass(frozen=True)
class CacheUse:
    """What is in the cache now. Cells of text and pictures add up to n_cell.

    n_token: cells that the whole conversation would fill. text_kept: mean over layers and KV heads.
    """

    n_token: int
    n_cell: int
    bytes_per_cell: int
    n_text: int
    text_kept: float
    pictures: tuple[PictureUse, ...]


@dataclass(frozen=True)
class _Item:
    """Something evaluated: a token, or the cells of a picture. Items with the same key have the same cells."""

    key: int | tuple[str, int]
    n_cell: int = 1
    n_pos: int = 1
    name: str = field(default="", compare=False)
    part: PicturePart | None = field(default=None, compare=False)


class Session:
    """A conversation with a model. Not thread-safe."""

    def __init__(
        self,
        context: Context,
        *,
        pruning: Pruning | None = None,
        sampling: Sampling | None = None,
        system: str | None = None,
        on_progress: Progress | None = None,
    ) -> None:
        """system: text of a system message. on_progress: told of "encode" and "prefill"."""
        info = context.model.info
        self.context = context
        self.model = context.model
        self.pruning = pruning or Pruning()
        self.sampling = sampling or Sampling()
        self.template = ChatTemplate(info.chat_template, info.bos_token, info.eos_token)
        self.counters = Counters()
        self.finish_reason = ""
        """Why the last answer ended: "stop", "length" (n_predict), "full" (no free cells) or "interrupt"."""
        self._system: list[Message] = [{"role": "system", "content": system}] if system else []
        self.messages: list[Message] = list(self._system)
        self._on_progress = on_progress
        self._items: list[_Item] = []  # what the cache holds, pruned or not
        self._text = ""  # the prompt text that became _items

    def ask(self, text: str, pictures: Sequence[Picture] = (), *, n_predict: int = -1) -> Generator[str, None, None]:
        """Ask, and stream the answer. Pictures come before the text.

        n_predict: most tokens of the answer, -1 until it ends. Closing the iterator ends the answer; what has been
        streamed stays in the conversation.

        Raises ContextError if the prompt does not fit; the conversation is then as it was before.
        """
        parts: list[dict[str, Any]] = [{"type": "image", "picture": picture} for picture in pictures]
        return self.ask_parts([*parts, {"type": "text", "text": text}], n_predict=n_predict)

    def ask_parts(self, content: Sequence[dict[str, Any]], *, n_predict: int = -1) -> Generator[str, None, None]:
        """Like ask(), for text and pictures in any order: parts are {"type": "text", "text": str} or
        {"type": "image", "picture": Picture}.
        """
        messages = [*self.messages, {"role": "user", "content": list(content)}]
        self.prefill(messages)
        self.prune()
        self.messages = messages
        self.counters.n_turn += 1
        answer = ""
        try:
            for piece in self.generate(n_predict=n_predict):
                answer += piece
                yield piece
        finally:
            self.messages.append({"role": "assistant", "content": answer})

    def prefill(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> None:
        """Evaluate the prompt of `messages`, as far as it is new.

        Raises ContextError if it does not fit, before anything has changed.
        """
        text = self.template.render(messages, add_generation_prompt)
        items = self._plan(text, messages)
        n_same = _common_length(self._items, items)
        if n_same == len(items):
            n_same -= 1  # the logits of the last token are needed
        n_past = sum(item.n_pos for item in items[:n_same])
        n_cut = sum(item.n_cell for item in self._items[n_same:])
        n_new = sum(item.n_cell for item in items[n_same:])
        self._check_fit(self.context.n_cell - n_cut + n_new, n_new)
        if n_same < len(self._items) and not self.context.truncate(n_past):
            self._check_fit(sum(item.n_cell for item in items), n_new)
            self.context.clear()
            self.counters.n_restart += 1
            n_same = 0
        del self._items[n_same:]
        self._text = ""  # until everything is evaluated
        self._evaluate(items[n_same:])
        self._text = text

    def _check_fit(self, n_cell: int, n_new: int) -> None:
        if n_cell >= self.context.n_ctx:  # one cell stays free for the answer
            raise ContextError(
                f"the prompt needs {n_cell} cells ({n_new} of them new), but the context has {self.context.n_ctx}: "
                "raise the context size (-c), lower the budget, or use fewer pictures"
            )

    def _plan(self, text: str, messages: Sequence[Message]) -> list[_Item]:
        """Items of the whole prompt; only what the cache does not hold is tokenised, if the text goes on from there."""
        pictures = [
            part["picture"]
            for message in messages
            if not isinstance(message["content"], str)
            for part in message["content"]
            if part["type"] == "image"
        ]
        if self._text and text.startswith(self._text):
            n_old = _n_pictures(self._items)
            return self._items + _items(self.model.tokenize(text[len(self._text) :], pictures[n_old:]))
        bos = self.template.bos_token
        add_special = not (bos and text.startswith(bos))
        return _items(self.model.tokenize(text, pictures, add_special=add_special))

    def _evaluate(self, items: Sequence[_Item]) -> None:
        """Evaluate items one batch after the other; `_items` follows, so that an interrupt loses nothing."""
        n_done, n_all = 0, sum(item.n_cell for item in items)
        i = 0
        while i < len(items):
            part = items[i].part
            if part is not None:
                n_batch = 1
                self._evaluate_picture(part)
            else:
                n_batch = 0
                while n_batch < self.context.n_batch and i + n_batch < len(items) and items[i + n_batch].part is None:
                    n_batch += 1
                started = time.perf_counter()
                self.context.decode_tokens([item.key for item in items[i : i + n_batch] if isinstance(item.key, int)])
                self.counters.prefill_s += time.perf_counter() - started
                self.counters.n_text_cell += n_batch
            self._items.extend(items[i : i + n_batch])
            n_done += sum(item.n_cell for item in items[i : i + n_batch])
            i += n_batch
            self._report("prefill", n_done / n_all)

    def _evaluate_picture(self, part: PicturePart) -> None:
        started = time.perf_counter()
        n_encoded = self.model.n_encoded
        self._report("encode", 0.0)
        embeddings = self.model.encode(part)
        encoded = time.perf_counter()
        self.context.decode_picture(part, embeddings)
        self.counters.encode_s += encoded - started
        self.counters.prefill_s += time.perf_counter() - encoded
        self.counters.n_encoded += self.model.n_encoded - n_encoded
        self.counters.n_picture += 1
        self.counters.n_picture_cell += part.n_cell

    def _report(self, what: str, done: float) -> None:
        if self._on_progress:
            self._on_progress(what, done)

    def prune(self) -> int:
        """Evict down to the budget; returns the cells evicted per layer and KV head.

        Raises BudgetError if the budget is smaller than one cell.
        """
        pruning = self.pruning
        if pruning.budget is None or self.context.csp is None:
            return 0
        n_cell = self.context.n_cell
        budget = pruning.budget.cells(self.n_token, self.context.bytes_per_cell)
        if pruning.policy.n_keep(budget, n_cell) >= n_cell:
            return 0
        started = time.perf_counter()
        observation = self.context.observe(
            n_obs=pruning.n_obs, softmax_n=pruning.softmax_n, with_scores=pruning.policy.needs_scores
        )
        n_recent, n_sink = protected_cells(budget, n_recent=pruning.n_recent, n_sink=pruning.n_sink)
        protected = np.zeros(observation.shape, np.bool_)
        protected[..., :n_sink] = True
        protected[..., n_cell - n_recent :] = True
        cells = pruning.policy.select(observation, budget, protected)
        try:
            self.context.keep(cells)
        except NativeError:
            self._forget_cells()  # they may be half moved
            raise
        n_evicted = n_cell - int(cells.shape[-1])
        self.counters.evict_s += time.perf_counter() - started
        self.counters.n_evicted += n_evicted
        return n_evicted

    def generate(self, *, n_predict: int = -1) -> Generator[str, None, None]:
        """Stream an answer after prefill(), in whole characters; `finish_reason` tells why it ended.

        Raises TemplateError if the prompt does not end with text: only text tokens have logits to sample.
        """
        if not self._items or self._items[-1].part is not None:
            raise TemplateError("the prompt does not end with text, so there is nothing to answer")
        prompt_tokens = [item.key for item in self._items if isinstance(item.key, int)]
        sampler = Sampler(self.sampling, self.model, prompt_tokens)
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.finish_reason = "interrupt"
        try:
            n = 0
            while n != n_predict:
                token = sampler.sample(self.context.handle)
                if self.model.is_end(token):
                    self.finish_reason = "stop"
                    break
                n += 1
                piece = decoder.decode(self.model.token_bytes(token))
                if piece:
                    yield piece
                if self.context.n_cell >= self.context.n_ctx:
                    self.finish_reason = "full"
                    break
                self._decode_answer(token, piece)
            else:
                self.finish_reason = "length"
            if rest := decoder.decode(b"", final=True):
                yield rest
        finally:
            sampler.close()

    def _decode_answer(self, token: int, piece: str) -> None:
        started = time.perf_counter()
        self.context.decode_tokens([token])
        self._items.append(_Item(token))
        self._text += piece
        self.counters.decode_s += time.perf_counter() - started
        self.counters.n_generated += 1
        self.counters.n_text_cell += 1

    def undo(self) -> bool:
        """Take back the last question and its answer; False if there is none.

        The cache follows at the next question: it is cut where that is possible, and filled again where not.
        """
        if len(self.messages) <= len(self._system):
            return False
        self.messages = self.messages[:-2]
        return True

    def clear(self) -> None:
        """Start anew, with the same system message."""
        self._forget_cells()
        self.messages = list(self._system)

    def _forget_cells(self) -> None:
        self.context.clear()
        self._items, self._text = [], ""

    @property
    def n_token(self) -> int:
        """Cells that the conversation would fill without pruning."""
        return sum(item.n_cell for item in self._items)

    def cache_use(self) -> CacheUse:
        """Cells per picture and of text, counted in the cache itself."""
        spans = []  # (item, first position)
        position = 0
        for item in self._items:
            if item.part is not None:
                spans.append((item, position))
            position += item.n_pos
        n_token = self.n_token
        n_cell = self.context.n_cell if self.context.csp else n_token
        if self.context.csp and n_cell:
            pos, _ = self.context.cells()
            n_row = pos.shape[0] * pos.shape[1]
            kept = [float(((pos >= p) & (pos < p + item.n_pos)).sum()) / n_row for item, p in spans]
        else:
            kept = [float(item.n_cell) for item, _ in spans]
        pictures: list[PictureUse] = []
        for (item, _), n_kept in zip(spans, kept, strict=True):
            if item.part is not None and item.part.index > 0:  # a tile of the picture before
                whole = pictures.pop()
                pictures.append(PictureUse(whole.name, whole.n_cell + item.n_cell, whole.kept + n_kept))
            else:
                pictures.append(PictureUse(item.name, item.n_cell, n_kept))
        n_text = n_token - sum(picture.n_cell for picture in pictures)
        return CacheUse(n_token, n_cell, self.context.bytes_per_cell, n_text, n_cell - sum(kept), tuple(pictures))


@contextmanager
def open_session(
    model: str | Path,
    mmproj: str | Path | None = None,
    *,
    budget: str | Budget | None = None,
    policy: str | Policy = "csp",
    pruning: Pruning | None = None,
    sampling: Sampling | None = None,
    system: str | None = None,
    n_gpu_layers: int = -1,
    n_threads: int | None = None,
    use_mmap: bool = True,
    on_progress: Progress | None = None,
    **context: Any,
) -> Iterator[Session]:
    """Open a model and a conversation with it; both are closed at the end of the `with` block.

    model, mmproj: GGUF files, see VisionModel. budget: "20%", 512 cells as "512", "64MiB", or None to keep everything.
    policy: a name or a Policy. pruning: all pruning settings at once, instead of budget and policy. context: further
    settings of Context (n_ctx, n_batch, type_k, type_v, flash_attn …).

    Raises EdgeCspError with one line that tells what is wrong with the files or the settings.
    """
    if pruning is None:
        pruning = Pruning(
            parse_budget(budget) if isinstance(budget, str) else budget,
            make_policy(policy) if isinstance(policy, str) else policy,
        )
    with (
        VisionModel(
            model, mmproj, n_gpu_layers=n_gpu_layers, n_threads=n_threads, use_mmap=use_mmap, on_progress=on_progress
        ) as opened,
        Context(opened, n_window=pruning.n_obs, **context) as opened_context,
    ):
        yield Session(opened_context, pruning=pruning, sampling=sampling, system=system, on_progress=on_progress)


def _items(parts: Sequence[Part]) -> list[_Item]:
    items: list[_Item] = []
    for part in parts:
        if isinstance(part, TokenPart):
            items.extend(_Item(token) for token in part.tokens)
        else:
            items.append(_Item((part.sha256, part.index), part.n_cell, part.n_pos, part.name, part))
    return items


def _n_pictures(items: Sequence[_Item]) -> int:
    """Pictures among the items; the parts of one picture count once."""
    return sum(item.part is not None and item.part.index == 0 for item in items)


def _common_length(a: Sequence[_Item], b: Sequence[_Item]) -> int:
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n
