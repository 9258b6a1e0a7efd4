"""What the defaults promise, on models that nobody here made: python -m tools.check_defaults MODEL.gguf …

A chat that fits computes what a context without pruning computes: ten turns, answers and logits, bit for bit. And no
answer falls apart at `--budget 20%`: prompts of 50 sizes from 5 to 4,000 tokens, an answer of 48 tokens each; it falls
apart if one token stands in it more than 8 times in a row where the full cache has no such run.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import numpy as np

from edge_csp import Context, Pruning, Sampling, Session, VisionModel, parse_budget
from edge_csp.policy import FullPolicy

GREEDY = Sampling(temperature=0)
TURNS = (
    "List the days of the week.",
    "Which of them comes first?",
    "Tell me about the planet Mars.",
    "How long is a day there?",
    "What is the capital of France?",
    "Write one sentence about a dog called Rex.",
    "What is the dog's name?",
    "Count from one to ten.",
    "Name three colors.",
    "What did I ask you first?",
)
SIZES = tuple(int(n) for n in np.geomspace(5, 4000, 50))
LONGEST_RUN = 8
TOPICS = [
    "rivers",
    "mountains",
    "bread",
    "music",
    "trains",
    "gardens",
    "winter",
    "letters",
    "bridges",
    "coffee",
    "clocks",
    "islands",
    "paper",
    "stars",
]


def ten_turns(model: VisionModel) -> int:
    """Turns whose answers and logits are those of an unpruned context, from the first one on."""
    found = []
    for prune in (True, False):
        with Context(model, n_ctx=4096, prune=prune) as context:
            session, turns = Session(context, sampling=GREEDY), []
            for text in TURNS:
                answer = "".join(session.ask(text, n_predict=64))
                turns.append((answer, context.logits()))
            found.append(turns)
    pairs = zip(*found, strict=True)
    return len([0 for one, other in pairs if one[0] == other[0] and np.array_equal(one[1], other[1])])


def sizes(model: VisionModel) -> tuple[int, list[int]]:
    """Prompts whose answers differ from those of the full cache, and sizes at which they fall apart."""
    n_other, apart = 0, []
    with Context(model, n_ctx=4608) as context:
        for n_token in SIZES:
            answers = []
            for pruning in (Pruning(policy=FullPolicy()), Pruning(parse_budget("20%"))):
                context.clear()
                session = Session(context, pruning=pruning, sampling=GREEDY)
                list(session.ask(prompt(model, n_token), n_predict=48))
                answers.append([item.key for item in session._items[session._prompts[-1].n_item :]])
            n_other += answers[0] != answers[1]
            if longest_run(answers[1]) > LONGEST_RUN >= longest_run(answers[0]):
                apart.append(n_token)
    return n_other, apart


def prompt(model: VisionModel, n_token: int) -> str:
    """Sentences, of about so many tokens, and what to do with them."""
    text = "Continue."
    for i in itertools.count():
        more = f"Day {i + 1}: we talked about {TOPICS[i * 5 % len(TOPICS)]} and {TOPICS[i * 3 % len(TOPICS)]}. {text}"
        if sum(len(getattr(part, "tokens", ())) for part in model.tokenize(more)) > n_token:
            return text
        text = more
    raise AssertionError


def longest_run(tokens: list[object]) -> int:
    return max((len(list(run)) for _, run in itertools.groupby(tokens)), default=0)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL.gguf")
    parser.add_argument("-t", "--threads", type=int, default=1)
    options = parser.parse_args()
    n_bad = 0
    for path in options.models:
        with VisionModel(path, n_threads=options.threads) as model:
            n_same = ten_turns(model)
            n_other, apart = sizes(model)
        print(
            f"{path.name}: {n_same} of {len(TURNS)} turns bit for bit those of a plain context; at 20 %, {n_other} of "
            f"{len(SIZES)} answers are other ones, {len(apart)} fall apart {apart or ''}",
            flush=True,
        )
        n_bad += len(TURNS) - n_same + len(apart)
    return int(n_bad > 0)


if __name__ == "__main__":
    raise SystemExit(main())
