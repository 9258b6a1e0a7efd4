"""Conversations to train on, and the tokenizer that knows every word of them. What they are about: edge_csp.demo."""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from edge_csp.demo.albums import COLOR_NAMES, FACTS, GREETINGS, INTRODUCTIONS, NAMES, QUESTIONS, Known, Target, ask
from edge_csp.demo.scenes import SHAPES, Scene

from .chat import Message, Tokenizer

MAX_PICTURES = 16
REMARKS = ("Here is a picture.", "Look at this one.", "And another one.", "Here are my pictures.", "More pictures:")
ACKNOWLEDGEMENT = "Okay."
_WEIGHT = {"describe_number": 2.0, "describe_name": 1.5, "find": 1.5, "code": 2.0}


@dataclass
class Conversation:
    """``pictures`` and ``numbers`` are in order of appearance; ``targets`` holds one entry per assistant message."""

    messages: list[Message] = field(default_factory=list)
    pictures: list[int] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    names: list[str | None] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)  # line of text -> name it is about
    targets: list[Target] = field(default_factory=list)


def _any_question(rng: random.Random, known: Known) -> tuple[str, str, Target]:
    kinds = list(QUESTIONS)
    weights = [_WEIGHT.get(kind, 1.0) for kind in kinds]
    while True:
        found = ask(rng, known, rng.choices(kinds, weights)[0])
        if found is not None:
            return found


def _pick_names(rng: random.Random, n: int, spelled: float) -> list[str]:
    """Pick n different names, some of them (share ``spelled``) made up and so spelled in bytes."""
    names = rng.sample(NAMES, n)
    for i in range(n):
        if rng.random() < spelled:
            letters = "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(3, 5)))
            names[i] = letters.capitalize()
    return names if len({name.lower() for name in names}) == n else _pick_names(rng, n, 0.0)


def make_conversation(
    rng: random.Random,
    labels: np.ndarray,
    n_pictures: int,
    n_questions: int,
    *,
    renumber: bool = False,
    spelled: float = 0.03,
    spread: float = 0.35,
) -> Conversation:
    """A random conversation about pictures drawn from the pool ``labels`` (n, 3).

    ``renumber`` gives the pictures arbitrary numbers of 1..16 (for training only: the template counts 1, 2, 3…),
    ``spread`` is the chance that pictures arrive over several turns.
    """
    conversation, known = Conversation(), Known()
    numbers = rng.sample(range(1, MAX_PICTURES + 1), n_pictures) if renumber else list(range(1, n_pictures + 1))
    n_codes = rng.choice((0, 1, 2, 3, 4, 6))
    names = _pick_names(rng, n_pictures + n_codes, spelled)
    share_named = rng.choice((0.0, 0.4, 0.7, 1.0))
    named: list[str | None] = [name if rng.random() < share_named else None for name in names[:n_pictures]]
    keys = names[n_pictures:]
    for i in range(len(keys)):  # a code may be about somebody in a picture
        if rng.random() < 0.25 and (other := rng.choice(names[:n_pictures])) not in keys:
            keys[i] = other

    n_groups = rng.randint(2, min(4, n_pictures)) if n_pictures > 1 and rng.random() < spread else 1
    cuts = [0, *sorted(rng.sample(range(1, n_pictures), n_groups - 1)), n_pictures]
    code_group = [rng.randrange(n_groups) for _ in keys]
    for group in range(n_groups):
        items: list[int | str] = list(range(cuts[group], cuts[group + 1]))
        lines: list[str | int] = []
        for key, at in zip(keys, code_group, strict=True):
            if at == group:
                code = f"{rng.randint(10, 99)} {rng.randint(10, 99)}"
                known.codes[key] = code
                line = rng.choice(FACTS).format(name=key, code=code)
                conversation.facts[line] = key
                items.insert(rng.randint(0, len(items)), line)
        for item in items:
            if isinstance(item, int):
                name = named[item]
                if name is not None:
                    lines.append(rng.choice(INTRODUCTIONS).format(name=name))
                elif rng.random() < 0.05:
                    lines.append(rng.choice(REMARKS))
                picture = rng.randrange(len(labels))
                conversation.pictures.append(picture)
                conversation.numbers.append(numbers[item])
                conversation.names.append(name)
                known.scenes.append(Scene(*(int(v) for v in labels[picture])))
                known.numbers.append(numbers[item])
                known.names.append(name)
            lines.append(item)
        parts: list[Message] = [
            {"type": "image", "image": item} if isinstance(item, int) else {"type": "text", "text": item}
            for item in lines
        ]
        if rng.random() < 0.15:
            conversation.messages += [
                {"role": "user", "content": parts},
                {"role": "assistant", "content": ACKNOWLEDGEMENT},
            ]
            conversation.targets.append(Target("acknowledge"))
            parts = []
        share = n_questions // n_groups + (group < n_questions % n_groups)
        for _ in range(max(1, share)):
            question, answer, target = _any_question(rng, known)
            parts.append({"type": "text", "text": question})
            conversation.messages += [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
            conversation.targets.append(target)
            parts = []
    return conversation


def _fill(text: str) -> list[str]:
    """A template with every word it can hold, for the vocabulary."""
    out = [text]
    slots: dict[str, Sequence[str]] = {
        "{name}": NAMES, "{color}": COLOR_NAMES, "{shape}": SHAPES, "{a}": ("a", "an"), "{n}": ("1",), "{code}": ("1",),
    }  # fmt: skip
    for slot, values in slots.items():
        if slot in text:
            out = [t.replace(slot, v) for t in out[:1] for v in values] + out[1:]
    return out


@functools.cache
def tokenizer() -> Tokenizer:
    """The demo's tokenizer: every word of the templates, with and without capital, at the start and after a space."""
    templates = [*INTRODUCTIONS, *REMARKS, *FACTS, *GREETINGS, *(q for qs in QUESTIONS.values() for q in qs)]
    texts = [t for template in templates for t in _fill(template)]
    texts += [f"{a} {color} {shape}" for a in ("A", "An") for color in COLOR_NAMES for shape in SHAPES]
    words = {word for text in texts for word in re.findall(r"[A-Za-z]+", text)}
    words |= {"with", "digit", "picture"}
    variants = {v for w in words if w.isalpha() for v in (w.lower(), w.lower().capitalize())}
    texts = [f"{prefix}{v}" for v in variants for prefix in ("", " ")] + [str(i) for i in range(10, 100)] + ["it's"]
    return Tokenizer(texts)
