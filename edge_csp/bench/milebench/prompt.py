"""Prompts as published: instruction, context, options, with `<ImageHere>` for every picture; cut from the left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from edge_csp.bench.milebench.data import CHOICE_LIST, YOUR_ANSWER, Sample, choice_label
from edge_csp.errors import BenchError
from edge_csp.images import Picture

IMAGE = "<ImageHere>"
UNLABELLED = "GPR1200"
"""The set whose options have no letters before them: there are more than 26."""


class Reader(Protocol):
    """What a model makes of text and pictures."""

    def tokens(self, text: str) -> Sequence[int]:
        """Tokens of a text, without special ones."""

    def text(self, tokens: Sequence[int]) -> str:
        """Text of tokens."""

    def load(self, image: str) -> tuple[Picture, int]:
        """A picture of the set, and the cells that it takes. Raises ImageError if it cannot be read."""


@dataclass(frozen=True)
class Prompt:
    """What a model is asked. text: with IMAGE for each of the pictures. images: their names in the set."""

    text: str
    images: tuple[str, ...]
    pictures: tuple[Picture, ...]

    def parts(self) -> list[dict[str, Any]]:
        """Content of a message. Of two pictures without text between them, each gets a line of its own."""
        texts = self.text.replace(IMAGE + IMAGE, f"{IMAGE}\n{IMAGE}\n").split(IMAGE)
        parts: list[dict[str, Any]] = [{"type": "text", "text": texts[0]}]
        for picture, text in zip(self.pictures, texts[1:], strict=True):
            parts += [{"type": "image", "picture": picture}, {"type": "text", "text": text}]
        return [part for part in parts if part.get("text") != ""]


def write_prompt(sample: Sample, name: str, reader: Reader, max_prompt: int) -> Prompt:
    """The prompt of a sample of the set `name`, cut to max_prompt tokens and cells of pictures.

    The instruction and the end of the question stay. Text between pictures, and pictures, are taken whole from the end
    of the context on, as long as they fit; pictures that are left out need not be readable. A last piece of text that
    does not fit alone is cut from the left.

    Raises BenchError if nothing but the instruction would fit, or if there are more markers than pictures; ImageError.
    """
    room = max_prompt - len(reader.tokens(sample.instruction))
    if room < 1:
        raise BenchError(f"the instruction alone takes more than the {max_prompt} tokens of a prompt (--max-prompt)")
    pieces = _context(sample, name).split(IMAGE)
    left = list(sample.images)
    n_used, text, images, pictures = 0, "", list[str](), list[Picture]()
    for number, piece in enumerate(reversed(pieces)):
        tokens = reader.tokens(piece)
        if n_used + len(tokens) > room:
            if number == 0:
                text = reader.text(tokens[-room:])
            break
        text = piece + text
        n_used += len(tokens)
        if not left:
            if number < len(pieces) - 1:
                raise BenchError(f"the context has {len(pieces) - 1} pictures, but images_path {len(sample.images)}")
            break
        picture, n_cell = reader.load(left[-1])
        if n_used + n_cell > room:
            break
        text = IMAGE + text
        n_used += n_cell
        images.insert(0, left.pop())
        pictures.insert(0, picture)
    return Prompt(f"{sample.instruction}\n{text}", tuple(images), tuple(pictures))


def _context(sample: Sample, name: str) -> str:
    context = sample.context
    for number in range(1, len(sample.images) + 1):
        for kind in ("image", "table"):
            context = context.replace(f"{{{kind}#{number}}}", IMAGE)
    if sample.choices is None:
        return context
    labels = ["" if name == UNLABELLED else choice_label(i) for i in range(len(sample.choices))]
    options = "\n".join(one + choice for one, choice in zip(labels, sample.choices, strict=True))
    return context + CHOICE_LIST + options + YOUR_ANSWER
