"""One conversation: prefill what is new, evict, decode.

The cache is never read back from text: a session remembers which tokens and pictures it has evaluated, and evaluates
the rest of the next prompt. Where a prompt takes another turn (undo, templates that rewrite earlier turns), the longest
common beginning stays if the cut lies behind the pruned cells; otherwise everything is evaluated again, from embeddings
in memory.

A budget is enforced after every prompt, as soon as the first token of the answer is there. In a bounded cache
(Pruning.cells) cells are evicted before every batch that would overflow it, of the prompt and of the answer: a
conversation of any length goes on. Pinned messages and pictures stay.

With Pruning.reread, pictures of which little is left are read again behind the prompt, see reread.py. That is there for
one answer: then it is removed, and the answer evaluated again without it, so that nothing else knows of it.
"""

from __future__ import annotations

import codecs
import itertools
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_csp.chat import ChatTemplate, Message, message_parts, message_pictures
from edge_csp.context import Context
from edge_csp.errors import BudgetError, ContextError, NativeError, TemplateError
from edge_csp.images import Picture
from edge_csp.items import Item, PromptEnd, common_length, common_text, items_of, n_pictures, token_item
from edge_csp.model import PicturePart, Progress
from edge_csp.patches import PictureMap, TurnUse, picture_maps, spans_of, turn_uses
from edge_csp.pins import Pins, find_pins, pin_picture, pin_turn
from edge_csp.policy.base import FloatArray, IntArray
from edge_csp.pruning import Layout, Pruner, Pruning
from edge_csp.rehearsal import Rehearsal
from edge_csp.reread import LOST, Planned, SecondReading, looks, second_reading
from edge_csp.sampling import Sampler, Sampling
from edge_csp.usage import CacheUse, Counters, picture_uses

PAST_TRAINED = ("continue", "stop")


