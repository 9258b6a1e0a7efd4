"""The official folder layout: DATA_DIR/<set>/<set>.json and DATA_DIR/<set>/images/."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_csp.bench.milebench.score import level_of, normalise
from edge_csp.errors import BenchError

DATASETS = (
    # realistic, temporal
    *("ActionLocalization", "ActionPrediction", "ActionSequence", "CharacterOrder", "CounterfactualInference"),
    *("EgocentricNavigation", "MovingAttribute", "MovingDirection", "ObjectExistence", "ObjectInteraction"),
    *("ObjectShuffle", "SceneTransition", "StateChange"),
    # realistic, semantic
    *("ALFRED", "CLEVR-Change", "DocVQA", "IEdit", "MMCoQA", "MultiModalQA", "OCR-VQA", "SlideVQA", "Spot-the-Diff"),
    *("TQA", "WebQA", "WikiVQA", "nuscenes"),
    # diagnostic
    *("GPR1200", "ImageNeedleInAHaystack", "TextNeedleInAHaystack"),
)
"""The 29 sets, as the paper groups them."""
CHOICE_LIST, YOUR_ANSWER = "\nChoice list: \n", "\nYour answer is: "
"""What stands before and after the options in a prompt."""


@dataclass(frozen=True)
class Sample:
    """A question. context: with a marker {image#1} or {table#1} … for each of the files in images. choices: the options
    in order, None for an open question. level: number of pictures in words, as the set gives it.
    """

    sample_id: int
    instruction: str
    context: str
    images: tuple[str, ...]
    choices: tuple[str, ...] | None
    response: str
    level: str


@dataclass(frozen=True)
class Dataset:
    """A set. metric: one of score.METRICS. problems: samples that cannot be used, one line each."""

    name: str
    folder: Path
    metric: str
    samples: tuple[Sample, ...]
    problems: tuple[str, ...]

    def image_path(self, image: str) -> Path:
        """File of one of a sample's images."""
        return self.folder / "images" / image


def select(data_dir: Path, names: str | None) -> list[str]:
    """Names of the sets to read: those of a text with commas between them, or all 29.

    Raises BenchError if the folder does not exist, or for a name that is neither known nor a folder in it.
    """
    if not data_dir.is_dir():
        raise BenchError(f"{data_dir} is no folder: it must hold the sets of MileBench (ALFRED/ALFRED.json …)")
    chosen = [name.strip() for name in names.split(",")] if names else list(DATASETS)
    for name in chosen:
        if name not in DATASETS and (not name or not (data_dir / name).is_dir()):
            raise BenchError(f"dataset {name!r} is unknown: use {', '.join(DATASETS)}, or a folder in {data_dir}")
    return list(dict.fromkeys(chosen))


def read_dataset(data_dir: Path, name: str) -> Dataset:
    """Read a set; its pictures are not looked at.

    Raises BenchError if the JSON file is missing or damaged as a whole.
    """
    file = data_dir / name / f"{name}.json"
    content = read_json(file)
    try:
        question_type, instructions, data = (
            content["meta_data"]["question_type"],
            content["meta_data"]["task_instruction"],
            list(content["data"]),
        )
    except (KeyError, TypeError):
        raise BenchError(
            f"{file} is no set of MileBench: it needs meta_data (question_type, task_instruction) and data"
        ) from None
    metric = metric_of(name, question_type, file)
    samples: dict[int, Sample] = {}
    problems = []
    for number, entry in enumerate(data):
        try:
            sample = _sample(entry, instructions, metric)
            if sample.sample_id in samples:
                raise ValueError(f"sample_id {sample.sample_id} is there twice")
        except (KeyError, IndexError, TypeError, ValueError) as error:
            words = f"{error} is missing" if isinstance(error, KeyError | IndexError) else str(error)
            problems.append(f"{file}: data[{number}] cannot be used ({words})")
        else:
            samples[sample.sample_id] = sample
    return Dataset(name, data_dir / name, metric, tuple(samples.values()), tuple(problems))


def metric_of(name: str, question_type: str, source: object) -> str:
    """One of score.METRICS: for needles and MMCoQA by the name of the set, otherwise by the kind of its questions.

    source: named in the BenchError that an unknown kind is.
    """
    if "NeedleInAHaystack" in name:
        return "needle"
    if "MMCoQA" in name:
        return "substring"
    metric = {"open-ended": "rouge", "multi-choice": "choice"}.get(question_type)
    if metric is None:
        raise BenchError(f"{source}: question_type is {question_type!r}: use open-ended or multi-choice")
    return metric


def _sample(entry: Any, instructions: Any, metric: str) -> Sample:
    task = entry["task_instance"]
    images = tuple(map(_text, task["images_path"]))
    choices = tuple(_text(str(choice)) for choice in task["choice_list"]) if "choice_list" in task else None
    response = _text(str(entry["response"]))
    if metric == "choice":
        if choices is None:
            raise KeyError("choice_list")
        if normalise(response) not in map(normalise, choices):
            raise ValueError(f"the response {response!r} is none of the choices")
    if metric == "rouge" and not normalise(response):
        raise ValueError("the response is empty")
    return Sample(
        sample_id=int(entry["sample_id"]),
        instruction=_text(instructions[entry["task_instruction_id"]]),
        context=_text(task["context"]),
        images=images,
        choices=choices,
        response=response,
        level=str(entry.get("image_quantity_level") or level_of(len(images))),
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    value.encode()  # raises ValueError for half of a surrogate pair
    return value


def choice_label(i: int) -> str:
    """What stands before option i (from 0) in a prompt; not always its label in the scores."""
    return f"{chr(65 + i)}. "


def read_json(file: Path) -> Any:
    """Content of a JSON file. Raises BenchError that names the file if it is missing or damaged."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BenchError(f"{file} cannot be read ({getattr(error, 'strerror', None) or error})") from error
