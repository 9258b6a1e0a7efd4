"""Conversations about albums: pictures with numbers and names, facts in words, questions with exact answers."""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from .chat import Message, Tokenizer
from .scenes import COLORS, SHAPES, Scene

MAX_PICTURES = 16
DEMO_PICTURES = 12  # of the embedded album, drawn from a pool of held-out scenes
DEMO_POOL, DEMO_POOL_SEED = 400, 900_000
COLOR_NAMES = tuple(COLORS)
_NAMES = """
Max Ida Jon Lou Meg Ray Eve Pam Bob Kim Ann Zed Gus Leo Mia Tom Sue Ben Amy Dan Liz Ned Ted Joe Kay
Roy Una Vic Wes Abe Cal Dot Eli Fay Gil Hal Ian Jim Ken Lea Moe Nan Oz Pia Rex Sam Tia Uma Val Zoe
"""
NAMES = tuple(_NAMES.split())

INTRODUCTIONS = ("This is {name}.", "Here is {name}.", "The next one is {name}.")
REMARKS = ("Here is a picture.", "Look at this one.", "And another one.", "Here are my pictures.", "More pictures:")
FACTS = ("The code of {name} is {code}.",)
GREETINGS = ("Hello!", "Thanks.", "Okay.", "Please:", "Now:", "And:")
ACKNOWLEDGEMENT = "Okay."

QUESTIONS: dict[str, tuple[str, ...]] = {
    "describe_number": (
        "What is in picture {n}?",
        "What do you see in picture {n}?",
        "What does picture {n} show?",
        "What's in picture {n}?",
        "Describe picture {n}.",
        "Tell me what is in picture {n}.",
    ),
    "color_number": (
        "What color is the shape in picture {n}?",
        "Which color is the shape in picture {n}?",
        "What is the color of the shape in picture {n}?",
        "What color is in picture {n}?",
        "What colour is picture {n}?",
    ),
    "shape_number": (
        "Which shape is in picture {n}?",
        "What shape is in picture {n}?",
        "What shape do you see in picture {n}?",
        "What is the shape in picture {n}?",
        "Name the shape in picture {n}.",
    ),
    "digit_number": (
        "Which digit is in picture {n}?",
        "What digit is in picture {n}?",
        "What is the digit in picture {n}?",
        "Which number is written in picture {n}?",
        "Read the digit in picture {n}.",
    ),
    "describe_name": (
        "Describe {name}.",
        "What do you see in the picture of {name}?",
        "What is in the picture of {name}?",
        "What does {name} look like?",
        "Tell me what {name} looks like.",
    ),
    "color_name": ("What color is {name}?", "Which color is {name}?", "What is the color of {name}?"),
    "shape_name": ("Which shape is {name}?", "What shape is {name}?", "What is the shape of {name}?"),
    "digit_name": ("Which digit does {name} have?", "What digit does {name} have?", "What is the digit of {name}?"),
    "find": (
        "Which picture shows {a} {color} {shape}?",
        "Which picture has {a} {color} {shape}?",
        "Where is the {color} {shape}?",
        "In which picture is the {color} {shape}?",
    ),
    "picture_of": ("Which picture is {name}?", "Which picture shows {name}?", "Where is {name}?"),
    "code": ("What is the code of {name}?", "What is {name}'s code?", "Tell me the code of {name}."),
}
_WEIGHT = {"describe_number": 2.0, "describe_name": 1.5, "find": 1.5, "code": 2.0}


def article(color: str) -> str:
    return "an" if color[0] in "aeiou" else "a"


def describe(scene: Scene) -> str:
    return (
        f"{article(scene.color_name).capitalize()} {scene.color_name} {scene.shape_name} with the digit {scene.digit}."
    )


@dataclass(frozen=True)
class Target:
    """What a question refers to, for the auxiliary probes; None where it does not apply."""

    kind: str
    number: int | None = None
    name: str | None = None
    color: int | None = None
    shape: int | None = None


@dataclass
class Conversation:
    """``pictures`` and ``numbers`` are in order of appearance; ``targets`` holds one entry per assistant message."""

    messages: list[Message] = field(default_factory=list)
    pictures: list[int] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    names: list[str | None] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)  # line of text -> name it is about
    targets: list[Target] = field(default_factory=list)


@dataclass
class _Known:
    """What has been said so far in a conversation."""

    scenes: list[Scene] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    names: list[str | None] = field(default_factory=list)
    codes: dict[str, str] = field(default_factory=dict)


