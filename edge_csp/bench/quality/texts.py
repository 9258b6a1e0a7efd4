"""The albums of `--task text`: passages to go on with, notes, needles and chats of chosen lengths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edge_csp.bench.quality import corpus
from edge_csp.bench.quality.albums import Album, Shape, Source
from edge_csp.bench.quality.notes import DEPTHS, MOST_FACTS, N_TURN, facts_album, needle_album, talk_album
from edge_csp.bench.quality.passages import draw_passage
from edge_csp.bench.quality.specs import DEFAULTS, DOWNSAMPLE
from edge_csp.errors import BenchError

PASSAGES = ("prose", "code", "json", "chat")
LEAST = 16
"""Tokens of a text."""
PROTOCOLS: tuple[str, ...] = ("continue", "window", "before", "later", "bounded")
"""What is measured unless something else is asked for."""
BUDGETS: tuple[str, ...] = ("40%", "20%")
"""The same."""
POLICIES: tuple[str, ...] = tuple(one for one in DEFAULTS if one.partition(":")[0] not in {"lookm", DOWNSAMPLE})
"""The same; without pictures those that are left out are like others, or nothing at all."""


@dataclass(frozen=True)
class TextSource(Source):
    """Texts of about these numbers of tokens, n_album of each topic and length."""

    meaningless = frozenset({DOWNSAMPLE})

    lengths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Raises BenchError for lengths that no text has, and for more questions than there are facts."""
        if not self.lengths or min(self.lengths) < LEAST:
            raise BenchError(f"texts have {LEAST} tokens or more: {', '.join(map(str, self.lengths)) or 'no length'}")
        if self.n_question > MOST_FACTS:
            raise BenchError(f"there are {MOST_FACTS} facts to ask about, and no {self.n_question}")

    def shapes(self) -> list[Shape]:
        corpus.digest()  # refuses where there are no texts
        n_needle = min(self.n_question, len(DEPTHS))
        kinds = [(topic, 0, 0, 1) for topic in PASSAGES]
        kinds += [("facts", self.n_question, 0, 0), ("needle", n_needle, 0, 0), ("talk", 0, 2 * N_TURN, 0)]
        return [
            Shape(0, index, n_question, n_turn, n_passage, topic, length)
            for length in self.lengths
            for topic, n_question, n_turn, n_passage in kinds
            for index in range(self.n_album)
        ]

    def album(self, shape: Shape) -> Album:
        name, seed = f"{shape.topic} {shape.index}", f"{self.seed} {shape.topic} {shape.length} {shape.index}"
        if shape.topic == "facts":
            return facts_album(name, shape.length, self.n_question, seed)
        if shape.topic == "needle":
            return needle_album(name, shape.length, self.n_question, seed)
        if shape.topic == "talk":
            return talk_album(name, shape.length, seed)
        return Album(name, 0, [], [], [], draw_passage(shape.topic, shape.length, seed))

    def same(self) -> dict[str, Any]:
        return {"task": "text", "seed": self.seed, "texts": corpus.digest()}

    def sizes(self) -> dict[str, Any]:
        return {"lengths": list(self.lengths), "albums": self.n_album, "questions": self.n_question}

    def options(self) -> list[str]:
        lengths = ",".join(map(str, self.lengths))
        words = ["--task", "text", "--lengths", lengths, "--seed", str(self.seed)]
        return [*words, "--albums", str(self.n_album), "--questions", str(self.n_question)]
