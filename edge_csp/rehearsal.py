"""Rehearsal: before cells go, the model repeats the text and describes the pictures that came since the last eviction.

What it looks at for that is noted, for policies that want to know what later questions may need, and then all of it is
taken back. Text wants to be repeated: nothing else tells which of its tokens matter before anybody asks for them.
Pictures want to be described in words that the model understands: its answer looks at what there is to say.

Sources: KVzip (arXiv 2505.23416) for the repeating. Describing is own work, see docs/quality.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from edge_csp.chat import ChatTemplate
from edge_csp.context import Context
from edge_csp.errors import ContextError, ModelError
from edge_csp.images import load_picture
from edge_csp.items import Item, n_pictures
from edge_csp.model import PicturePart, TokenPart, VisionModel
from edge_csp.policy.base import REHEARSED, FloatArray
from edge_csp.sampling import Sampler, Sampling

REPEAT = "\n\nRepeat the previous context exactly.\n\n"
"""Said before the text is repeated, in the words of the source."""
OVERLAP = 8
"""Tokens that are repeated once more if repeating was interrupted, so that the model finds the place."""
CUES = ("Describe picture {n}.",)
"""What is asked of a model that comes without cues of its own. Cues should ask for every kind of detail that questions
may be about, in words that the model knows."""
GREEDY = Sampling(temperature=0, repeat_penalty=1)


@dataclass
class Rehearsal:
    """What a conversation has rehearsed so far.

    n_done, n_token: items of the conversation, from the first on, that need no rehearsal any more, and tokens evaluated
    for all of it.
    """

    model: VisionModel
    template: ChatTemplate
    n_done: int = 0
    n_token: int = 0
    _known: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def run(
        self,
        context: Context,
        items: Sequence[Item],
        cues: Sequence[str],
        n_predict: int,
        softmax_n: float,
        n_free: int,
    ) -> dict[str, FloatArray]:
        """Rehearse what is new of the items, within n_free cells. The cells, the position of the next token and its
        logits are then what they were before; the observation window is empty.

        cues: without any, those of the model; {n} is the number of a picture. Each is answered in n_predict tokens at
        most.

        Returns attention that the cells got, f32 [n_layer, n_head_kv, n_cell]: "repeated", the most that a batch of
        repeated tokens gave, mean over its queries; "described", the most that a cue and its answer gave. Cues that do
        not fit into n_free are left out, and so is the text if nothing fits.

        The cache has to take things back, see Context.takes_back.
        """
        cues = cues or cues_of(self.model.info.path)
        new, n_before = items[self.n_done :], n_pictures(items[: self.n_done])
        logits, notes = context.logits(), {name: _no_mass(context) for name in REHEARSED}
        tokens, n_past = [item.key for item in new if isinstance(item.key, int)], context.n_past
        try:
            self._repeat(context, tokens, softmax_n, n_free, notes["repeated"])
            for number in range(n_before + 1, n_before + n_pictures(new) + 1):
                for cue in cues:
                    asked = self.cue_tokens(cue, number)
                    if len(asked) + n_predict <= n_free:
                        self._describe(context, asked, n_predict, softmax_n, notes["described"])
        except BaseException:  # interrupted: the conversation goes on as if there had been none
            context.truncate(n_past)
            raise
        self.n_done = len(items)
        if logits is not None:
            context.set_logits(logits)
        return notes

    def _repeat(self, context: Context, tokens: Sequence[int], softmax_n: float, n_free: int, note: FloatArray) -> None:
        n_past, n_batch, prompt = context.n_past, min(context.n_window, context.n_batch), self._repeat_tokens()
        begin = 0
        while begin < len(tokens):
            lead = [*prompt, *tokens[max(0, begin - OVERLAP) : begin]]
            end = min(len(tokens), begin + n_free - len(lead))
            if end <= begin:
                return
            self._decode(context, lead)
            for first in range(begin, end, n_batch):
                part = tokens[first : min(first + n_batch, end)]
                self._decode(context, part)
                mass = context.mass(len(part), softmax_n)[..., : note.shape[-1]]
                np.maximum(note, mass / np.float32(len(part)), out=note)
            _take_back(context, n_past)
            begin = end

    def _describe(
        self, context: Context, tokens: Sequence[int], n_predict: int, softmax_n: float, note: FloatArray
    ) -> None:
        n_past, n_query = context.n_past, len(tokens)
        self._decode(context, tokens)
        sampler = Sampler(GREEDY, self.model)
        try:
            for _ in range(n_predict):
                token = sampler.sample(context.handle)
                if self.model.is_end(token):
                    break
                self._decode(context, [token])
                n_query += 1
        finally:
            sampler.close()
        np.maximum(note, context.mass(n_query, softmax_n)[..., : note.shape[-1]], out=note)
        _take_back(context, n_past)

    def _decode(self, context: Context, tokens: Sequence[int]) -> None:
        for begin in range(0, len(tokens), context.n_batch):
            context.decode_tokens(tokens[begin : begin + context.n_batch])
        self.n_token += len(tokens)

    def _repeat_tokens(self) -> tuple[int, ...]:
        """Of REPEAT; none if the vocabulary spells it, so that the model cannot know what is said."""
        if REPEAT not in self._known:
            tokens = _text_tokens(self.model.tokenize(REPEAT))
            self._known[REPEAT] = tokens if len(tokens) < len(REPEAT) // 2 else ()
        return self._known[REPEAT]

    def cue_tokens(self, cue: str, number: int) -> tuple[int, ...]:
        """What the chat template writes after a picture if a cue about the picture of this number (from 1; it stands
        for {n}) and the turn of the assistant follow it.
        """
        text = cue.replace("{n}", str(number))
        if text not in self._known:
            picture = load_picture(Image.new("RGB", (64, 64)))  # any: only what follows it is looked at
            content = [{"type": "image", "picture": picture}, {"type": "text", "text": text}]
            parts = self.model.tokenize(self.template.render([{"role": "user", "content": content}], True), [picture])
            last = max(i for i, part in enumerate(parts) if isinstance(part, PicturePart))
            self._known[text] = _text_tokens(parts[last + 1 :])
        return self._known[text]


@cache
def cues_of(model: Path) -> tuple[str, ...]:
    """Cues for a GGUF file: the lines of the file beside it with the ending .cues, or else CUES.

    Raises ModelError if that file cannot be read or holds nothing.
    """
    path = model.with_suffix(".cues")
    if not path.exists():
        return CUES
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error})") from error
    cues = tuple(line.strip() for line in lines if line.strip())
    if not cues:
        raise ModelError(f"{path} holds no cue: write one a line, as {CUES[0]!r}")
    return cues


def _text_tokens(parts: Sequence[TokenPart | PicturePart]) -> tuple[int, ...]:
    return tuple(token for part in parts if isinstance(part, TokenPart) for token in part.tokens)


def _no_mass(context: Context) -> FloatArray:
    info = context.csp.info(seq_id=context.seq_id) if context.csp else None
    assert info
    return np.zeros((info.n_layer, info.n_head_kv, info.n_cell), np.float32)


def _take_back(context: Context, n_past: int) -> None:
    if not context.truncate(n_past):  # never, the cache was asked for it before
        raise ContextError("a rehearsal cannot be taken back from the cache")