def _styled(rng: random.Random, text: str) -> str:
    """Typed as people type: sometimes without capitals, without a question mark or with a greeting."""
    if rng.random() < 0.05:
        text = text.lower()
    if rng.random() < 0.12:
        text = text[0].lower() + text[1:]
    if rng.random() < 0.12:
        text = text.rstrip("?.")
    if rng.random() < 0.05:
        text = f"{rng.choice(GREETINGS)} {text}"
    return text


def ask(rng: random.Random, known: _Known, kind: str, style: bool = True) -> tuple[str, str, Target] | None:
    """One question of the kind with its answer, or None if nothing fits it."""
    text = rng.choice(QUESTIONS[kind])
    if kind == "code":
        if not known.codes:
            return None
        name = rng.choice(sorted(known.codes))
        question, answer, target = text.format(name=name), f"{known.codes[name]}.", Target(kind, name=name)
    elif kind == "find":
        pairs = [(s.color, s.shape) for s in known.scenes]
        unique = [i for i, p in enumerate(pairs) if pairs.count(p) == 1]
        if not unique:
            return None
        i = rng.choice(unique)
        scene = known.scenes[i]
        question = text.format(a=article(scene.color_name), color=scene.color_name, shape=scene.shape_name)
        answer, target = f"Picture {known.numbers[i]}.", Target(kind, color=scene.color, shape=scene.shape)
    else:
        by_number = kind.endswith("_number")
        choices = [i for i, name in enumerate(known.names) if by_number or name]
        if not choices:
            return None
        i = rng.choice(choices)
        scene, number, name_or_none = known.scenes[i], known.numbers[i], known.names[i]
        question = text.format(n=number, name=name_or_none)
        target = Target(kind, number=number) if by_number else Target(kind, name=name_or_none)
        answers: dict[str, Callable[[], str]] = {
            "describe": lambda: describe(scene),
            "color": lambda: f"{scene.color_name.capitalize()}.",
            "shape": lambda: f"{scene.shape_name.capitalize()}.",
            "digit": lambda: f"{scene.digit}.",
            "picture": lambda: f"Picture {number}.",
        }
        answer = answers[kind.split("_")[0]]()
    return (_styled(rng, question) if style else question), answer, target


def _any_question(rng: random.Random, known: _Known) -> tuple[str, str, Target]:
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
    conversation, known = Conversation(), _Known()
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


@dataclass(frozen=True)
class Album:
    """Pictures (rows of a pool) shown in one user message, and questions as (kind, question, answer)."""

    messages: list[Message]
    pictures: list[int]
    questions: list[tuple[str, str, str]]


def make_album(seed: int, labels: np.ndarray, n_pictures: int, n_per_kind: int, style: bool = False) -> Album:
    """An album for a demonstration or a test: no two pictures alike, half of them named, codes in between.

    Questions of every kind, the same number each; nothing is chosen by what a model answers. ``style`` types some
    of them carelessly, as the training does.
    """
    rng = random.Random(f"album {seed} {n_pictures}")
    names = rng.sample(NAMES, n_pictures + 4)
    named = set(rng.sample(range(n_pictures), n_pictures // 2))
    coded = dict(zip(rng.sample(range(n_pictures), min(4, n_pictures)), names[n_pictures:], strict=False))
    known = _Known()
    parts: list[Message] = []
    pictures: list[int] = []
    for i in range(n_pictures):
        if i in named:
            parts.append({"type": "text", "text": rng.choice(INTRODUCTIONS).format(name=names[i])})
        row = rng.randrange(len(labels))
        while any(tuple(labels[row][:2]) == scene[:2] for scene in known.scenes):
            row = rng.randrange(len(labels))
        pictures.append(row)
        parts.append({"type": "image", "image": i})
        known.scenes.append(Scene(*(int(v) for v in labels[row])))
        known.numbers.append(i + 1)
        known.names.append(names[i] if i in named else None)
        if i in coded:
            known.codes[coded[i]] = f"{rng.randint(10, 99)} {rng.randint(10, 99)}"
            line = rng.choice(FACTS).format(name=coded[i], code=known.codes[coded[i]])
            parts.append({"type": "text", "text": line})
    questions: list[tuple[str, str, str]] = []
    for kind in QUESTIONS:
        answers: list[str] = []
        tries = 0
        while len(answers) < n_per_kind:
            found = ask(rng, known, kind, style)
            assert found is not None, f"an album always has something to ask about: {kind}"
            tries += 1
            if found[1] not in answers or tries > 50 or n_pictures < 2 * n_per_kind:
                answers.append(found[1])
                questions.append((kind, found[0], found[1]))
    return Album([{"role": "user", "content": parts}], pictures, questions)


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
