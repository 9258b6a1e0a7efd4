"""The metrics of MileBench, to the last digit and with the quirks of the published evaluator.

Its rules, found by reading it (docs/milebench.md names them), are kept where better ones would come to mind: figures
are to be compared with published ones.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

METRICS = ("rouge", "choice", "needle", "substring")
LEVELS = ("Few", "Medium", "Many")

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_FULL_STOP = re.compile(r"\.(?!\d)")
_MAX_FULL_STOPS = 32
"""The published code hands a flag of the value 32 to re.sub in the place of the count."""
_ESCAPED = frozenset(".^$*|")
"""Characters of a normalised option that a regular expression needs escaped."""


def level_of(n_image: int) -> str:
    """The number of pictures in words, one of LEVELS."""
    return "Few" if n_image < 6 else "Many" if n_image > 31 else "Medium"


def normalise(text: str) -> str:
    """Text in lower case, without full stops and punctuation.

    Punctuation becomes a blank where it only ever stands between two characters of the text, and nothing if it has a
    blank beside it anywhere, or if the text has a number such as 1,000. Full stops before a digit stay, and so do
    those beyond the 32nd.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    has_thousands = re.search(r"\d,\d", text) is not None
    table = {
        ord(mark): "" if has_thousands or f"{mark} " in text or f" {mark}" in text else " " for mark in _PUNCTUATION
    }
    text = _FULL_STOP.sub("", text.translate(table), count=_MAX_FULL_STOPS)
    return text.strip("'").strip('"').strip().lower()


def rouge_l(answer: str, reference: str) -> float:
    """F of ROUGE-L over unique words, as the package rouge 1.0.1 computes it; 0 for an empty answer or reference.

    Full stops part sentences. Counted are the different words in longest common subsequences of any sentence of the
    reference with any of the answer, against all different words.
    """
    answers, references = _sentences(answer), _sentences(reference)
    if not answers or not references:
        return 0.0
    common = set[str]().union(*(_common_words(one, other) for one in references for other in answers))
    precision = len(common) / len(set[str]().union(*answers))
    recall = len(common) / len(set[str]().union(*references))
    return 2.0 * ((precision * recall) / (precision + recall + 1e-8))


def _sentences(text: str) -> list[list[str]]:
    """Words of every sentence; blanks alone are a sentence of one empty word."""
    return [" ".join(sentence.split()).split(" ") for sentence in text.split(".") if sentence]


def _common_words(reference: Sequence[str], answer: Sequence[str]) -> set[str]:
    """Words of a longest common subsequence; of several, the one that ends first in the answer."""
    length = [[0] * (len(answer) + 1) for _ in range(len(reference) + 1)]
    for i, word in enumerate(reference, start=1):
        above, row = length[i - 1], length[i]
        for j, other in enumerate(answer, start=1):
            row[j] = above[j - 1] + 1 if word == other else max(above[j], row[j - 1])
    found = set()
    i, j = len(reference), len(answer)
    while i and j:
        if reference[i - 1] == answer[j - 1]:
            found.add(reference[i - 1])
            i, j = i - 1, j - 1
        elif length[i - 1][j] > length[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found


def label(i: int) -> str:
    """What stands for option i (from 0): A … Z, AA … AZ, BA …"""
    return chr(65 + i) if i < 26 else "A" + chr(65 + i - 26) if i < 52 else "B" + chr(65 + i - 52)


def match_choice(answer: str, options: Sequence[str]) -> str:
    """The label that an answer means; both are normalised. Not a single label where the answer is unclear.

    The first of these that finds something: an empty answer is "C"; a label and its option ("b blue"; of labels with
    two letters the first counts); an option, blanks left out; a bare label; all letters of the answer that are labels.
    """
    if not answer:
        return "C"
    labels = [label(i) for i in range(len(options))]
    whole = _first(answer, [normalise(f"{one} {option}") for one, option in zip(labels, options, strict=True)])
    if whole is not None:
        return whole[0].upper()
    bare = [normalise(option).replace(" ", "") for option in options]
    found = _first(answer.replace(" ", ""), bare)
    if found is not None and not _ESCAPED & set(found):  # the published code compares it with the escaped option
        return labels[bare.index(found)]
    if len(answer) <= 2 and answer.upper() in labels:
        return answer.upper()
    return "".join(letter.upper() for letter in answer if letter.upper() in labels)


def _first(text: str, patterns: Sequence[str]) -> str | None:
    """The pattern that comes first in the text; of those in the same place, the first one of the list."""
    found = [(text.find(pattern), number) for number, pattern in enumerate(patterns) if pattern in text]
    return patterns[min(found)[1]] if found else None


def score(metric: str, answer: str, reference: str) -> float:
    """Score of an answer to a question without choices: ROUGE-L, or 0 or 1."""
    answer, reference = normalise(answer), normalise(reference)
    if metric == "rouge":
        return rouge_l(answer, reference) if answer else 0
    return int(reference in (answer.split() if metric == "needle" else answer))
