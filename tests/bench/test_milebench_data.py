"""Sets of MileBench as they lie in folders, and the prompts made from them. No model is needed."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edge_csp.bench.milebench.data import DATASETS, Sample, read_dataset, select
from edge_csp.bench.milebench.prompt import write_prompt
from edge_csp.bench.milebench.results import Answers, choices_in, read_predictions
from edge_csp.errors import BenchError
from edge_csp.images import Picture, load_picture


def write_set(folder: Path, name: str, data: list[Any], question_type: str = "multi-choice") -> Path:
    """A set with these samples, without its pictures."""
    meta = {"question_type": question_type, "task_instruction": ["Look.", "Look again."], "num_sample": len(data)}
    (folder / name / "images").mkdir(parents=True, exist_ok=True)
    file = folder / name / f"{name}.json"
    file.write_text(json.dumps({"meta_data": meta, "data": data}), encoding="utf-8")
    return file


def entry(sample_id: Any = 0, **others: Any) -> dict[str, Any]:
    task = {"context": "{image#1}Which?", "images_path": ["1.png"], "choice_list": ["red", "Blue."]}
    found = {"sample_id": sample_id, "task_instruction_id": 1, "task_instance": task, "response": "blue"}
    return {**found, **others}


def test_there_are_29_sets() -> None:
    assert len(DATASETS) == 29


def test_read(tmp_path: Path) -> None:
    write_set(tmp_path, "DocVQA", [entry("3"), entry(4, image_quantity_level="Many")])
    dataset = read_dataset(tmp_path, "DocVQA")
    expected = Sample(3, "Look again.", "{image#1}Which?", ("1.png",), ("red", "Blue."), "blue", "Few")
    assert dataset.samples[0] == expected
    assert [sample.level for sample in dataset.samples] == ["Few", "Many"]
    assert (dataset.metric, dataset.problems) == ("choice", ())
    assert dataset.image_path("1.png") == tmp_path / "DocVQA" / "images" / "1.png"


@pytest.mark.parametrize(
    ("name", "kind", "metric"),
    [
        ("ALFRED", "open-ended", "rouge"),
        ("TQA", "multi-choice", "choice"),
        ("ImageNeedleInAHaystack", "open-ended", "needle"),
        ("TextNeedleInAHaystack", "open-ended", "needle"),
        ("MMCoQA", "open-ended", "substring"),
    ],
)
def test_metrics(tmp_path: Path, name: str, kind: str, metric: str) -> None:
    write_set(tmp_path, name, [entry()], kind)
    assert read_dataset(tmp_path, name).metric == metric


def test_samples_that_cannot_be_used(tmp_path: Path) -> None:
    task = entry()["task_instance"]
    bad: list[Any] = [
        "no object",
        {"sample_id": 1},
        entry("x"),
        entry(task_instruction_id=2),
        entry(response="green"),
        entry(task_instance={**task, "context": None}),
        entry(task_instance={**task, "images_path": [1]}),
        entry(task_instance={key: task[key] for key in ("context", "images_path")}),
        entry(task_instance={**task, "context": "\ud800"}),
    ]
    file = write_set(tmp_path, "DocVQA", [entry(), *bad, entry()])
    dataset = read_dataset(tmp_path, "DocVQA")
    assert [sample.sample_id for sample in dataset.samples] == [0]
    assert len(dataset.problems) == len(bad) + 1
    assert all(line.startswith(f"{file}: data[") for line in dataset.problems)
    words = "'task_instance'", "list index out of range", "'green' is none of the choices", "0 is there twice"
    assert all(any(word in line for line in dataset.problems) for word in words)


def test_sets_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"TQA.TQA\.json cannot be read \(No such file"):
        read_dataset(tmp_path, "TQA")
    file = write_set(tmp_path, "TQA", [])
    for text, words in (
        ('{"meta_data": ', "cannot be read"),
        ("[]", "is no set of MileBench"),
        ('{"data": []}', "is no set of MileBench"),
        ("[" * 100_000, "cannot be read"),
        ("\0", "cannot be read"),
    ):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(BenchError, match=words):
            read_dataset(tmp_path, "TQA")
    write_set(tmp_path, "TQA", [], "essay")
    with pytest.raises(BenchError, match=r"TQA\.json: question_type is 'essay'"):
        read_dataset(tmp_path, "TQA")


def test_select(tmp_path: Path) -> None:
    assert select(tmp_path, None) == list(DATASETS)
    (tmp_path / "mine").mkdir()
    assert select(tmp_path, "TQA, mine,TQA") == ["TQA", "mine"]
    for names in ("TQA,no", "TQA,"):
        with pytest.raises(BenchError, match="is unknown"):
            select(tmp_path, names)
    with pytest.raises(BenchError, match="is no folder"):
        select(tmp_path / "no", None)


@dataclass
class Words:
    """Reads words as tokens; a picture takes ten cells. loaded: the pictures that it was asked for."""

    loaded: list[str] = field(default_factory=list)
    known: list[str] = field(default_factory=list)

    def tokens(self, text: str) -> list[int]:
        self.known += text.split()
        return list(range(len(self.known) - len(text.split()), len(self.known)))

    def text(self, tokens: Sequence[int]) -> str:
        return " ".join(self.known[token] for token in tokens)

    def load(self, image: str) -> tuple[Picture, int]:
        self.loaded.append(image)
        return load_picture(Image.fromarray(np.zeros((1, 1, 3), np.uint8)), name=image), 10


def sample(context: str, n_image: int, choices: tuple[str, ...] | None = None) -> Sample:
    images = tuple(f"{i}.png" for i in range(1, n_image + 1))
    return Sample(0, "Look at it.", context, images, choices, "", "Few")


def prompt(
    context: str, n_image: int, max_prompt: int, choices: tuple[str, ...] | None = None
) -> tuple[str, list[str]]:
    written = write_prompt(sample(context, n_image, choices), "TQA", Words(), max_prompt)
    assert [picture.name for picture in written.pictures] == list(written.images)
    return written.text, list(written.images)


CONTEXT = "One: {image#1} two: {table#2}{image#3} What is it?"


def test_whole_prompt() -> None:
    text, images = prompt(CONTEXT, 3, 100, ("red", "blue"))
    assert text == (
        "Look at it.\nOne: <ImageHere> two: <ImageHere><ImageHere> What is it?"
        "\nChoice list: \nA. red\nB. blue\nYour answer is: "
    )
    assert images == ["1.png", "2.png", "3.png"]
    unlabelled = write_prompt(sample("Which? ", 0, ("red", "blue")), "GPR1200", Words(), 100)
    assert unlabelled.text.endswith("\nChoice list: \nred\nblue\nYour answer is: ")


@pytest.mark.parametrize(
    ("max_prompt", "text", "images"),
    [
        (38, "One: <ImageHere> two: <ImageHere><ImageHere> What is it?", ["1.png", "2.png", "3.png"]),  # 3 + 1 + 1 + 3
        (37, "<ImageHere> two: <ImageHere><ImageHere> What is it?", ["1.png", "2.png", "3.png"]),
        (36, " two: <ImageHere><ImageHere> What is it?", ["2.png", "3.png"]),
        (26, "<ImageHere><ImageHere> What is it?", ["2.png", "3.png"]),
        (25, "<ImageHere> What is it?", ["3.png"]),
        (15, " What is it?", []),
        (5, "is it?", []),
        (4, "it?", []),
    ],
)
def test_cut_from_the_left(max_prompt: int, text: str, images: list[str]) -> None:
    assert prompt(CONTEXT, 3, max_prompt) == (f"Look at it.\n{text}", images)


def test_pictures_that_are_left_out_are_not_read() -> None:
    words = Words()
    write_prompt(sample(CONTEXT, 3), "TQA", words, 26)
    assert words.loaded == ["3.png", "2.png"]


def test_more_pictures_than_markers_come_first() -> None:
    """As published: the last pictures belong to the markers, one more goes before the text."""
    assert prompt("What {image#1} is it?", 3, 100) == (
        "Look at it.\n<ImageHere>What <ImageHere> is it?",
        ["2.png", "3.png"],
    )


def test_prompts_that_cannot_be_written() -> None:
    with pytest.raises(BenchError, match=r"3 tokens of a prompt \(--max-prompt\)"):
        prompt("What?", 0, 3)
    with pytest.raises(BenchError, match="the context has 2 pictures, but images_path 1"):
        prompt("{image#1} and {image#1}?", 1, 100)


def test_neighbouring_pictures_get_lines_of_their_own() -> None:
    parts = write_prompt(sample("{image#1}{image#2}{image#3}What?", 3), "TQA", Words(), 100).parts()
    text = "".join(part.get("text", "*") for part in parts)
    assert text == "Look at it.\n*\n*\n*What?"
    assert [part["picture"].name for part in parts if part["type"] == "image"] == ["1.png", "2.png", "3.png"]
    assert all(part.get("text") != "" for part in parts)


@dataclass
class Llava(Words):
    """Pictures take 576 cells. Eight letters, a mark or a line end are a token: about what LLaMA's tokenizer makes."""

    def tokens(self, text: str) -> list[int]:
        return list(range(len(re.findall(r"\w{1,8}|[^\w ]", text))))

    def load(self, image: str) -> tuple[Picture, int]:
        return super().load(image)[0], 576


