"""`edge-csp bench speed`: every section of every model, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from edge_csp.bench import models
from edge_csp.bench.alternate import does_not_fit
from edge_csp.bench.decode import DecodePoint, bytes_per_cell, measure_decode
from edge_csp.bench.eviction import POLICIES, Eviction, measure_eviction
from edge_csp.bench.memory import Memory, measure_memory
from edge_csp.bench.overhead import Overhead, measure_overhead
from edge_csp.bench.prefill import Prefill, measure_prefill
from edge_csp.bench.process import Workers, workers
from edge_csp.bench.runtime import N_UBATCH, Setting
from edge_csp.bench.turns import PictureTurns, Turns, measure_picture_turns, measure_turns
from edge_csp.budget import Budget
from edge_csp.metadata import find_mmproj

SECTIONS = ("decode", "overhead", "prefill", "memory", "eviction", "turns")


@dataclass(frozen=True)
class Settings:
    """What to measure. Numbers of cells and tokens: see docs/bench.md."""

    budget: Budget
    policies: tuple[str, ...] = POLICIES
    models: tuple[str, ...] = ("135m",)
    sections: tuple[str, ...] = SECTIONS
    n_layer: int | None = None
    mmproj: Path | None = None
    n_thread: int = 1
    n_gpu_layers: int = -1
    clock: str = "wall"
    cells: tuple[int, ...] = (1024, 4096, 8192, 16384)
    prefill_tokens: int = 16384
    prefill_cells: int = 1024
    prefill_repeat: int = 1
    memory_cells: int = 2048
    n_ubatch: int = N_UBATCH
    n_repeat: int = 5
    upstream_python: str | None = None


@dataclass
class ModelReport:
    """What was measured on a model; what was not asked for, or did not fit, is empty."""

    name: str
    deviations: tuple[str, ...]
    cell_bytes: int
    libraries: dict[str, str] = field(default_factory=dict)
    decode: list[DecodePoint] = field(default_factory=list)
    overhead: Overhead | None = None
    prefill: Prefill | None = None
    memory: Memory | None = None
    eviction: list[Eviction] = field(default_factory=list)
    turns: Turns | None = None
    picture_turns: PictureTurns | None = None


Result = DecodePoint | Overhead | Prefill | Memory | Eviction | Turns | PictureTurns


@dataclass(frozen=True)
class Listener:
    """Told as it goes: of a model before anything is measured, of every result, and of what is left out."""

    on_model: Callable[[ModelReport], None]
    on_result: Callable[[ModelReport, Result], None]
    say: Callable[[str], None]


def measure(settings: Settings, listener: Listener) -> list[ModelReport]:
    """Raises BenchError if a model, a library or a number of cells cannot be used."""
    reports = []
    for name in settings.models:
        with models.opened(name, settings.n_layer) as model:
            reports.append(_measure_model(model, settings, listener))
    return reports


def _measure_model(model: models.BenchModel, settings: Settings, listener: Listener) -> ModelReport:
    report = ModelReport(model.name, model.deviations, bytes_per_cell(model, Setting()))

    def done(result: Result) -> None:
        listener.on_result(report, result)

    n_thread, n_gpu_layers = settings.n_thread, settings.n_gpu_layers
    with workers(
        model,
        n_thread=n_thread,
        n_gpu_layers=n_gpu_layers,
        clock=settings.clock,
        upstream_python=settings.upstream_python,
    ) as pair:
        report.libraries = {"ours": pair.ours.version, "unpruned": pair.plain.version, "cpu": pair.ours.system}
        listener.on_model(report)
        _decode(model, pair, settings, report, listener)
        if "prefill" in settings.sections:
            report.prefill = measure_prefill(
                model,
                pair,
                settings.prefill_tokens,
                settings.prefill_cells,
                n_repeat=settings.prefill_repeat,
                say=listener.say,
            )
            if report.prefill:
                done(report.prefill)
        if "turns" in settings.sections:
            report.turns = measure_turns(
                pair, min(settings.cells), settings.budget, cell_bytes=report.cell_bytes, n_repeat=settings.n_repeat
            )
            done(report.turns)
    if "memory" in settings.sections:
        report.memory = measure_memory(
            model,
            settings.prefill_tokens,
            settings.memory_cells,
            n_thread=n_thread,
            n_gpu_layers=n_gpu_layers,
            n_ubatch=settings.n_ubatch,
        )
        done(report.memory)
    if "turns" in settings.sections and (mmproj := settings.mmproj or find_mmproj(model.path)):
        report.picture_turns = measure_picture_turns(
            model.path,
            mmproj,
            settings.budget,
            n_thread=n_thread,
            n_gpu_layers=n_gpu_layers,
            n_repeat=settings.n_repeat,
        )
        done(report.picture_turns)
    return report


def _decode(
    model: models.BenchModel, pair: Workers, settings: Settings, report: ModelReport, listener: Listener
) -> None:
    """The sections that decode single tokens."""
    n_repeat, budget = settings.n_repeat, settings.budget
    if "overhead" in settings.sections:
        report.overhead = measure_overhead(model, pair, min(settings.cells), n_block=n_repeat)
        listener.on_result(report, report.overhead)
    for n_cell in settings.cells:
        if "decode" in settings.sections:
            point = measure_decode(model, pair, n_cell, budget, n_round=n_repeat, say=listener.say)
            if point:
                report.decode.append(point)
                listener.on_result(report, point)
        if "eviction" in settings.sections:
            if reason := does_not_fit(n_cell, report.cell_bytes):
                listener.say(f"{model.name}, eviction left out: {reason}")
                continue
            eviction = measure_eviction(
                pair,
                n_cell,
                budget,
                cell_bytes=report.cell_bytes,
                n_repeat=n_repeat,
                policies=settings.policies,
            )
            report.eviction.append(eviction)
            listener.on_result(report, eviction)
