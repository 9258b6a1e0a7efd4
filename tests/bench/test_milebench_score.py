"""The metrics of MileBench, against what the published evaluator made of the same predictions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edge_csp.bench.milebench.data import Dataset, Sample
from edge_csp.bench.milebench.results import choices_in, read_predictions, score_predictions, write_scores
from edge_csp.bench.milebench.score import label, level_of, match_choice, normalise, rouge_l, score
from edge_csp.errors import BenchError

ROOT = Path(__file__).parents[2]
SUBSET, SHARED = ROOT / "tests/data/milebench", ROOT.parent / "shared/milebench"
SETS = ["ALFRED", "CLEVR-Change", "DocVQA", "TQA"]
COLOURS = ["red", "dark blue", "3.5 cm", "green"]


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def check_samples(folder: Path) -> None:
    """Scores, letters and normalised texts are those of the files beside the predictions."""
    predictions, _ = read_predictions(folder)
    scores = score_predictions(folder.name, predictions)
    assert scores.per_sample == read(folder / "eval_score.json")
    published = folder / "pred_with_extracted.json"
    assert published.exists() == (scores.extracted is not None)
    for ours, theirs in zip(scores.extracted or [], read(published) if published.exists() else [], strict=True):
        for key in ("sample_id", "gt_response", "pred_response", "choice_list", "extracted", "result"):
            assert ours[key] == theirs[key], f"{key} of sample {ours['sample_id']}"


@pytest.mark.parametrize("name", SETS)
def test_some_published_predictions(name: str) -> None:
    check_samples(SUBSET / name)


@pytest.mark.parametrize("name", SETS)
def test_all_published_predictions(name: str, tmp_path: Path) -> None:
    """To the last digit printed: the files are the same byte for byte."""
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip("../shared/milebench is not there")
    check_samples(folder)
    predictions, _ = read_predictions(folder)
    assert len(predictions) == 200
    published = folder / "pred_with_extracted.json"
    dataset = annotations(name, read(published)) if published.exists() else None
    write_scores(tmp_path, score_predictions(name, predictions, dataset))
    for file in folder.glob("*.json"):
        if file.name != "pred.json":
            assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name


def annotations(name: str, extracted: list[Any]) -> Dataset:
    """The set that predictions were made from, as far as scores depend on it."""
    samples = [
        Sample(
            one["sample_id"],
            "",
            "",
            tuple(one["image"]),
            tuple(choices_in(one["question"])),
            "",
            one["image_quantity_level"],
        )
        for one in extracted
    ]
    return Dataset(name, Path(name), "choice", tuple(samples), ())


def test_rouge_of_the_package() -> None:
    pairs = read(SUBSET / "rouge.json")
    assert len(pairs) > 50
    for pair in pairs:
        assert rouge_l(pair["answer"], pair["reference"]) == pair["f"], pair


def test_rouge_by_hand() -> None:
    assert rouge_l("a b c d", "a b") == pytest.approx(2 * 0.5 / 1.5, abs=1e-7)
    assert rouge_l("a a a a b", "a b") == pytest.approx(1, abs=1e-7)  # words count once
    assert rouge_l("b a", "a b") == pytest.approx(0.5, abs=1e-7)  # their order counts
    assert rouge_l("b. a", "a. b") == pytest.approx(1, abs=1e-7)  # but not that of sentences
    assert rouge_l("", "a") == rouge_l("a", "") == rouge_l("...", "a") == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A. Blue", "a blue"),
        ("  'It's.'\n", "it's"),
        ("well-known", "well known"),
        ("well - known", "well  known"),
        ("well-known, or well - known", "wellknown or well  known"),  # a blank beside it anywhere
        ("1,000-odd", "1000odd"),  # a number with a comma
        ("3.5 m.", "3.5 m"),
        ("a." * 40, "a" * 32 + "a." * 8),  # the published slip: 32 is a flag
        ("[x] {y} <z>", "x y z"),
    ],
)
def test_normalise(text: str, expected: str) -> None:
    assert normalise(text) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("", "C"),
        ("d", "D"),
        ("it is b dark blue", "B"),
        ("dark blue and red", "B"),  # what comes first
        ("darkblue", "B"),
        ("c 3.5 cm", "C"),
        ("3.5 cm", "C"),  # by its letter: the option itself has a full stop, and the published code does not find it
        ("3.5 km", ""),
        ("b or d", "BD"),  # "b or d" is no single letter: wrong
        ("bad", "BAD"),
        ("e", ""),
    ],
)
def test_match_choice(answer: str, expected: str) -> None:
    assert match_choice(answer, COLOURS) == expected


def test_labels() -> None:
    assert [label(i) for i in (0, 25, 26, 51, 52, 77)] == ["A", "Z", "AA", "AZ", "BA", "BZ"]
    options = [f"x{i}" for i in range(60)]
    assert match_choice("x51", options) == "F"  # x5 is in it, and comes first in the list
    assert match_choice("aa x26", options) == "A"  # the published code takes one letter
    assert match_choice("ba", options) == "BA"


def test_needles_are_words_and_mmcoqa_is_not() -> None:
    assert score("needle", "The code is 1234.", "1234") == 1
    assert score("needle", "The code is 12345.", "1234") == 0
    assert score("substring", "The code is 12345.", "1234") == 1
    assert score("substring", "It is red", "blue") == 0
    assert score("rouge", " . ", "red") == 0


def test_levels() -> None:
    assert [level_of(n) for n in (0, 5, 6, 31, 32)] == ["Few", "Few", "Medium", "Medium", "Many"]


def prediction(sample_id: int, answer: str, images: int = 1, **others: Any) -> dict[str, Any]:
    question = "Which?\nChoice list: \nA. red\nB. blue\nYour answer is: "
    found = {"sample_id": sample_id, "image": ["i.png"] * images, "question": question, "gt_response": "Blue"}
    return {**found, "pred_response": answer, **others}


def test_totals_by_number_of_pictures() -> None:
    predictions = [prediction(0, "B"), prediction(1, "A", 6), prediction(2, "blue", 40), prediction(3, "A", 7)]
    assert score_predictions("DocVQA", predictions).total == {
        "Accuracy": 0.5,
        "image_quantity_level-Accuracy": {"Few": 1.0, "Medium": 0.0, "Many": 1.0},
        "image_quantity_level-Result": {"Few": [1, 1], "Medium": [0, 2], "Many": [1, 1]},
    }


def test_the_set_knows_better_than_a_cut_prompt() -> None:
    sample = Sample(0, "", "", ("i.png",) * 40, ("blue", "red"), "blue", "Many")
    dataset = Dataset("DocVQA", Path("DocVQA"), "choice", (sample,), ())
    scores = score_predictions("DocVQA", [prediction(0, "A")], dataset)
    assert scores.extracted is not None
    assert scores.total["image_quantity_level-Result"]["Many"] == [1, 1]
    assert [len(scores.extracted[0][key]) for key in ("image", "choice_list")] == [40, 2]


def test_options_in_prompts() -> None:
    assert choices_in("Which?\nChoice list: \nA. one\ntwo\nB. three\nYour answer is: ") == ["one\ntwo", "three"]
    assert choices_in("Which?\nChoice list: \nblue\nred\nYour answer is: ") == ["blue", "red"]
    assert choices_in("Which?") == []


def test_what_cannot_be_scored(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"DocVQA: sample 7: its answer 'green' is none of the choices"):
        score_predictions("DocVQA", [prediction(7, "A", gt_response="green")])
    with pytest.raises(BenchError, match="no predictions"):
        score_predictions("DocVQA", [])
    with pytest.raises(BenchError, match="sample 1 of the predictions is not in the set"):
        score_predictions("DocVQA", [prediction(1, "A")], Dataset("DocVQA", tmp_path, "choice", (), ()))
    with pytest.raises(BenchError, match=r"pred\.json cannot be read"):
        read_predictions(tmp_path)
    for text, words in (
        ("{}", "no list"),
        ("[1]", "prediction 0 is no object"),
        ('[{"sample_id": 1}]', "has no image"),
    ):
        (tmp_path / "pred.json").write_text(text, encoding="utf-8")
        with pytest.raises(BenchError, match=words):
            read_predictions(tmp_path)
