"""What is shown and asked: albums drawn for the embedded model, or a folder of the user's own (docs/quality.md)."""

from __future__ import annotations

import hashlib
import json
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from edge_csp.chat import Message
from edge_csp.errors import BenchError
from edge_csp.images import Picture, load_picture

N_POOL = 48
"""Scenes that the pictures of an album are drawn from."""
SEED = 20_000_000
"""Far away from the seeds of the embedded album and of the trainer's check."""
MOST_PICTURES = 16
"""The embedded model has never seen more."""


JUDGES = ("exact", "contains", "token")
"""How answers are compared with those that are accepted, see Question."""
LEAST_LETTERS = 3
"""Of a token that is taken for the beginning of a longer answer."""


@dataclass(frozen=True)
class Question:
    """kind: what is asked for, any word. accepted: answers that are right.

    judge: "exact": the answer is one of them, see normalised(); "contains": one of them is somewhere in it, as whole
    words; "token": only the likeliest next token is looked at, and one of them begins with it.
    prefix: how the answer begins in any case; what is judged comes behind it.
    """

    kind: str
    text: str
    accepted: tuple[str, ...]
    judge: str = "exact"
    prefix: str = ""

    def is_right(self, answer: str) -> bool:
        """Of an answer without the prefix."""
        given = normalised(answer)
        accepted = list(map(normalised, self.accepted))
        if self.judge == "contains":
            return any(re.search(rf"(?<!\w){re.escape(one)}(?!\w)", given) for one in accepted)
        if self.judge == "token":
            return any(one.startswith(given) and len(given) >= min(LEAST_LETTERS, len(one)) for one in accepted)
        return given in accepted

    def n_predict(self, most: int) -> int:
        """Tokens of an answer, at most."""
        return 1 if self.judge == "token" else most

    def said(self, answer: str) -> str:
        """What a chat goes on with after an answer; one of a single token is not left without its end."""
        whole = f"{self.accepted[0]}." if self.judge == "token" else answer
        return f"{self.prefix} {whole}" if self.prefix else whole


@dataclass(frozen=True)
class Turn:
    """A message of a long conversation: the parts that come with a question, and the question."""

    parts: list[dict[str, Any]]
    question: Question


@dataclass(frozen=True)
class Passage:
    """Text that is read and then gone on with. text: as it is; messages: or these, as the model's template writes
    them. n_token: that are read, about; n_ahead: that follow, exactly.
    """

    n_token: int
    n_ahead: int
    text: str = ""
    messages: tuple[Message, ...] = ()


@dataclass(frozen=True)
class Album:
    """name: tells albums apart. messages: what is read first. questions: asked after it. turns: of the conversation
    in which pictures arrive one by one; it has nothing to do with the messages, nor has the passage.
    """

    name: str
    n_picture: int
    messages: list[Message]
    questions: list[Question]
    turns: list[Turn]
    passage: Passage | None = None


def normalised(answer: str) -> str:
    """Answers that differ in letter case, blanks or a full stop at the end are the same."""
    return " ".join(answer.casefold().split()).rstrip(".").rstrip()


