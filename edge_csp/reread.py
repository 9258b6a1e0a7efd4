"""Re-reading: a picture that a question looks at, and of which most is gone, is evaluated once more for the answer.

What is evaluated follows the conversation: the words before the picture, the picture, and the question again.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from edge_csp.chat import MEDIA_MARKER
from edge_csp.context import Context
from edge_csp.images import Picture
from edge_csp.items import Item, items_of, n_pictures
from edge_csp.model import VisionModel

LOST = 0.5
"""A picture is read again if less than this share of its cells is left."""
N_HEADER = 32
"""Tokens before a picture that come with it, at most: they name it."""


@dataclass(frozen=True)
class Look:
    """A picture that a question looks at. number: from 1. share: of the attention. kept: share of its cells."""

    number: int
    share: float
    kept: float


def looks(context: Context, items: Sequence[Item]) -> list[Look]:
    """The pictures among the items of a whole prompt, the most attended first.

    Counted is the attention of the last token, where the answer begins, to what is left of them; mean over layers and
    heads. What the question before it attends to tells less: it is still looking for the picture.
    """
    numbers = np.cumsum([item.is_new_picture for item in items]) * [item.is_picture for item in items]
    number_of = np.repeat(numbers, [item.n_cell for item in items])
    cells = number_of[context.cell_numbers()]
    n_row, n = cells.shape[0] * cells.shape[1], n_pictures(items) + 1
    n_cell = np.bincount(number_of, minlength=n)
    kept = np.bincount(cells.ravel(), minlength=n) / n_row
    attention = np.bincount(cells.ravel(), context.mass(1, 0.0).ravel(), minlength=n) / n_row
    order = np.argsort(-attention, kind="stable")
    return [Look(int(i), float(attention[i]), float(kept[i] / n_cell[i])) for i in order if i]


def second_reading(
    model: VisionModel, items: Sequence[Item], pictures: Sequence[Picture], numbers: Sequence[int], begin: int
) -> list[Item]:
    """What to evaluate behind a prompt, so that the answer sees these pictures as a whole.

    items, pictures: of the prompt. begin: items before its last message.
    """
    places = [i for i, item in enumerate(items) if item.is_picture]
    counted = list(itertools.accumulate(items[i].is_new_picture for i in places))
    found: list[Item] = []
    n_behind = 0
    for number in numbers:
        wrapped = items_of(model.tokenize(MEDIA_MARKER, [pictures[number - 1]]))  # some models frame pictures
        n_behind = sum(1 for _ in itertools.takewhile(lambda item: not item.is_picture, reversed(wrapped)))
        parts = {item.key: item.part for item in wrapped if item.is_picture}
        own = [i for i, count in zip(places, counted, strict=True) if count == number]
        before = max([i + 1 + n_behind for i in places if i < own[0]], default=0)
        found += _header(model, items[max(before, own[0] - N_HEADER) : own[0]])
        found += [replace(item, part=parts.get(item.key)) for item in items[own[0] : own[-1] + 1]]
        found += wrapped[len(wrapped) - n_behind :]
    return [*found, *items[begin if places[-1] < begin else places[-1] + 1 + n_behind :]]


def _header(model: VisionModel, items: Sequence[Item]) -> Sequence[Item]:
    """What follows the last token that ends a turn or begins the conversation."""
    import llama_cpp

    bos = llama_cpp.llama_vocab_bos(model.vocab)
    ends = [i + 1 for i, item in enumerate(items) if isinstance(item.key, int) and _ends(model, item.key, bos)]
    return items[max(ends, default=0) :]


def _ends(model: VisionModel, token: int, bos: int) -> bool:
    return token == bos or model.is_end(token)


@dataclass(frozen=True)
class Planned:
    """What is to be read again. looks: at which pictures, most attended first."""

    looks: Sequence[Look]
    items: list[Item]

    @property
    def n_cell(self) -> int:
        return sum(item.n_cell for item in self.items)

    @property
    def told(self) -> str:
        was, them = ("was", "it") if len(self.looks) == 1 else ("were", "them")
        return f"{self._pictures} {was} read again, {self.n_cell} cells: the question looks at {them}, and {self._left}"

    def refused(self, error: Exception) -> str:
        return f"{self._pictures} could not be read again, of which {self._left}: {error}"

    @property
    def _pictures(self) -> str:
        return f"picture{'s' * (len(self.looks) > 1)} {' and '.join(str(look.number) for look in self.looks)}"

    @property
    def _left(self) -> str:
        return f"{' and '.join(f'{look.kept:.0%}' for look in self.looks)} of the cells were left"


@dataclass(frozen=True)
class SecondReading:
    """Cells of a second reading. n_item, n_char, n_past, n_before: items, characters, positions and cells before it."""

    n_item: int
    n_char: int
    n_past: int
    n_before: int
    n_cell: int
