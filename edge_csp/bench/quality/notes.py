"""Albums of text: notes full of facts, long texts with a few needles, and chats in which things are told.

Questions about them are judged by the token that matters: the answer is made to begin as the question's `prefix` has
it, and the likeliest token after that is looked at. So models without a chat template can be asked, too. Half of the
questions about facts, and all about needles, are in other words than the text.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from edge_csp.bench.quality import corpus
from edge_csp.bench.quality.albums import Album, Question, Turn
from edge_csp.chat import Message

CHARS_PER_TOKEN = 4.3
"""Of English, about, in the vocabularies of today; so all models read the same text."""
FACT_EVERY = 5
"""Of so many sentences of the notes one is a fact; the others say nothing that is asked for."""
DEPTHS = (10, 30, 50, 70, 90)
"""Where needles are, in percent of the text."""
N_TURN = 20
"""Turns of a chat in which something is told."""
N_TOGETHER = 5
"""Turns that are reported together."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _phrases(text: str) -> tuple[str, ...]:
    return tuple(" ".join(one.split()) for one in text.split("|"))


NAMES = _words(
    """
    Alice Bob Carol David Emma Frank Grace Henry Irene Jack Karen Liam Maria Noah Olivia Peter Rachel Sam Tina Vera
    Anna Carl Dora Paul Lucy Mark Susan Tom Julia Steve Martin Laura Simon Nina Oscar Helen George Ruth Victor Diana
    """
)


@dataclass(frozen=True)
class Relation:
    """A kind of fact. In its texts {n} is the name and {v} the value; questions come with the beginning of the answer.
    other_…: in other words.
    """

    name: str
    fact: str
    question: str
    prefix: str
    other_question: str
    other_prefix: str
    values: tuple[str, ...]


RELATIONS = (
    Relation(
        "city",
        "{n} lives in {v}.",
        "Where does {n} live?",
        "{n} lives in",
        "What is the home town of {n}?",
        "{n}'s home town is",
        _words("Paris London Berlin Madrid Rome Vienna Oslo Prague Dublin Athens Tokyo Sydney Toronto Miami"),
    ),
    Relation(
        "job",
        "{n} works as a {v}.",
        "What does {n} work as?",
        "{n} works as a",
        "What is the profession of {n}?",
        "{n} is by profession a",
        _words("teacher doctor baker pilot farmer lawyer nurse writer singer carpenter"),
    ),
    Relation(
        "animal",
        "{n} owns a {v}.",
        "Which animal does {n} own?",
        "{n} owns a",
        "What kind of pet lives with {n}?",
        "{n} has a pet that is a",
        _words("dog cat rabbit horse snake turtle parrot goat mouse duck"),
    ),
    Relation(
        "color",
        "{n} drives a {v} car.",
        "Which color is the car that {n} drives?",
        "{n} drives a",
        "What kind of vehicle does {n} use?",
        "{n} uses a",
        _words("red blue green yellow black white orange purple brown silver"),
    ),
    Relation(
        "language",
        "{n} speaks {v}.",
        "Which language does {n} speak?",
        "{n} speaks",
        "In which language does {n} talk?",
        "{n} talks in",
        _words("French Spanish Italian German Russian Arabic Dutch Greek Polish Swedish"),
    ),
    Relation(
        "drink",
        "{n} drinks {v} for breakfast.",
        "What does {n} drink for breakfast?",
        "For breakfast {n} drinks",
        "What is the morning beverage of {n}?",
        "{n}'s morning beverage is",
        _words("coffee tea milk water juice lemonade cocoa wine"),
    ),
)

