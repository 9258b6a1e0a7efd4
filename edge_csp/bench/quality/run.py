"""Measure: albums are jobs, worker processes take one after the other, and the parent writes what they find."""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import queue
import signal
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_csp import __version__
from edge_csp.bench.quality.albums import Album, Shape, Source
from edge_csp.bench.quality.protocols import EVERY, PROTOCOLS, Plan, measure
from edge_csp.bench.quality.reading import N_CHAT, open_context
from edge_csp.bench.quality.records import KEY, Key, Records, key_of
from edge_csp.bench.quality.specs import Spec, parse_spec
from edge_csp.budget import parse_budget
from edge_csp.errors import BenchError, EdgeCspError
from edge_csp.metadata import find_mmproj
from edge_csp.model import VisionModel

SCHEMA = 1
"""Changes when a name in the records changes its meaning or goes away."""
DIGEST_BYTES = 1 << 20
BUDGETS = ("40%", "20%", "10%", "5%")


@dataclass(frozen=True)
class ModelFiles:
    """name: in records."""

    name: str
    path: Path
    mmproj: Path | None = None

    def digest(self) -> str:
        """Of the sizes, the first and the last MiB of the files."""
        digest = hashlib.sha256()
        for path in filter(None, (self.path, self.mmproj)):
            try:
                size = path.stat().st_size
                with path.open("rb") as file:
                    digest.update(f"{size} ".encode() + file.read(DIGEST_BYTES))
                    file.seek(max(0, size - DIGEST_BYTES))
                    digest.update(file.read())
            except OSError as error:
                raise BenchError(f"{path} cannot be read ({error.strerror or error})") from error
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Settings:
    """What to measure. policies, budgets: as written. n_predict: most tokens of an answer. n_job: processes, each with
    n_thread threads.
    """

    models: tuple[ModelFiles, ...]
    source: Source
    policies: tuple[str, ...]
    budgets: tuple[str, ...] = BUDGETS
    protocols: tuple[str, ...] = PROTOCOLS
    n_predict: int = 24
    n_job: int = 1
    n_thread: int = 1
    n_gpu_layers: int = 0

    def __post_init__(self) -> None:
        """Raises EdgeCspError for what cannot be measured, before anything is."""
        for protocol in self.protocols:
            if protocol not in EVERY:
                raise BenchError(f"protocol {protocol!r} is unknown: use {', '.join(EVERY)}")
        for name, values in (("policy", self.policies), ("budget", self.budgets), ("protocol", self.protocols)):
            if not values or len(set(values)) < len(values):
                raise BenchError(
                    f"there is no {name}" if not values else f"a {name} is there twice: {', '.join(values)}"
                )
        if nothing := {*self.protocols, *self.policies} & self.source.meaningless:
            raise BenchError(f"{', '.join(sorted(nothing))}: there is nothing to measure in these albums")
        names = [model.name for model in self.models]
        if len(set(names)) < len(names):
            raise BenchError(f"a model is there twice: {', '.join(names)}")
        for model in self.models:
            if model.mmproj is None:
                find_mmproj(model.path)  # refuses where it is not clear, now and not when the model's turn comes
        for budget in self.budgets:
            parse_budget(budget)
        self.specs()

    def specs(self) -> list[Spec]:
        return [parse_spec(text) for text in self.policies]

    def to_dict(self) -> dict[str, Any]:
        """What is written, and compared when a run goes on."""
        return {
            "same": {"schema": SCHEMA, "predict": self.n_predict, **self.source.same()},
            "models": {model.name: model.digest() for model in self.models},
            "edge_csp": __version__,
            "protocols": list(self.protocols),
            "budgets": list(self.budgets),
            "policies": list(self.policies),
            **self.source.sizes(),
        }


@dataclass(frozen=True)
class Job:
    """An album for a model. done: (protocol, policy, budget, question) of what is there already."""

    model: ModelFiles
    shape: Shape
    done: frozenset[tuple[str, str, str, int]]


