"""What stays in the cache because the user says so: messages and picture parts with a true "pinned"."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edge_csp.chat import Message, message_parts
from edge_csp.errors import ContextError
from edge_csp.items import Item
from edge_csp.pruning import Positions


@dataclass(frozen=True)
class Pins:
    """pictures: their numbers, from 1. spans: positions, of pictures and of whole messages."""

    pictures: frozenset[int] = frozenset()
    spans: tuple[Positions, ...] = ()


def find_pins(messages: Sequence[Message], items: Sequence[Item], end_of: Callable[[Sequence[Message]], int]) -> Pins:
    """What is pinned in the items of a prompt. end_of: items that its first messages take."""
    parts = [part for message in messages for part in message_parts(message) if part["type"] == "image"]
    pictures = {number for number, part in enumerate(parts, start=1) if part.get("pinned")}
    turns = [i for i, message in enumerate(messages) if message.get("pinned")]
    if not turns and not pictures:
        return Pins()
    spans = [(end_of(messages[:i]), end_of(messages[: i + 1])) for i in turns]
    numbers = itertools.accumulate(item.is_new_picture for item in items)
    spans += [
        (i, i + 1)
        for i, (item, number) in enumerate(zip(items, numbers, strict=True))
        if item.is_picture and number in pictures
    ]
    positions = [0, *itertools.accumulate(item.n_pos for item in items)]
    return Pins(frozenset(pictures), tuple((positions[begin], positions[end]) for begin, end in spans))


def pin_picture(messages: Sequence[Message], number: int, pinned: bool) -> list[Message]:
    """The messages with this picture pinned or not; pictures count from 1.

    Raises ContextError if there is no such picture.
    """
    n = 0
    for i, message in enumerate(messages):
        for j, part in enumerate(message_parts(message)):
            n += part["type"] == "image"
            if n == number and part["type"] == "image":
                content = list(message["content"])
                content[j] = {**part, "pinned": pinned}
                return [*messages[:i], {**message, "content": content}, *messages[i + 1 :]]
    raise ContextError(f"there is no picture {number}: the conversation has {n}")


def pin_turn(messages: Sequence[Message], number: int, pinned: bool) -> list[Message]:
    """The messages with all of this turn pinned or not; turns count from 1, and 0 is the system message.

    Raises ContextError if there is no such turn.
    """
    turns = list(itertools.accumulate(int(message["role"] == "user") for message in messages))
    if number not in turns:
        raise ContextError(f"there is no turn {number}: the conversation has {max(turns, default=0)}")
    return [
        {**message, "pinned": pinned} if turn == number else message
        for message, turn in zip(messages, turns, strict=True)
    ]
