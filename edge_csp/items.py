"""What a conversation is made of, as the cache sees it: items, each of which fills cells and takes positions."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

from edge_csp.model import Part, PicturePart, TokenPart


@dataclass(frozen=True)
class Item:
    """Something to evaluate, or evaluated: a token, or the cells of a part of a picture.

    Items with the same key have the same cells. part: until it is evaluated; it holds the pixels. size: its pixels.
    """

    key: int | tuple[str, int]  # token, or hash of the picture and number of its part
    n_cell: int = 1
    n_pos: int = 1
    name: str = field(default="", compare=False)
    part: PicturePart | None = field(default=None, compare=False)
    size: tuple[int, int] = field(default=(0, 0), compare=False)

    @property
    def is_picture(self) -> bool:
        return isinstance(self.key, tuple)

    @property
    def is_new_picture(self) -> bool:
        """True for the first part of a picture."""
        return isinstance(self.key, tuple) and self.key[1] == 0


@functools.cache  # long conversations are lists of few different tokens
def token_item(token: int) -> Item:
    return Item(token)


@dataclass(frozen=True)
class PromptEnd:
    """The end of a prompt, where an answer begins: items, characters and pictures before it."""

    n_item: int
    n_char: int
    n_picture: int


def items_of(parts: Sequence[Part]) -> list[Item]:
    """Items of the parts of a prompt."""
    items: list[Item] = []
    for part in parts:
        if isinstance(part, TokenPart):
            items.extend(map(token_item, part.tokens))
        else:
            items.append(Item((part.sha256, part.index), part.n_cell, part.n_pos, part.name, part, part.size))
    return items


def n_pictures(items: Sequence[Item]) -> int:
    """Pictures among the items; the parts of one picture count once."""
    return sum(item.is_new_picture for item in items)


def common_length(a: Sequence[object], b: Sequence[object]) -> int:
    """Elements that both begin with."""
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n


def common_text(a: str, b: str) -> int:
    """Characters that both texts begin with; comparing slices takes a hundredth of the time of a loop."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