def run(
    settings: Settings,
    out: Path | None,
    *,
    limit: int | None = None,
    on_progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> list[dict[str, Any]]:
    """All records of the settings; those that `out` has not yet are measured and written there.

    limit: stop after so many new ones. on_progress: told of how many of all there are.

    Raises EdgeCspError in one line, for what cannot be measured; what was measured before is written.
    """
    with Records(out, settings.to_dict()) as records:
        expected = expected_keys(settings)
        n_all, n_done = len(expected), sum(key in records.done for key in expected)
        on_progress(n_done, n_all)
        jobs = _jobs(settings, expected, records.done)
        found = _in_turn(settings, jobs) if settings.n_job == 1 else _in_parallel(settings, jobs)
        try:
            for number, record in enumerate(found, start=1):
                records.add(record)
                on_progress(n_done + number, n_all)
                if number == limit:
                    break
        finally:
            found.close()
        wanted = set(expected)
        return [record for record in records.records if key_of(record) in wanted]


def expected_keys(settings: Settings) -> list[Key]:
    """Of all records that the settings ask for, model after model and album after album."""
    specs = settings.specs()
    keys: list[Key] = []
    for model, shape in itertools.product(settings.models, settings.source.shapes()):
        n_later = shape.n_question // N_CHAT * N_CHAT or (shape.n_question if shape.n_question > 1 else 0)
        n_of = {"later": n_later, "bounded": shape.n_turn, "continue": shape.n_passage}
        for protocol, spec, budget in itertools.product(settings.protocols, specs, settings.budgets):
            if spec.policy is None and protocol == "bounded":
                continue  # a conversation does not tell beforehand how many pictures have to fit
            for number in range(n_of.get(protocol, shape.n_question)):
                keys.append((model.name, *shape.key, protocol, spec.text, budget, number))
    return keys


def _jobs(settings: Settings, expected: Sequence[Key], done: set[Key]) -> list[Job]:
    """Jobs with something to do."""
    models = {model.name: model for model in settings.models}
    shapes = {shape.key: shape for shape in settings.source.shapes()}
    n_same = KEY.index("protocol")
    have: dict[Any, set[Any]] = {key[:n_same]: set() for key in expected if key not in done}
    for key in done:
        if key[:n_same] in have:
            have[key[:n_same]].add(key[n_same:])
    return [Job(models[name], shapes[tuple(shape)], frozenset(found)) for (name, *shape), found in have.items()]


class Worker:
    """Does jobs one after the other, with one model open."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._specs = settings.specs()
        self._budgets = [parse_budget(text) for text in settings.budgets]
        self._model: VisionModel | None = None
        self._name = ""

    def do(self, job: Job) -> Iterator[dict[str, Any]]:
        settings = self._settings
        model = self._open(job.model)
        album: Album = settings.source.album(job.shape)

        def wanted(*key: Any) -> bool:
            return key not in job.done

        plan = Plan(self._specs, self._budgets, settings.protocols, settings.n_predict, wanted)
        about = {"model": job.model.name, **job.shape.about()}
        try:
            with open_context(model, album, self._specs, settings.n_predict) as context:
                for record in measure(context, album, plan):
                    yield about | record.to_dict()
        except EdgeCspError as error:
            raise BenchError(f"{job.model.name}, {job.shape.words}: {error}") from error

    def _open(self, files: ModelFiles) -> VisionModel:
        if self._model is None or self._name != files.name:
            self.close()
            settings = self._settings
            self._model = VisionModel(
                files.path, files.mmproj, n_threads=settings.n_thread, n_gpu_layers=settings.n_gpu_layers
            )
            self._name = files.name
        return self._model

    def close(self) -> None:
        """Close the model. A second call does nothing."""
        if self._model is not None:
            self._model.close()
        self._model = None


def _in_turn(settings: Settings, jobs: Sequence[Job]) -> Generator[dict[str, Any], None, None]:
    worker = Worker(settings)
    try:
        for job in jobs:
            yield from worker.do(job)
    finally:
        worker.close()


def _in_parallel(settings: Settings, jobs: Sequence[Job]) -> Generator[dict[str, Any], None, None]:
    spawn = multiprocessing.get_context("spawn")  # llama.cpp's threads do not survive a fork
    todo, results = spawn.Queue(), spawn.Queue()
    for job in jobs:
        todo.put(job)
    workers = [
        spawn.Process(target=_work, args=(settings, todo, results), daemon=True)
        for _ in range(min(settings.n_job, len(jobs)))
    ]
    for _ in workers:
        todo.put(None)
    for worker in workers:
        worker.start()
    n_left = len(jobs)
    try:
        while n_left:
            try:
                found = results.get(timeout=1)
            except queue.Empty:
                if any(worker.exitcode for worker in workers):
                    raise BenchError("a worker process ended: out of memory?") from None
                continue
            if found is None:
                n_left -= 1
            elif isinstance(found, str):
                raise BenchError(found)
            else:
                yield found
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()


def _work(settings: Settings, todo: Any, results: Any) -> None:
    """A worker process: a record after the other, None after each job, a text where it cannot go on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends its workers
    worker, parent = Worker(settings), multiprocessing.parent_process()
    assert parent
    try:
        for job in iter(todo.get, None):
            for record in worker.do(job):
                results.put(record)
                if not parent.is_alive():
                    return  # killed: nobody reads what is found
            results.put(None)
    except EdgeCspError as error:
        results.put(str(error))
    except Exception:
        results.put(f"a worker failed: {traceback.format_exc()}")
    finally:
        worker.close()
