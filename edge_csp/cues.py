"""Cues: short questions that are asked right after a picture, to see what the model looks at there, and taken back."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from edge_csp.chat import ChatTemplate
from edge_csp.context import Context
from edge_csp.images import load_picture
from edge_csp.model import PicturePart, TokenPart, VisionModel
from edge_csp.sampling import Sampler, Sampling

GREEDY = Sampling(temperature=0, repeat_penalty=1)


class CueTokens:
    """What the chat template writes after a picture if a cue and the turn of the assistant follow it."""

    def __init__(self, model: VisionModel, template: ChatTemplate) -> None:
        self._model, self._template = model, template
        self._known: dict[str, tuple[int, ...]] = {}

    def of(self, cue: str, number: int) -> tuple[int, ...]:
        """Tokens of a cue about the picture of this number, from 1, which stands for {n}."""
        text = cue.replace("{n}", str(number))
        if text not in self._known:
            self._known[text] = self._tokenize(text)
        return self._known[text]

    def _tokenize(self, text: str) -> tuple[int, ...]:
        picture = load_picture(Image.new("RGB", (64, 64)))  # any: only what follows it is looked at
        content = [{"type": "image", "picture": picture}, {"type": "text", "text": text}]
        parts = self._model.tokenize(self._template.render([{"role": "user", "content": content}], True), [picture])
        last = max(i for i, part in enumerate(parts) if isinstance(part, PicturePart))
        return tuple(token for part in parts[last + 1 :] if isinstance(part, TokenPart) for token in part.tokens)


def ask_cue(context: Context, tokens: Sequence[int], n_batch: int, n_predict: int) -> int:
    """Evaluate a cue, and the likeliest answer of at most n_predict tokens; returns how many tokens that were."""
    for begin in range(0, len(tokens), n_batch):
        context.decode_tokens(tokens[begin : begin + n_batch])
    sampler = Sampler(GREEDY, context.model)
    try:
        for n_answer in range(n_predict):
            token = sampler.sample(context.handle)
            if context.model.is_end(token):
                return len(tokens) + n_answer
            context.decode_tokens([token])
    finally:
        sampler.close()
    return len(tokens) + n_predict
