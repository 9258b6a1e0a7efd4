"""Ask a model the questions of MileBench, each in a fresh conversation.

Every answer is written as a line of OUT/<set>/pred.jsonl as soon as it is there; the next run goes on with what is
missing. OUT/settings.json tells what the answers were made with, and no run with other settings adds to them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_csp.bench.milebench.data import Dataset, Sample, read_dataset, read_json
from edge_csp.bench.milebench.prompt import write_prompt
from edge_csp.bench.milebench.results import (
    Answers,
    Prediction,
    Scores,
    published,
    read_predictions,
    score_predictions,
    write_predictions,
    write_scores,
    write_text,
)
from edge_csp.chat import MEDIA_MARKER
from edge_csp.errors import BenchError, BudgetError, ContextError, ImageError, ModelError
from edge_csp.images import Picture, load_picture
from edge_csp.model import TokenPart, VisionModel
from edge_csp.session import Session

N_PREDICT = 512
MAX_PROMPT = 4096
"""Most tokens of an answer and of a prompt, as published for LLaVA-1.5."""
TEMPLATE_ROOM = 256
"""Cells for what a chat template puts around a prompt, which the published limit does not count."""
_OF_ONE_SAMPLE = (BenchError, BudgetError, ContextError, ImageError, ModelError)
"""Errors that leave out a sample; others end the run."""


@dataclass(frozen=True)
class Listener:
    """What happens is told to it. progress: set, samples done, samples. left_out: a line about something left out."""

    progress: Callable[[str, int, int], None]
    left_out: Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """A set that was run or scored. scores: None without predictions. n_left_out: samples without a score, or 1 for a
    set that cannot be read.
    """

    name: str
    scores: Scores | None = None
    n_scored: int = 0
    n_left_out: int = 0


@dataclass(frozen=True)
class Runner:
    """Asks a session. max_prompt, n_predict: most tokens of a prompt and of an answer. limit: only the first samples of
    every set.
    """

    session: Session
    data_dir: Path
    out: Path
    listener: Listener
    max_prompt: int = MAX_PROMPT
    n_predict: int = N_PREDICT
    limit: int | None = None

    def run(self, names: Sequence[str]) -> Iterator[Outcome]:
        """Ask the questions of these sets; what cannot be read is told and left out.

        Raises EdgeCspError for what would be the same with every sample, and if answers cannot be written.
        """
        for name in names:
            try:
                dataset = read_dataset(self.data_dir, name)
            except BenchError as error:
                self.listener.left_out(str(error))
                yield Outcome(name, n_left_out=1)
                continue
            with Answers(self.out / name) as answers:
                yield self._run_dataset(dataset, answers)

    def _run_dataset(self, dataset: Dataset, answers: Answers) -> Outcome:
        for line in (*dataset.problems, *answers.problems):
            self.listener.left_out(line)
        samples = dataset.samples[: self.limit]
        if self.session.model.mmproj_info is None and any(sample.images for sample in samples):
            raise ModelError(f"{self.session.model.info.path} has no mmproj (--mmproj): it cannot read pictures")
        n_left_out = len(dataset.problems)
        for number, sample in enumerate(samples):
            self.listener.progress(dataset.name, number, len(samples))
            if sample.sample_id in answers.found:
                continue
            try:
                prediction = self._ask(dataset, sample)
            except _OF_ONE_SAMPLE as error:
                self.listener.left_out(f"{dataset.name}: sample {sample.sample_id} is left out: {error}")
                n_left_out += 1
            else:
                answers.add(prediction)
        self.listener.progress(dataset.name, len(samples), len(samples))
        found = [answers.found.get(sample.sample_id) for sample in samples]
        predictions = [published(prediction) for prediction in found if prediction]
        if not predictions:
            return Outcome(dataset.name, n_left_out=n_left_out)
        scores = score_predictions(dataset.name, predictions, dataset)
        write_predictions(self.out / dataset.name, predictions)
        write_scores(self.out / dataset.name, scores)
        return Outcome(dataset.name, scores, len(predictions), n_left_out)

    def _ask(self, dataset: Dataset, sample: Sample) -> Prediction:
        session = self.session
        prompt = write_prompt(sample, dataset.name, _Reader(session.model, dataset), self.max_prompt)
        session.clear()
        session.prefill([*session.messages, {"role": "user", "content": prompt.parts()}])
        session.prune()
        cells = {"n_cell": session.n_token, "n_kept": session.context.n_cell}
        answer = "".join(session.generate(n_predict=self.n_predict))
        return {
            "sample_id": sample.sample_id,
            "image": [str(dataset.image_path(image)) for image in prompt.images],
            "question": prompt.text,
            "gt_response": sample.response,
            "gen_model_id": session.model.info.path.stem,
            "pred_response": answer.strip(),
            "gen_kwargs": {"max_new_tokens": self.n_predict, "do_sample": False},
            "finish_reason": session.finish_reason,
            **cells,
        }


@dataclass(frozen=True)
class _Reader:
    """The Reader of prompts for a model."""

    model: VisionModel
    dataset: Dataset

    def tokens(self, text: str) -> list[int]:
        text = text.replace(MEDIA_MARKER, "")  # the chat template takes away its meaning too
        parts = self.model.tokenize(text) if text else []
        return [token for part in parts if isinstance(part, TokenPart) for token in part.tokens]

    def text(self, tokens: Sequence[int]) -> str:
        return b"".join(map(self.model.token_bytes, tokens)).decode("utf-8", "ignore")

    def load(self, image: str) -> tuple[Picture, int]:
        picture = load_picture(self.dataset.image_path(image))
        parts = self.model.tokenize(MEDIA_MARKER, [picture])
        return picture, sum(len(part.tokens) if isinstance(part, TokenPart) else part.n_cell for part in parts)


def claim(out: Path, settings: dict[str, Any]) -> None:
    """Write settings.json, if it is not there.

    Raises BenchError if it is there with other settings, or cannot be read or written.
    """
    file = out / "settings.json"
    if not file.exists():
        write_text(file, json.dumps(settings, indent=1) + "\n")
        return
    before = read_json(file)
    if not isinstance(before, dict):
        raise BenchError(f"{file} holds no settings")
    for key in dict.fromkeys([*settings, *before]):
        if before.get(key) != settings.get(key):
            raise BenchError(
                f"{out} holds answers made with {key} {before.get(key)!r}, not {settings.get(key)!r}: "
                "give another folder with --out, or delete that one"
            )


def score_folder(folder: Path, out: Path, data_dir: Path | None, on_left_out: Callable[[str], None]) -> Outcome:
    """Score the predictions in the folder of a set, and write the scores to another one (or the same).

    data_dir: the sets, see score_predictions(). on_left_out: told what cannot be scored, one line each.
    """
    name = folder.name
    try:
        predictions, problems = read_predictions(folder)
        dataset = read_dataset(data_dir, name) if data_dir else None
        scores = score_predictions(name, predictions, dataset)
        write_scores(out, scores)
    except BenchError as error:
        on_left_out(str(error))
        return Outcome(name, n_left_out=1)
    missing = {sample.sample_id for sample in dataset.samples} if dataset else set[int]()
    missing -= {prediction["sample_id"] for prediction in predictions}
    n_left_out = len(missing)
    if dataset:
        problems = [*problems, *dataset.problems]
        n_left_out += len(dataset.problems)
    if missing:
        problems.append(f"{folder}: {len(missing)} samples of the set have no prediction")
    for line in problems:
        on_left_out(line)
    return Outcome(name, scores, len(predictions), n_left_out)