@pytest.mark.parametrize("name", ["DocVQA", "TQA"])
def test_published_prompts(name: str) -> None:
    """Sets whose samples are pictures and a question with options: TQA has up to 13 pictures, and six of them fit."""
    folder = Path(__file__).parents[1] / "data/milebench" / name
    predictions, annotations = (
        json.loads((folder / f"{file}.json").read_text(encoding="utf-8")) for file in ("pred", "pred_with_extracted")
    )
    for prediction, annotation in zip(predictions, annotations, strict=True):
        question, images = prediction["question"], annotation["image"]
        instruction, _, rest = question.partition("\n<ImageHere>")
        markers = "".join(f"{{image#{number}}}" for number in range(1, len(images) + 1))
        context = markers + rest.replace("<ImageHere>", "").partition("\nChoice list: ")[0]
        given = Sample(0, instruction, context, tuple(images), tuple(choices_in(question)), "", "Few")
        written = write_prompt(given, name, Llava(), 4096)
        assert written.text == question
        assert list(written.images) == [Path(image).name for image in prediction["image"]]


def answer(sample_id: int, text: str = "yes") -> dict[str, Any]:
    found = {"sample_id": sample_id, "image": [], "question": "Is it?", "gt_response": "yes", "pred_response": text}
    return {**found, "gen_model_id": "m", "gen_kwargs": {}}


def test_answers_survive(tmp_path: Path) -> None:
    with Answers(tmp_path / "set") as answers:
        answers.add(answer(1, "naïve\n\ud800"))
        answers.add(answer(2))
    file = tmp_path / "set" / "pred.jsonl"
    whole = file.read_bytes()
    file.write_bytes(b'{"sample_id": 0}\n[1\n' + whole + whole[:30])
    _, problems = read_predictions(tmp_path / "set")
    with Answers(tmp_path / "set") as answers:
        assert answers.problems == problems
        assert answers.found == {1: answer(1, "naïve\n\ud800"), 2: answer(2)}
        answers.add(answer(3))
    assert [line.split("pred.jsonl: ")[1][:16] for line in problems] == [
        "line 1 has no im",
        "line 2 is damage",
        "the last line wa",
    ]
    predictions, problems = read_predictions(tmp_path / "set")
    assert [one["sample_id"] for one in predictions] == [1, 2, 3]
    assert len(problems) == 2


def test_answers_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "set").write_text("", encoding="utf-8")
    with pytest.raises(BenchError, match=r"pred\.jsonl cannot be read or written"):
        Answers(tmp_path / "set")
