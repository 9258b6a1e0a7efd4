"""Predictions and scores in the published formats: pred.json, pred_with_extracted.json, eval_score.json, eval.json."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from edge_csp.bench.milebench.data import (
    CHOICE_LIST,
    YOUR_ANSWER,
    Dataset,
    choice_label,
    metric_of,
    read_json,
)
from edge_csp.bench.milebench.score import LEVELS, label, level_of, match_choice, normalise, score
from edge_csp.errors import BenchError

Prediction = dict[str, Any]
"""What pred.json holds of a sample, see FIELDS."""
FIELDS = ("sample_id", "image", "question", "gt_response", "gen_model_id", "pred_response", "gen_kwargs")
_NEEDED = {"sample_id": int, "image": list, "question": str, "gt_response": str, "pred_response": str}


@dataclass(frozen=True)
class Scores:
    """Scores of a set. total, per_sample: contents of eval.json and eval_score.json. extracted: of
    pred_with_extracted.json, for choices only.
    """

    metric: str
    total: dict[str, Any]
    per_sample: list[dict[str, str]]
    extracted: list[Prediction] | None

    @property
    def value(self) -> float:
        """The figure of the set, 0 to 1."""
        return float(self.total["Rouge-L f" if self.metric == "rouge" else "Accuracy"])


def score_predictions(name: str, predictions: Sequence[Prediction], dataset: Dataset | None = None) -> Scores:
    """Scores of the predictions of a set.

    dataset: gives the options and the number of pictures. Without it both are read from the predictions; where a prompt
    was cut, these have fewer pictures than the set.

    Raises BenchError for no predictions, and for one that does not fit the set or its own prompt.
    """
    if not predictions:
        raise BenchError(f"{name}: there are no predictions to score")
    metric = dataset.metric if dataset else _guess_metric(name, predictions[0])
    values: list[float] = []
    extracted: list[Prediction] = []
    by_level: dict[str, list[float]] = {level: [] for level in LEVELS}
    for prediction in _with_annotations(name, predictions, dataset):
        if metric == "choice":
            extracted.append(_extract(name, prediction))
            values.append(extracted[-1]["result"])
        else:
            values.append(score(metric, prediction["pred_response"], prediction["gt_response"]))
        by_level[level_of(len(prediction["image"]))].append(values[-1])
    total = {
        "Rouge-L f" if metric == "rouge" else "Accuracy": float(np.mean(values)),
        "image_quantity_level-Accuracy": {level: float(np.mean(v)) if v else 0 for level, v in by_level.items()},
        "image_quantity_level-Result": {level: [_sum(v), len(v)] for level, v in by_level.items()},
    }
    per_sample = [
        {"id": str(prediction["sample_id"]), "score": str(round(value, 3))}
        for prediction, value in zip(predictions, values, strict=True)
    ]
    return Scores(metric, total, per_sample, extracted if metric == "choice" else None)


def _sum(values: Sequence[float]) -> float:
    """The sum, rounded once, as the published ones are: sum() before Python 3.12 rounds at every step."""
    return math.fsum(values) if any(isinstance(value, float) for value in values) else sum(values)


def _guess_metric(name: str, prediction: Prediction) -> str:
    return metric_of(name, "multi-choice" if CHOICE_LIST in prediction["question"] else "open-ended", name)


def _with_annotations(name: str, predictions: Iterable[Prediction], dataset: Dataset | None) -> Iterable[Prediction]:
    """Predictions with all pictures of the sample, its options and its number of pictures in words."""
    samples = {sample.sample_id: sample for sample in dataset.samples} if dataset else {}
    for prediction in predictions:
        if dataset is None:
            choices = choices_in(prediction["question"])
            images, level = prediction["image"], level_of(len(prediction["image"]))
        elif sample := samples.get(prediction["sample_id"]):
            choices, images, level = list(sample.choices or ()), list(sample.images), sample.level
        else:
            raise BenchError(f"{name}: sample {prediction['sample_id']} of the predictions is not in the set")
        yield {**prediction, "image": images, "choice_list": choices, "image_quantity_level": level}


def choices_in(question: str) -> list[str]:
    """The options that a prompt ends with; none where it has no list of them."""
    _, found, text = question.rpartition(CHOICE_LIST)
    if not found:
        return []
    choices: list[str] = []
    lines = text.rpartition(YOUR_ANSWER)[0].split("\n")
    has_labels = lines[0].startswith(choice_label(0))
    for line in lines:
        if not has_labels:
            choices.append(line)
        elif line.startswith(choice_label(len(choices))):
            choices.append(line.removeprefix(choice_label(len(choices))))
        else:  # an option of several lines
            choices[-1] += f"\n{line}"
    return choices


def _extract(name: str, prediction: Prediction) -> Prediction:
    answer, reference = normalise(prediction["pred_response"]), normalise(prediction["gt_response"])
    choices = [normalise(choice) for choice in prediction["choice_list"]]
    if reference not in choices:
        raise BenchError(f"{name}: sample {prediction['sample_id']}: its answer {reference!r} is none of the choices")
    extracted = match_choice(answer, choices)
    return {
        **prediction,
        "gt_response": reference,
        "pred_response": answer,
        "choice_list": choices,
        "extracted": extracted,
        "result": int(extracted == label(choices.index(reference))),
    }


def read_predictions(folder: Path) -> tuple[list[Prediction], list[str]]:
    """Predictions in the folder of a set: those of pred.jsonl (of a run that may not be at its end), or of pred.json;
    and what is wrong with lines of pred.jsonl.

    Raises BenchError if there is neither, or if the file is damaged as a whole.
    """
    if (folder / Answers.FILE).exists():
        with Answers(folder, read_only=True) as answers:
            return list(map(published, answers.found.values())), answers.problems
    file = folder / "pred.json"
    found = read_json(file)
    if not isinstance(found, list):
        raise BenchError(f"{file} holds no list of predictions")
    for number, prediction in enumerate(found):
        if problem := _problem_of(prediction):
            raise BenchError(f"{file}: prediction {number} {problem}")
    return found, []


class Answers:
    """Predictions of a set in pred.jsonl: a line each, written as soon as it is there.

    found: what the file holds by sample_id. problems: what is wrong with it, one line each. A last line that was cut
    off is taken away; damaged ones in the midst stay, and count for nothing.
    """

    FILE = "pred.jsonl"

    def __init__(self, folder: Path, *, read_only: bool = False) -> None:
        """Raises BenchError if the file cannot be read or written."""
        self.file = folder / self.FILE
        self.found: dict[int, Prediction] = {}
        self.problems: list[str] = []
        self._stream: BinaryIO | None = None
        try:
            if not read_only:
                folder.mkdir(parents=True, exist_ok=True)
            data = self.file.read_bytes() if self.file.exists() else b""
            end = data.rfind(b"\n") + 1
            self._read(data[:end])
            if end < len(data):
                self.problems.append(f"{self.file}: the last line was cut off, its sample has no answer")
            if not read_only:
                self._stream = self.file.open("ab")
                self._stream.truncate(end)
        except OSError as error:
            raise self._failed(error) from error

    def _read(self, data: bytes) -> None:
        for number, line in enumerate(data.splitlines(), start=1):
            try:
                prediction = json.loads(line)
                problem = _problem_of(prediction)
            except (ValueError, RecursionError) as error:
                problem = f"is damaged ({error})"
            if problem:
                self.problems.append(f"{self.file}: line {number} {problem}, it counts for nothing")
            else:
                self.found[prediction["sample_id"]] = prediction

    def add(self, prediction: Prediction) -> None:
        """Write a prediction. Raises BenchError if that is not possible."""
        assert self._stream is not None
        try:
            self._stream.write(json.dumps(prediction).encode() + b"\n")
            self._stream.flush()
        except OSError as error:
            raise self._failed(error) from error
        self.found[prediction["sample_id"]] = prediction

    def _failed(self, error: OSError) -> BenchError:
        return BenchError(f"{self.file} cannot be read or written ({error.strerror or error})")

    def close(self) -> None:
        if self._stream:
            self._stream.close()

    def __enter__(self) -> Answers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _problem_of(prediction: Any) -> str:
    """What is wrong with something that should be a prediction; empty if nothing."""
    if not isinstance(prediction, dict):
        return "is no object"
    for key, kind in _NEEDED.items():
        if not isinstance(prediction.get(key), kind):
            return f"has no {key} ({kind.__name__})"
    return ""


def published(prediction: Prediction) -> Prediction:
    """What pred.json holds of a line of pred.jsonl."""
    return {key: prediction[key] for key in FIELDS if key in prediction}


def write_predictions(folder: Path, predictions: Sequence[Prediction]) -> None:
    """Write pred.json. Raises BenchError if that is not possible."""
    write_text(folder / "pred.json", json.dumps(predictions, ensure_ascii=False, indent=4))


def write_scores(folder: Path, scores: Scores) -> None:
    """Write eval.json, eval_score.json and, for choices, pred_with_extracted.json. Raises BenchError if that fails."""
    write_text(folder / "eval.json", json.dumps(scores.total))
    write_text(folder / "eval_score.json", json.dumps(scores.per_sample, indent=4))
    if scores.extracted is not None:
        write_text(folder / "pred_with_extracted.json", json.dumps(scores.extracted, indent=4))


def write_text(file: Path, text: str) -> None:
    """Write a file at once or not at all. Raises BenchError if that is not possible."""
    part = file.with_name(f"{file.name}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        os.replace(part, file)
    except OSError as error:
        raise BenchError(f"{file} cannot be written ({error.strerror or error})") from error
