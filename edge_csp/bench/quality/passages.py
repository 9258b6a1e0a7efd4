"""Texts that `continue` goes on with: English, code, JSON and a long chat, as they are in the world or made here."""

from __future__ import annotations

import json
import random
from typing import Any

from edge_csp.bench.quality import corpus
from edge_csp.bench.quality.albums import Passage
from edge_csp.bench.quality.notes import NAMES, some_prose
from edge_csp.chat import Message

N_AHEAD = 128
"""Tokens of every continuation."""
CHARS_PER_TOKEN = 8
"""More than any of these texts has: what is too long is cut."""

_STREETS = "Station High Church Mill Park Bridge Market School Castle Garden"
_TOWNS = "Ashford Burton Carlton Dunmore Easton Fairview Grafton Hilltop Kingston Langley"
_GOODS = "lamp chair table shelf carpet mirror clock vase basket blanket kettle pillow"
_COLORS = "red blue green yellow black white grey brown"
_STATES = ("new", "paid", "shipped", "delivered", "returned")


def draw_passage(topic: str, n_token: int, seed: str) -> Passage:
    """topic: "prose", "code", "json" or "chat"."""
    generator = random.Random(seed)
    n = CHARS_PER_TOKEN * (n_token + N_AHEAD)
    if topic == "chat":
        return Passage(n_token, N_AHEAD, messages=tuple(_chat(generator, n)))
    if topic == "code":
        return Passage(n_token, N_AHEAD, _code(generator, n))
    if topic == "json":
        return Passage(n_token, N_AHEAD, _orders(generator, n))
    return Passage(n_token, N_AHEAD, "\n\n".join(some_prose(generator, n)))


def _code(generator: random.Random, n: int) -> str:
    """Modules from a line on, which begins something."""
    names = generator.sample(sorted(corpus.sources()), len(corpus.sources()))
    whole = "\n\n".join(corpus.sources()[name] for name in names)
    begins = [i for i in range(len(whole) - n) if whole.startswith(("\ndef ", "\nclass "), i)]
    begin = generator.choice(begins) + 1 if begins else 0
    return whole[begin : begin + n]


def _orders(generator: random.Random, n: int) -> str:
    orders: list[dict[str, Any]] = []
    size = 0
    while size < n:
        orders.append(_order(generator, len(orders)))
        size += len(json.dumps(orders[-1], indent=2))
    return json.dumps({"orders": orders}, indent=2)


def _order(generator: random.Random, number: int) -> dict[str, Any]:
    items = [
        {
            "sku": f"{generator.choice(_GOODS.split())}-{generator.randrange(100, 1000)}",
            "color": generator.choice(_COLORS.split()),
            "quantity": generator.randint(1, 5),
            "price": generator.randrange(300, 20000) / 100,
        }
        for _ in range(generator.randint(1, 3))
    ]
    total = sum(one["quantity"] * one["price"] for one in items)  # type: ignore[operator]
    return {
        "id": 1000 + number,
        "date": f"2024-{generator.randint(1, 12):02}-{generator.randint(1, 28):02}",
        "customer": {
            "name": generator.choice(NAMES),
            "address": f"{generator.randint(1, 99)} {generator.choice(_STREETS.split())} Street",
            "city": generator.choice(_TOWNS.split()),
        },
        "items": items,
        "total": round(total, 2),
        "status": generator.choice(_STATES),
    }


def _chat(generator: random.Random, n: int) -> list[Message]:
    """Questions about functions, and what their docstrings say."""
    found: list[Message] = []
    for one in generator.sample(corpus.described(), len(corpus.described())):
        found.append({"role": "user", "content": f"What does {one.name} do?"})
        found.append({"role": "assistant", "content": one.text})
        n -= len(one.name) + len(one.text)
        if n < 0:
            break
    return found