NEEDLES = (
    Relation(
        "passport",
        "Mr. Harper keeps his passport inside the {v}.",
        "",
        "",
        "In which place has Mr. Harper put his travel document?",
        "Mr. Harper has put his travel document inside the",
        _words("piano oven drawer kitchen garage basement fridge safe"),
    ),
    Relation(
        "school",
        "The language that is taught at the school of Millbrook is {v}.",
        "",
        "",
        "What do pupils in Millbrook learn to speak?",
        "The language that pupils in Millbrook learn to speak is",
        _words("French Spanish Latin Italian German Russian Chinese Arabic"),
    ),
    Relation(
        "fruit",
        "Aunt Clara likes no fruit better than the {v}.",
        "",
        "",
        "What is the favourite fruit of Aunt Clara?",
        "The favourite fruit of Aunt Clara is the",
        _words("mango apple banana cherry peach orange lemon strawberry"),
    ),
    Relation(
        "champion",
        "The winner of the chess tournament came all the way from {v}.",
        "",
        "",
        "From where did the best chess player travel?",
        "The best chess player travelled from",
        _words("Norway Brazil Japan Canada Egypt India Poland Spain"),
    ),
    Relation(
        "clock",
        "The old clock in the tower of Ashford was repaired by a {v}.",
        "",
        "",
        "What is the profession of the person who mended the clock in Ashford?",
        "The person who mended the clock in Ashford is a",
        _words("baker teacher farmer doctor pilot student priest soldier"),
    ),
)
MOST_FACTS = len(NAMES) * len(RELATIONS)

_WHO = _phrases(
    """
    a delivery van | the mayor | a young couple | the postman | somebody from the council | an old man |
    the owner of the kiosk | two children | a group of tourists | the night train | a street musician |
    the gardener | a reporter | the choir | a painter | the football team | a stray cyclist | the florist |
    a class of pupils | the caretaker
    """
)
_DID = _phrases(
    """
    stopped | waited for a while | was seen again | came by much too late | turned around | had to wait |
    arrived without a word | left early | was looking for shelter | took a short break | stood in the rain |
    asked for the way | made a lot of noise | left a bag behind | was nowhere to be found
    """
)
_WHERE = _phrases(
    """
    at the corner | near the station | in front of the town hall | behind the church | by the river |
    on the old bridge | at the market | next to the library | below the castle | at the end of the street |
    in the park | beside the fountain | at the bus stop | outside the cinema
    """
)
_WHEN = _phrases(
    """
    that morning | in the evening | shortly after lunch | as on every Monday | long before sunrise |
    during the storm | at the weekend | when the bells rang | for the second time | after the concert |
    while the shops were closed | late in the afternoon
    """
)


@dataclass(frozen=True)
class Fact:
    """What is known of a person."""

    person: str
    relation: Relation
    value: str

    @property
    def text(self) -> str:
        return self.relation.fact.format(n=self.person, v=self.value)

    def question(self, *, other_words: bool, kind: str) -> Question:
        relation = self.relation
        text, prefix = relation.question, relation.prefix
        if other_words:
            text, prefix = relation.other_question, relation.other_prefix
        return Question(kind, text.format(n=self.person), (self.value,), "token", prefix.format(n=self.person))