def draw_album(index: int, n_picture: int, n_question: int, seed: int) -> Album:
    """An album that the embedded model can read, of digits that it has never seen: the same one for the same numbers.

    Questions are of all kinds in turn, some of them typed carelessly. Raises BenchError for too few or many pictures.
    """
    from PIL import Image

    from edge_csp.demo.albums import QUESTIONS, make_album, make_chat
    from edge_csp.demo.scenes import held_out_scenes

    if not 2 <= n_picture <= MOST_PICTURES:
        raise BenchError(f"albums of {n_picture} pictures cannot be drawn: 2 to {MOST_PICTURES}")
    own = SEED + 100_000 * seed + index
    pool, labels = held_out_scenes(N_POOL, own)
    drawn = make_album(own, labels, n_picture, -(-n_question // len(QUESTIONS)), style=True)

    def shown(parts: Sequence[dict[str, Any]], rows: Sequence[int | None]) -> list[dict[str, Any]]:
        return [
            {"type": "image", "picture": load_picture(Image.fromarray(pool[rows[part["image"]]]), name=f"{index}.png")}
            if part["type"] == "image"
            else dict(part)
            for part in parts
        ]

    questions = [Question(kind, text, (answer,)) for kind, text, answer in drawn.questions]
    random.Random(f"questions {own}").shuffle(questions)
    chat = make_chat(own, labels, n_picture)
    rows = [turn.picture for turn in chat if turn.picture is not None]
    return Album(
        str(index),
        n_picture,
        [{**message, "content": shown(message["content"], drawn.pictures)} for message in drawn.messages],
        questions[:n_question],
        [
            Turn(shown(turn.parts, rows), Question(_about(turn.picture) + turn.kind, turn.question, (turn.answer,)))
            for turn in chat
        ],
    )


def _about(picture: int | None) -> str:
    return "old " if picture is None else "new "


def album_files(folder: Path) -> list[Path]:
    """`album.json` in a folder, or in every folder in it that has one, in the order of names.

    Raises BenchError if there is none.
    """
    if not folder.is_dir():
        raise BenchError(f"{folder} is no folder")
    files = [folder / "album.json"] if (folder / "album.json").is_file() else sorted(folder.glob("*/album.json"))
    if not files:
        raise BenchError(f"{folder}: neither album.json nor folders with one")
    return files


def read_album(file: Path) -> Album:
    """An album of the user's own, with its pictures. The format: docs/bench.md.

    Raises BenchError naming the file and what is wrong with it, ImageError for a picture.
    """
    pictures: dict[str, Picture] = {}

    def part(given: dict[str, Any]) -> dict[str, Any]:
        if given["type"] == "text":
            return {"type": "text", "text": str(given["text"])}
        if given["type"] != "image":
            raise ValueError(f"a part is of type {given['type']!r}: use text or image")
        name = str(given["image"])
        if name not in pictures:
            pictures[name] = load_picture(file.parent / name)
        return {"type": "image", "picture": pictures[name]}

    def parts(given: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{"type": "text", "text": given}] if isinstance(given, str) else [part(one) for one in given]

    def question(given: dict[str, Any]) -> Question:
        answers = [given["a"]] if isinstance(given["a"], str) else list(given["a"])
        if not answers or not all(isinstance(answer, str) for answer in answers):
            raise ValueError(f"the answer of {given['q']!r} is no text and no list of texts")
        if (judge := given.get("judge", judge_of_all)) not in JUDGES:
            raise ValueError(f"judge is {judge!r}: use {', '.join(JUDGES)}")
        kind, prefix = str(given.get("kind", "")), str(given.get("prefix", ""))
        return Question(kind, str(given["q"]), tuple(answers), judge, prefix)

    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        judge_of_all = data.get("judge", JUDGES[0])
        messages: list[dict[str, Any]] = [
            {"role": str(one["role"]), "content": parts(one["content"])} for one in data.get("messages", [])
        ]
        questions = [question(one) for one in data.get("questions", [])]
        turns = [Turn(parts(one["content"]), question(one)) for one in data.get("turns", [])]
        if not questions and not turns:
            raise ValueError("neither questions nor turns")
        if bool(messages) != bool(questions):
            raise ValueError("messages and questions belong together")
    except OSError as error:
        raise BenchError(f"{file} cannot be read ({error.strerror or error})") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        missing = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise BenchError(f"{file} is no album: {missing}") from error
    shown = [one for message in messages for one in message["content"]] or [one for turn in turns for one in turn.parts]
    n_picture = sum(one["type"] == "image" for one in shown)
    return Album(file.parent.resolve().name, n_picture, list(messages), questions, turns)


@dataclass(frozen=True)
class Shape:
    """What an album has, and its number among those with as many pictures, or of the same topic and length."""

    n_picture: int
    index: int
    n_question: int
    n_turn: int
    n_passage: int = 0
    topic: str = ""
    length: int = 0

    def about(self) -> dict[str, Any]:
        """What records tell of the album; it tells it from all others."""
        return {"topic": self.topic, "length": self.length, "n_picture": self.n_picture, "album": self.index}

    @property
    def key(self) -> tuple[Any, ...]:
        return tuple(self.about().values())

    @property
    def words(self) -> str:
        if self.topic:
            return f"{self.topic} {self.index} of {self.length} tokens"
        return f"album {self.index} of {self.n_picture} pictures"


@dataclass(frozen=True)
class Source(ABC):
    """Where albums come from. n_album: of each kind. n_question: about an album, at most. seed: draws other ones."""

    meaningless: ClassVar[frozenset[str]]
    """Protocols and policies that there is nothing for."""

    n_album: int
    n_question: int
    seed: int = 1

    @abstractmethod
    def shapes(self) -> list[Shape]:
        """Of every album. Raises EdgeCspError if it cannot be made."""

    @abstractmethod
    def album(self, shape: Shape) -> Album:
        """One of them."""

    @abstractmethod
    def same(self) -> dict[str, Any]:
        """What has to be the same in all records of a file."""

    @abstractmethod
    def sizes(self) -> dict[str, Any]:
        """What may differ there."""

    @abstractmethod
    def options(self) -> list[str]:
        """Words of the command line that ask for this source."""

    @property
    def origin(self) -> str:
        """Where albums are from, in words."""
        return f"drawn with seed {self.seed}"


@dataclass(frozen=True)
class AlbumSource(Source):
    """Albums from a folder, or drawn ones of these numbers of pictures."""

    meaningless = frozenset({"continue"})

    n_pictures: tuple[int, ...] = ()
    folder: Path | None = None

    def shapes(self) -> list[Shape]:
        if self.folder is None:
            return [
                Shape(n, index, self.n_question, 2 * n - 1) for n in self.n_pictures for index in range(self.n_album)
            ]
        albums = [self._own(index) for index in range(min(self.n_album, len(album_files(self.folder))))]
        return [
            Shape(album.n_picture, index, len(album.questions), len(album.turns)) for index, album in enumerate(albums)
        ]

    def album(self, shape: Shape) -> Album:
        """One of them; those of a folder have their own number of pictures."""
        if self.folder is None:
            return draw_album(shape.index, shape.n_picture, self.n_question, self.seed)
        return self._own(shape.index)

    def _own(self, index: int) -> Album:
        assert self.folder
        album = read_album(album_files(self.folder)[index])
        return replace(album, questions=album.questions[: self.n_question])

    def same(self) -> dict[str, Any]:
        return {"task": "albums", "seed": self.seed, "questions": self.n_question, "folder": self.digest()}

    def sizes(self) -> dict[str, Any]:
        return {"pictures": list(self.n_pictures), "albums": self.n_album}

    def options(self) -> list[str]:
        which = ["--folder", self.folder.name] if self.folder else ["--pictures", ",".join(map(str, self.n_pictures))]
        seed = [] if self.folder else ["--seed", str(self.seed)]
        return [*which, *seed, "--albums", str(self.n_album), "--questions", str(self.n_question)]

    @property
    def origin(self) -> str:
        return f"the folder `{self.folder.name}`" if self.folder else super().origin

    def digest(self) -> str:
        """Of all files of the folder; empty for drawn albums."""
        if self.folder is None:
            return ""
        digest = hashlib.sha256()
        for file in sorted(file for file in self.folder.rglob("*") if file.is_file()):
            digest.update(f"{file.relative_to(self.folder).as_posix()} {file.stat().st_size} ".encode())
            digest.update(file.read_bytes())
        return digest.hexdigest()[:16]