class Session:
    """A conversation with a model. Not thread-safe."""

    def __init__(
        self,
        context: Context,
        *,
        pruning: Pruning | None = None,
        sampling: Sampling | None = None,
        system: str | None = None,
        past_trained: str = "continue",
        on_progress: Progress | None = None,
        on_notice: Callable[[str], None] | None = None,
    ) -> None:
        """system: text of a system message. past_trained: what happens where the conversation is longer than the
        context that the model was trained on, "continue" (with a notice) or "stop". on_progress: told of "encode" and
        "prefill". on_notice: told in words what was evicted because the cache was full, and of the trained context.

        Raises PolicyError if the cache is bounded and the policy evicts nothing.
        """
        if past_trained not in PAST_TRAINED:
            raise ContextError(f"past_trained is {past_trained!r}: use {' or '.join(PAST_TRAINED)}")
        info = context.model.info
        self.context = context
        self.model = context.model
        self._pruner = Pruner(context, pruning or Pruning(), self._layout, self._rehearse)
        self.sampling = sampling or Sampling()
        self.template = ChatTemplate(info.chat_template, info.bos_token, info.eos_token)
        self.counters = Counters()
        self.finish_reason = ""
        """Why the last answer ended: "stop", "length" (n_predict), "full" (no free cells), "trained" (past the trained
        context) or "interrupt"."""
        self.past_trained = past_trained
        self._system: list[Message] = [{"role": "system", "content": system}] if system else []
        self.messages: list[Message] = list(self._system)
        self._on_progress = on_progress
        self._on_notice = on_notice
        self._told_trained = False
        self._items: list[Item] = []  # what the cache holds, pruned or not
        self._reading: list[Item] = []  # the picture part that is being evaluated, if one is
        self._text = ""  # the prompt text that became _items
        self._prompts: list[PromptEnd] = []  # where the prompts of the turns end in both
        self._ends: dict[int, int] = {}  # number of messages -> items that they take
        self._turn_begin = 0  # items before the present turn
        self._pins = Pins()
        self._rehearsal = Rehearsal(self.model, self.template)
        self._to_prune = False  # when the first token of the answer is there
        self._planned: Planned | None = None
        self._again: SecondReading | None = None  # behind what _items had then; what came since is behind it

    @property
    def n_cell_max(self) -> int:
        """Cells that the conversation may fill at any time."""
        return self._pruner.n_cell_max

    @property
    def pruning(self) -> Pruning:
        """What is evicted and when; a new one counts from the next prompt on."""
        return self._pruner.pruning

    @pruning.setter
    def pruning(self, pruning: Pruning) -> None:
        self._pruner = self._pruner.replaced(pruning)

    def ask(self, text: str, pictures: Sequence[Picture] = (), *, n_predict: int = -1) -> Generator[str, None, None]:
        """Ask, and stream the answer. Pictures come before the text.

        n_predict: most tokens of the answer, -1 until it ends. Closing the iterator ends the answer; what has been
        streamed stays in the conversation.

        Raises ContextError if the prompt does not fit, BudgetError if pinned cells exceed the budget or leave no room;
        the conversation is then as it was before.
        """
        parts: list[dict[str, Any]] = [{"type": "image", "picture": picture} for picture in pictures]
        return self.ask_parts([*parts, {"type": "text", "text": text}], n_predict=n_predict)

    def ask_parts(self, content: Sequence[dict[str, Any]], *, n_predict: int = -1) -> Generator[str, None, None]:
        """Like ask(), for text and pictures in any order: parts are {"type": "text", "text": str} or
        {"type": "image", "picture": Picture}.
        """
        messages = [*self.messages, {"role": "user", "content": list(content)}]
        self.prefill(messages)
        self.prune(after_token=True)
        self.messages = messages
        self.counters.n_turn += 1
        answer = ""
        try:
            for piece in self.generate(n_predict=n_predict):
                answer += piece
                yield piece
        finally:
            self.messages.append({"role": "assistant", "content": answer})
            self._ends[len(self.messages)] = len(self._items)

    def prefill(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> None:
        """Evaluate the prompt of `messages`, as far as it is new. Messages and picture parts with a true "pinned" stay
        in the cache.

        Raises ContextError if it does not fit, before anything has changed.
        """
        self._take_back()
        self._to_prune = False
        text = self.template.render(messages, add_generation_prompt)
        items = self._plan(text, messages)
        self._check_trained(sum(item.n_pos for item in items))
        n_same = common_length(self._items, items)
        if n_same == len(items):
            n_same -= 1  # the logits of the last token are needed
        n_past = sum(item.n_pos for item in items[:n_same])
        n_cut = sum(item.n_cell for item in self._items[n_same:])
        n_new = sum(item.n_cell for item in items[n_same:])
        self._check_fit(self.context.n_cell - n_cut + n_new, n_new)
        if n_same < len(self._items) and not self.context.truncate(n_past):
            self._check_fit(sum(item.n_cell for item in items), n_new)
            self._forget_cells()
            items = self._plan(text, messages)  # with the pixels
            self.counters.n_restart += 1
            n_same = 0
        del self._items[n_same:]
        self._forget_notes()
        n_char = common_text(self._text, text)
        prompts = [end for end in self._prompts if end.n_item <= n_same and end.n_char <= n_char]
        self._text, self._prompts = "", []  # until everything is evaluated
        self._ends = {n: end for n, end in self._ends.items() if end <= n_same} | {len(messages): len(items)}
        self._turn_begin = min(self._ends.get(len(messages) - 1, 0), len(items) - 1)
        self._pins = find_pins(messages, items, lambda first: self._end_of(first, items))
        n_evicted = self.counters.n_evicted
        self._evaluate(items[n_same:])
        self._tell_evictions("reading", n_evicted)
        self._text = text
        self._prompts = [*prompts, PromptEnd(len(items), len(text), n_pictures(items))]
        self._planned = self._plan_again(messages) if add_generation_prompt else None

    def _plan_again(self, messages: Sequence[Message]) -> Planned | None:
        """The pictures that the question, which has just been evaluated, looks at, if most of them is gone."""
        least = self.pruning.reread
        if not least or self.context.csp is None or not n_pictures(self._items):
            return None
        found = [look for look in looks(self.context, self._items) if look.share >= least and look.kept < LOST]
        if not found:
            return None
        pictures = message_pictures(messages)
        is_new = any(part["type"] == "image" for part in message_parts(messages[-1]))
        begin = 0 if is_new else self._end_of(messages[:-1], self._items)  # the question follows the last picture
        numbers = [look.number for look in found]
        return Planned(found, second_reading(self.model, self._items, pictures, numbers, begin))

    @contextmanager
    def second_reading(self) -> Iterator[None]:
        """Read pictures again after prefill(), if that is due, for a `with` block; generate() does so itself.

        The logits are then those after the question was read once more.
        """
        self._read_again()
        again = self._again
        try:
            yield
        finally:
            if self._again is again:  # not gone yet
                self._take_back()

    def _read_again(self) -> None:
        """Evaluate what was planned behind the prompt, for the answer that follows; told in any case."""
        planned, self._planned = self._planned, None
        if planned is None:
            return
        n_cell = planned.n_cell
        try:
            self._check_room(n_cell, sum(item.n_pos for item in planned.items))
        except ContextError as error:
            self._tell(planned.refused(error))
            return
        started = time.perf_counter()
        before = len(self._items), len(self._text), self.context.n_past, self.context.n_cell
        self._again = SecondReading(*before, n_cell)
        try:
            tokens: list[Item] = []
            for item in planned.items:
                if item.part is None:
                    tokens.append(item)
                    continue
                self._decode_text(tokens)
                tokens = []
                self.context.decode_picture(item.part, self.model.encode(item.part))
            self._decode_text(tokens)
        except BaseException:
            self._take_back()
            raise
        self.counters.n_reread += len(planned.looks)
        self.counters.n_reread_cell += n_cell
        self.counters.reread_s += time.perf_counter() - started
        self._tell(planned.told)

    def _check_room(self, n_cell: int, n_pos: int) -> None:
        """Raises ContextError if so much does not fit behind the conversation, or could not be removed."""
        if not self.context.takes_back:
            raise ContextError("nothing can be taken back from the cache of this model")
        n_free = self.n_cell_max - 1 - self.context.n_cell
        if n_cell > n_free:
            raise ContextError(f"that takes {n_cell} cells for a while, and there is room for {n_free}")
        self._check_trained(self.context.n_past + n_pos)

    def _decode_text(self, items: Sequence[Item]) -> None:
        tokens = [item.key for item in items if isinstance(item.key, int)]
        for begin in range(0, len(tokens), self.context.n_batch):
            self.context.decode_tokens(tokens[begin : begin + self.context.n_batch])

    def _take_back(self) -> None:
        """Remove a second reading, if there is one, and evaluate the answer that followed it without it."""
        again, self._again = self._again, None
        if again is None or not self.context.handle:  # an answer that nobody reads ends when it is collected
            return
        started = time.perf_counter()
        answer, text = self._items[again.n_item :], self._text
        del self._items[again.n_item :]
        self._text = text[: again.n_char]
        if not self.context.truncate(again.n_past):
            self._forget_cells()
            raise ContextError("a second reading cannot be taken back from this cache: turn it off (--reread 0)")
        self._forget_notes()
        most = self._pruner.n_batch(len(answer))
        try:
            for begin in range(0, len(answer), most):
                self._make_room(len(answer[begin : begin + most]))
                self._decode_text(answer[begin : begin + most])
                self._items += answer[begin : begin + most]
        except BaseException:
            self._forget_cells()
            raise
        self._text = text
        self.counters.n_reread_cell += len(answer)
        self.counters.reread_s += time.perf_counter() - started

    def _check_fit(self, n_cell: int, n_new: int) -> None:
        if not self._pruner.is_bounded and n_cell >= self.context.n_ctx:  # one cell stays free for the answer
            raise ContextError(
                f"the prompt needs {n_cell} cells ({n_new} of them new), but the context has {self.context.n_ctx}: "
                "raise the context size (-c), bound the cache (--cells), lower the budget, or use fewer pictures"
            )

    def _check_trained(self, n_pos: int) -> None:
        """Tell once that the conversation is longer than the trained context.

        Raises ContextError if it has to stop there.
        """
        n_trained = self.model.info.n_ctx_train
        if not 0 < n_trained < n_pos:
            return
        words = f"the conversation has {n_pos} positions, more than the trained context of {n_trained}"
        if self.past_trained == "stop":
            raise ContextError(f"{words}: start anew, or go on at your own risk (--past-trained continue)")
        if not self._told_trained:
            self._told_trained = True
            self._tell(f"{words}: answers may get worse (--past-trained stop ends conversations there)")

    def _tell(self, notice: str) -> None:
        if self._on_notice:
            self._on_notice(notice)

    def _tell_evictions(self, what: str, n_evicted: int) -> None:
        """Tell of the evictions since the counter was so."""
        if self.counters.n_evicted > n_evicted:
            self._tell(
                f"the cache of {self._pruner.n_cell_max} cells was full while {what}: evicted "
                f"{self.counters.n_evicted - n_evicted} cells per layer and KV head, {self.context.n_cell} are kept"
            )

    def pin_picture(self, number: int, *, pinned: bool = True) -> None:
        """Let all cells of the picture that are left stay from now on (or no longer); pictures count from 1.

        Raises ContextError if there is no such picture.
        """
        self.messages = pin_picture(self.messages, number, pinned)

    def pin_turn(self, number: int, *, pinned: bool = True) -> None:
        """Let all cells of a question, its pictures and its answer that are left stay from now on (or no longer);
        turns count from 1, and 0 is the system message.

        Raises ContextError if there is no such turn.
        """
        self.messages = pin_turn(self.messages, number, pinned)

    def _end_of(self, messages: Sequence[Message], items: Sequence[Item]) -> int:
        """Items that the first messages take of the items of a longer prompt."""
        if not messages or len(messages) in self._ends:
            return self._ends.get(len(messages), 0)
        first = self._plan(self.template.render(messages, False), messages)
        return common_length(first, items)

    def _plan(self, text: str, messages: Sequence[Message]) -> list[Item]:
        """Items of the whole prompt; only what the cache does not hold is tokenised, if the text goes on from there.

        Text from an evaluated answer is not tokenised again, if that would change tokens before the answer: the model
        may have chosen others than the tokenizer, and cells that were pruned can only be kept as they are.
        """
        pictures = message_pictures(messages)
        known = [item.key[0] for item in self._items if isinstance(item.key, tuple) and item.key[1] == 0]
        n_char = common_text(self._text, text)
        n_picture = common_length(known, [picture.sha256 for picture in pictures])
        left = self._text[n_char:]
        if self._text and text != self._text and n_picture == len(known) and (not left or left.isspace()):
            items = items_of(self.model.tokenize(text[n_char:], pictures[n_picture:]))
            if not left or (items and isinstance(items[0].key, int) and self.model.is_end(items[0].key)):
                return self._items + items  # blanks at the end of the answer were trimmed: they may stay
        bos = self.template.bos_token
        add_special = not (bos and text.startswith(bos))
        whole = items_of(self.model.tokenize(text, pictures, add_special=add_special))
        for end in reversed(self._prompts):
            if end.n_char <= n_char and end.n_picture <= n_picture:
                if common_length(self._items, whole) >= end.n_item:
                    break
                rest = self.model.tokenize(text[end.n_char :], pictures[end.n_picture :])
                return self._items[: end.n_item] + items_of(rest)
        return whole

    def _evaluate(self, items: Sequence[Item]) -> None:
        """Evaluate items one batch after the other; `_items` follows, so that an interrupt loses nothing."""
        n_done, n_all = 0, sum(item.n_cell for item in items)
        i = 0
        while i < len(items):
            part = items[i].part
            if part is not None:
                evaluated = [self._evaluate_picture(items[i], part, self._pruner.n_batch(n_all - n_done))]
            else:
                batch = items[i : i + self._pruner.n_batch(n_all - n_done)]
                evaluated = list(itertools.takewhile(lambda item: not item.is_picture, batch))
                self._make_room(len(evaluated))
                started = time.perf_counter()
                self.context.decode_tokens([item.key for item in evaluated if isinstance(item.key, int)])
                self.counters.prefill_s += time.perf_counter() - started
                self.counters.n_text_cell += len(evaluated)
            self._items.extend(evaluated)
            n_done += sum(item.n_cell for item in evaluated)
            i += len(evaluated)
            self._report("prefill", n_done / n_all)

    def _evaluate_picture(self, item: Item, part: PicturePart, n_batch: int) -> Item:
        """The item without its pixels. n_batch: cells filled at once."""
        started = time.perf_counter()
        n_encoded, n_from_disk, evict_s = self.model.n_encoded, self.model.n_from_disk, self.counters.evict_s
        self._report("encode", 0.0)
        embeddings = self.model.encode(part)
        item = replace(item, part=None)
        encoded = time.perf_counter()
        n_past = self.context.n_past
        try:
            with suppress(BudgetError):  # pinned cells leave no room for all of it: then batch by batch
                if part.n_cell <= self.n_cell_max // 2:
                    self._make_room(part.n_cell)
            self._reading = [item]
            self.context.decode_picture(part, embeddings, n_batch=n_batch, before_batch=self._make_room)
        except BaseException:
            if self.context.n_past != n_past:  # evicted in the midst of the picture: there is no way back
                self._forget_cells()
            raise
        finally:
            self._reading = []
        self.counters.encode_s += encoded - started
        self.counters.prefill_s += time.perf_counter() - encoded - (self.counters.evict_s - evict_s)
        self.counters.n_encoded += self.model.n_encoded - n_encoded
        self.counters.n_from_disk += self.model.n_from_disk - n_from_disk
        self.counters.n_picture += 1
        self.counters.n_picture_cell += part.n_cell
        return item

    def _rehearse(self, n_free: int) -> dict[str, FloatArray]:
        """Notes of a rehearsal within n_free cells; none within a picture, which has to be read without a break."""
        if self._reading:
            return {}
        started, n_token = time.perf_counter(), self._rehearsal.n_token
        pruning = self.pruning
        try:
            return self._rehearsal.run(
                self.context, self._items, pruning.cues, pruning.cue_predict, pruning.softmax_n, n_free
            )
        finally:
            self.counters.n_rehearsed += self._rehearsal.n_token - n_token
            self.counters.rehearse_s += time.perf_counter() - started

    def _make_room(self, n_new: int) -> None:
        self._count_eviction(self._pruner.make_room, n_new)

    def _report(self, what: str, done: float) -> None:
        if self._on_progress:
            self._on_progress(what, done)

    def prune(self, *, after_token: bool = False) -> int:
        """Evict down to the budget; returns the cells evicted per layer and KV head.

        after_token: let generate() do it when it has the first token of the answer, which needs nothing but the prompt
        and so comes sooner; returns 0. Where pictures are read again, they come before that token, into the room that
        evicting makes: then nothing is put off.

        Raises BudgetError if the budget is smaller than one cell, or than the pinned cells; in either case at once.
        """
        self._take_back()
        n_again = self._planned.n_cell if self._planned else 0
        self._to_prune = False
        if after_token and not n_again:
            self._pruner.check(self.n_token)
            self._to_prune = True
            return 0
        if 0 < n_again <= self.n_cell_max // 2:
            with suppress(BudgetError):  # pinned cells leave no room for it
                return self._count_eviction(lambda n_token: self._pruner.prune(n_token, n_again), self.n_token)
        return self._count_eviction(self._pruner.prune, self.n_token)

    def _prune_after_token(self) -> int:
        """What prune() has put off, if it has; returns the cells evicted."""
        to_prune, self._to_prune = self._to_prune and bool(self.context.handle), False
        return self._count_eviction(self._pruner.prune, self.n_token) if to_prune else 0

    def select(self, n_cell: int) -> IntArray:
        """The cells that would stay if n_cell were to, i32 [n_layer, n_head_kv, n_keep]; nothing is evicted.

        Raises BudgetError if the pinned cells are more.
        """
        self._take_back()
        return self._pruner.select(n_cell)

    def merge(self, cells: IntArray) -> None:
        """What happens to the cells that select() has chosen before all others go, if the policy merges."""
        self._pruner.merge(cells)

    def _layout(self) -> Layout:
        items, n_new = self._items + self._reading, 0
        while n_new < len(items) - self._turn_begin and not items[-1 - n_new].is_picture:
            n_new += 1
        return Layout(spans_of(items, self._projector), self._pins.spans, n_new)

    def _count_eviction(self, evict: Callable[[int], int], n: int) -> int:
        started = time.perf_counter()
        try:
            n_evicted = evict(n)
        except NativeError:
            self._forget_cells()  # they may be half moved
            raise
        if n_evicted:
            self.counters.evict_s += time.perf_counter() - started
            self.counters.n_eviction += 1
            self.counters.n_evicted += n_evicted
        return n_evicted

    def generate(self, *, n_predict: int = -1) -> Generator[str, None, None]:
        """Stream an answer after prefill(), in whole characters; `finish_reason` tells why it ended.

        Raises TemplateError if the prompt does not end with text: only text tokens have logits to sample.
        """
        if not self._items or self._items[-1].is_picture:
            raise TemplateError("the prompt does not end with text, so there is nothing to answer")
        prompt_tokens = [item.key for item in self._items if isinstance(item.key, int)]
        n_evicted = self.counters.n_evicted
        sampler = Sampler(self.sampling, self.model, prompt_tokens)
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.finish_reason = "interrupt"
        with_pictures = ExitStack()
        try:
            if n_predict:
                with_pictures.enter_context(self.second_reading())
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
                n_evicted += self._prune_after_token()
                if self._again and (self.context.n_cell >= self.n_cell_max or self._is_past_trained()):
                    self._take_back()
                if not self._pruner.is_bounded and self.context.n_cell >= self.context.n_ctx:
                    self.finish_reason = "full"
                    break
                if self._is_past_trained():
                    self.finish_reason = "trained"
                    break
                if not self._again:
                    self._make_room(1)
                self._decode_answer(token, piece)
            else:
                self.finish_reason = "length"
            if rest := decoder.decode(b"", final=True):
                yield rest
        finally:
            if not sys.is_finalizing():  # an open answer when the process ends: modules are gone
                sampler.close()
                with_pictures.close()
                n_evicted += self._prune_after_token()
                self._tell_evictions("answering", n_evicted)

    def _is_past_trained(self) -> bool:
        """True where the answer has to stop; tells once where it goes on."""
        try:
            self._check_trained(self.context.n_past + 1)
        except ContextError:
            return True
        return False

    def _decode_answer(self, token: int, piece: str) -> None:
        started = time.perf_counter()
        self.context.decode_tokens([token])
        self._items.append(token_item(token))
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
        self._items, self._text, self._prompts, self._ends, self._pins = [], "", [], {}, Pins()
        self._turn_begin, self._to_prune = 0, False
        self._planned = self._again = None
        self._forget_notes()

    def _forget_notes(self) -> None:
        """To be called when cells have been removed."""
        self._pruner.forget()
        self._rehearsal.n_done = min(self._rehearsal.n_done, len(self._items))

    @property
    def n_cell(self) -> int:
        """Cells that the conversation fills now."""
        return self.context.n_cell - (self._again.n_cell if self._again else 0)

    @property
    def n_token(self) -> int:
        """Cells that the conversation would fill without pruning."""
        return sum(item.n_cell for item in self._items)

    def cache_use(self) -> CacheUse:
        """Cells per picture and of text, counted in the cache itself."""
        n_token = self.n_token
        n_cell = self.n_cell if self.context.csp else n_token
        positions = self.context.cells()[0] if self.context.csp and n_cell else None
        pictures = picture_uses(self._items, positions, self._pins.pictures)
        n_text = n_token - sum(picture.n_cell for picture in pictures)
        text_kept = n_cell - sum(picture.kept for picture in pictures)
        return CacheUse(n_token, n_cell, self.context.bytes_per_cell, n_text, text_kept, pictures)

    def kept_patches(self) -> list[PictureMap]:
        """Which patches of every part of every picture are left, per layer.

        Raises ModelError if the cells of a picture are not known to lie on a grid.
        """
        return picture_maps(self._items, self._cell_numbers(), self._projector)

    @property
    def _projector(self) -> str | None:
        """Type of the encoder."""
        mmproj = self.model.mmproj_info
        return mmproj.projector_type if mmproj else None

    def pictures(self) -> list[Picture]:
        """The pictures of all messages."""
        return message_pictures(self.messages)

    def kept_turns(self) -> list[TurnUse]:
        """Cells of the text of every turn, with its answer, and how many are left."""
        ends = [i for i, message in enumerate(self.messages) if message["role"] == "user"] + [len(self.messages)]
        begins = [self._end_of(self.messages[:end], self._items) for end in ends]
        return turn_uses(self._items, self._cell_numbers(), begins)

    def _cell_numbers(self) -> NDArray[np.int32]:
        if self.context.csp:
            numbers = self.context.cell_numbers()
            if again := self._again:
                after = numbers[..., again.n_before + again.n_cell :] - np.int32(again.n_cell)
                numbers = np.concatenate([numbers[..., : again.n_before], after], axis=-1)
            return numbers
        numbers = np.arange(self.n_token, dtype=np.int32)
        return np.broadcast_to(numbers, (self.model.info.n_layer, 1, self.n_token))