def draw_facts(generator: random.Random, n: int) -> list[Fact]:
    """Facts of all kinds by turns. Nobody has two of them before everybody has one, and no value is there twice before
    all of its kind have been, so that few guesses are right.
    """
    names, kinds = generator.sample(NAMES, len(NAMES)), generator.sample(RELATIONS, len(RELATIONS))
    values = {relation.name: _in_turns(generator, relation.values, n) for relation in RELATIONS}
    found = []
    for number in range(min(n, MOST_FACTS)):
        relation = kinds[(number + number // len(names)) % len(kinds)]
        found.append(Fact(names[number % len(names)], relation, values[relation.name].pop()))
    return found


def _in_turns(generator: random.Random, values: Sequence[str], n: int) -> list[str]:
    """At least n of the values, all of them in every round."""
    rounds = [generator.sample(values, len(values)) for _ in range(-(-n // len(values)))]
    return [value for one in rounds for value in one]


def filler(generator: random.Random) -> str:
    """A sentence about nothing that is asked for."""
    who, did, where, when = (generator.choice(words) for words in (_WHO, _DID, _WHERE, _WHEN))
    sentence = f"{when}, {who} {did} {where}" if generator.random() < 0.3 else f"{who} {did} {where} {when}"
    return f"{sentence[0].upper()}{sentence[1:]}."


def n_char(n_token: int) -> int:
    return int(n_token * CHARS_PER_TOKEN)


def facts_album(name: str, n_token: int, n_question: int, seed: str) -> Album:
    """Notes of about so many tokens, every third sentence a fact, and questions about facts from all over them. There
    are as many facts as questions at least.
    """
    generator = random.Random(seed)
    sentences: list[str] = []
    asked: list[Fact] = []
    facts = iter(draw_facts(generator, MOST_FACTS))
    while sum(map(len, sentences)) + len(sentences) < n_char(n_token) or len(asked) < n_question:
        group = [filler(generator) for _ in range(FACT_EVERY - 1)]
        if (fact := next(facts, None)) is not None:
            asked.append(fact)
            group.append(fact.text)
        sentences += generator.sample(group, len(group))
    generator.shuffle(asked)
    questions = [
        fact.question(other_words=bool(number % 2), kind="other words" if number % 2 else "same words")
        for number, fact in enumerate(asked[:n_question])
    ]
    return Album(name, 0, _read("these notes", " ".join(sentences)), questions, [])


def needle_album(name: str, n_token: int, n_question: int, seed: str) -> Album:
    """English of about so many tokens with a needle at each depth, and a question about each."""
    generator = random.Random(seed)
    text = some_prose(generator, n_char(n_token))
    size = sum(map(len, text))
    needles = generator.sample(NEEDLES, len(DEPTHS))
    questions: list[Question] = []
    for depth, relation in reversed(list(zip(DEPTHS, needles, strict=True))):  # from the end: places do not move
        fact = Fact("", relation, generator.choice(relation.values))
        questions.insert(0, fact.question(other_words=True, kind=f"depth {depth}%"))
        text.insert(_place(text, size * depth / 100), fact.text)
    return Album(name, 0, _read("this text", "\n".join(text)), questions[:n_question], [])


def _place(paragraphs: Sequence[str], n_before: float) -> int:
    """Where a paragraph can be put in, with about so many characters before it."""
    ends = [sum(map(len, paragraphs[:number])) for number in range(len(paragraphs) + 1)]
    return min(range(len(ends)), key=lambda number: abs(ends[number] - n_before))


def some_prose(generator: random.Random, n: int) -> list[str]:
    """Sentences of the corpus from somewhere on, of about n characters."""
    paragraphs = corpus.prose()
    begin, found = generator.randrange(len(paragraphs)), list[str]()
    while sum(map(len, found)) < n:
        found.append(paragraphs[(begin + len(found)) % len(paragraphs)])
    return found


def _read(what: str, text: str) -> list[Message]:
    return [{"role": "user", "content": f"Read {what}.\n\n{text}"}]


def talk_album(name: str, n_token: int, seed: str) -> Album:
    """A chat: in every turn the user tells two facts among other things, of about n_token tokens in all turns, and asks
    about one of them; then about the other ones, of turns in any order.
    """
    generator = random.Random(seed)
    facts = draw_facts(generator, 2 * N_TURN)
    turns: list[Turn] = []
    for number, (new, old) in enumerate(zip(facts[::2], facts[1::2], strict=True)):
        sentences = [new.text, old.text]
        while sum(map(len, sentences)) + len(sentences) < n_char(n_token) // N_TURN:
            sentences.append(filler(generator))
        told = " ".join(generator.sample(sentences, len(sentences)))
        question = new.question(other_words=bool(number % 2), kind="new")
        turns.append(Turn([{"type": "text", "text": told}], question))
    for number in generator.sample(range(N_TURN), N_TURN):
        other_words, first = bool(generator.getrandbits(1)), number // N_TOGETHER * N_TOGETHER + 1
        kind = f"turns {first}-{first + N_TOGETHER - 1}"
        question = facts[2 * number + 1].question(other_words=other_words, kind=kind)
        turns.append(Turn([], question))
    return Album(name, 0, [], [], turns)
