"""Albums that the embedded model can read: numbered pictures, names, facts in words, questions with exact answers."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from edge_csp.demo.scenes import COLORS, Labels, Scene

Message = dict[str, Any]

DEMO_PICTURES = 12  # of the embedded album, drawn from a pool of held-out scenes
DEMO_POOL, DEMO_POOL_SEED = 400, 900_000
COLOR_NAMES = tuple(COLORS)
_NAMES = """
Max Ida Jon Lou Meg Ray Eve Pam Bob Kim Ann Zed Gus Leo Mia Tom Sue Ben Amy Dan Liz Ned Ted Joe Kay
Roy Una Vic Wes Abe Cal Dot Eli Fay Gil Hal Ian Jim Ken Lea Moe Nan Oz Pia Rex Sam Tia Uma Val Zoe
"""
NAMES = tuple(_NAMES.split())

INTRODUCTIONS = ("This is {name}.", "Here is {name}.", "The next one is {name}.")
FACTS = ("The code of {name} is {code}.",)
GREETINGS = ("Hello!", "Thanks.", "Okay.", "Please:", "Now:", "And:")

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
class Known:
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


def ask(rng: random.Random, known: Known, kind: str, style: bool = True) -> tuple[str, str, Target] | None:
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


@dataclass(frozen=True)
class Album:
    """Pictures (rows of a pool) shown in one user message, and questions as (kind, question, answer)."""

    messages: list[Message]
    pictures: list[int]
    questions: list[tuple[str, str, str]]


def _show(rng: random.Random, labels: Labels, n_pictures: int, known: Known) -> Iterator[tuple[int, list[Message]]]:
    """Pictures one after the other, as a row of the pool and the parts of a message; `known` follows."""
    names = rng.sample(NAMES, n_pictures + 4)
    named = set(rng.sample(range(n_pictures), n_pictures // 2))
    coded = dict(zip(rng.sample(range(n_pictures), min(4, n_pictures)), names[n_pictures:], strict=False))
    for i in range(n_pictures):
        parts: list[Message] = []
        if i in named:
            parts.append({"type": "text", "text": rng.choice(INTRODUCTIONS).format(name=names[i])})
        row = rng.randrange(len(labels))
        while any(tuple(labels[row][:2]) == scene[:2] for scene in known.scenes):
            row = rng.randrange(len(labels))
        parts.append({"type": "image", "image": i})
        known.scenes.append(Scene(*(int(v) for v in labels[row])))
        known.numbers.append(i + 1)
        known.names.append(names[i] if i in named else None)
        if i in coded:
            known.codes[coded[i]] = f"{rng.randint(10, 99)} {rng.randint(10, 99)}"
            line = rng.choice(FACTS).format(name=coded[i], code=known.codes[coded[i]])
            parts.append({"type": "text", "text": line})
        yield row, parts


def make_album(seed: int, labels: Labels, n_pictures: int, n_per_kind: int, style: bool = False) -> Album:
    """An album for a demonstration or a test: no two pictures alike, half of them named, codes in between.

    Questions of every kind, the same number each; nothing is chosen by what a model answers. ``style`` types some
    of them carelessly, as the training does.
    """
    rng = random.Random(f"album {seed} {n_pictures}")
    known = Known()
    parts: list[Message] = []
    pictures: list[int] = []
    for row, shown in _show(rng, labels, n_pictures, known):
        pictures.append(row)
        parts += shown
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


@dataclass(frozen=True)
class ChatTurn:
    """What a user sends: a new picture with what belongs to it, or nothing new; and a question with its answer.

    picture: a row of a pool, None if nothing is new. kind: of the question.
    """

    parts: list[Message]
    picture: int | None
    kind: str
    question: str
    answer: str


def make_chat(seed: int, labels: Labels, n_pictures: int) -> list[ChatTurn]:
    """A chat in which pictures arrive one by one: every one comes with a question about itself, and from the second
    on a turn follows with a question about something older. Pictures and facts are as in make_album().
    """
    rng = random.Random(f"chat {seed} {n_pictures}")
    known, turns = Known(), list[ChatTurn]()

    def turn(parts: list[Message], picture: int | None, about: Known) -> ChatTurn:
        while (found := ask(rng, about, kind := rng.choice(list(QUESTIONS)), True)) is None:
            pass
        return ChatTurn(parts, picture, kind, found[0], found[1])

    old_codes: dict[str, str] = {}
    for row, parts in _show(rng, labels, n_pictures, known):
        new_codes = {name: code for name, code in known.codes.items() if name not in old_codes}
        new = Known(known.scenes[-1:], known.numbers[-1:], known.names[-1:], new_codes)
        turns.append(turn(parts, row, new))
        if len(known.scenes) > 1:
            old = Known(known.scenes[:-1], known.numbers[:-1], known.names[:-1], dict(old_codes))
            turns.append(turn([], None, old))
        old_codes = dict(known.codes)
    return turns
