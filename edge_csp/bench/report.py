"""What comes out: lines for a terminal, one JSON object, a plot."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from edge_csp import __version__
from edge_csp.bench.alternate import Ratio, Times, free_memory
from edge_csp.bench.decode import DecodePoint
from edge_csp.bench.eviction import STEPS, Eviction, Steps
from edge_csp.bench.memory import Memory
from edge_csp.bench.overhead import Overhead
from edge_csp.bench.prefill import Prefill
from edge_csp.bench.runtime import N_UBATCH
from edge_csp.bench.speed import ModelReport, Result, Settings
from edge_csp.bench.turns import N_NEW, Turns
from edge_csp.errors import BenchError

SCHEMA = 2
"""Changes when a name of the JSON object changes its meaning or goes away."""


def machine() -> dict[str, Any]:
    """What figures depend on, beside the settings."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_free": free_memory(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "edge_csp": __version__,
        "llama_cpp_python": _version("llama-cpp-python"),
        "numpy": _version("numpy"),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def to_dict(settings: Settings, reports: list[ModelReport]) -> dict[str, Any]:
    """The JSON object, see docs/bench.md."""
    return {
        "schema": SCHEMA,
        "machine": machine(),
        "settings": _plain(settings),
        "models": [_plain(report) for report in reports],
    }


_DERIVED = {
    DecodePoint: ("best_unpruned", "best_pruned", "gain", "gain_bounded", "per_potential", "per_potential_bounded"),
    Prefill: ("gain",),
    Memory: ("per_cells",),
    Eviction: ("decode_steps",),
    Steps: ("total",),
    Turns: ("share",),
}


def _plain(value: Any) -> Any:
    """A result as numbers, texts, lists and dicts; times as their median, spread and all of them."""
    if isinstance(value, Times):
        return {"median": value.median, "min": value.spread[0], "max": value.spread[1], "ms": list(value.ms)}
    if isinstance(value, Ratio):
        return asdict(value)
    if is_dataclass(value):
        derived = {name: _plain(getattr(value, name)) for name in _DERIVED.get(type(value), ())}
        return {name: _plain(field) for name, field in vars(value).items()} | derived
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value if value is None or isinstance(value, bool | int | float) else str(value)


def machine_rows(settings: Settings) -> list[tuple[str, str]]:
    """What is said before anything is measured."""
    found = machine()
    return [
        ("machine", f"{found['processor']}, {found['cores']} cores, {_size(found['memory_free'])} free"),
        (
            "threads",
            f"{settings.n_thread}, {'time on the wall' if settings.clock == 'wall' else 'time of the processor'}",
        ),
        ("versions", f"edge-csp {found['edge_csp']}, llama-cpp-python {found['llama_cpp_python']}"),
        ("unpruned by", settings.upstream_python or "our library, without csp (--upstream-python: the unpatched one)"),
    ]


def model_rows(report: ModelReport, settings: Settings) -> list[tuple[str, str]]:
    """What is said of a model before it is measured."""
    most = max(settings.cells)
    return [
        ("model", f"{report.name}: {'; '.join(report.deviations) or 'as given'}"),
        ("llama.cpp", report.libraries["cpu"].strip(" |")),
        ("cells", f"{most} x {report.cell_bytes} bytes (f16) = {_size(most * report.cell_bytes)}"),
    ]


def result_table(result: Result) -> Table:
    """A result with its times, medians and spread; figures come last."""
    table = Table(title=_title(result), title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("", overflow="fold")
    for name in ("median", "min", "max"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for row in _rows(result):
        table.add_row(*row)
    return table


Row = tuple[str, str, str, str, str]


def _title(result: Result) -> str:
    if isinstance(result, DecodePoint):
        return f"decode, {result.n_cell} cells, {result.n_keep} kept: ms per token"
    if isinstance(result, Overhead):
        return f"overhead of recording, against {result.baseline}: ratio of times, median of pairs"
    if isinstance(result, Prefill):
        return f"prefill, {result.n_token} tokens in {result.cells} cells: ms"
    if isinstance(result, Memory):
        return f"memory, {result.n_token} tokens in {result.cells} cells of {result.cell_bytes} bytes: growth"
    if isinstance(result, Eviction):
        return f"eviction, {result.n_cell} cells, {result.n_keep} kept: ms"
    if isinstance(result, Turns):
        return f"next turn, {N_NEW} tokens after {result.n_cell}, {result.n_keep} kept: ms to the first token"
    return f"pictures, {result.n_picture} of them, {result.n_cell} cells: ms to the first token"


def _rows(result: Result) -> list[Row]:
    if isinstance(result, DecodePoint):
        rows = [_times(f"unpruned {name}", times, "first look") for name, times in result.looked_at.items()]
        rows += [_times(f"unpruned {name}", times) for name, times in result.unpruned.items()]
        rows += [_times(f"pruned {name}", times) for name, times in result.pruned.items()]
        rows += [_times(f"bounded {name}", times) for name, times in result.bounded.items()]
        rows += [_times(f"never more cells {name}", times) for name, times in result.small.items()]
        best = f"best unpruned: {result.best_unpruned}", f"best pruned: {result.best_pruned}"
        return [
            *rows,
            _figure("pruned is faster than unpruned", f"{result.gain:.2f} x", best[0]),
            _figure("bounded is", f"{result.gain_bounded:.2f} x"),
            _figure("pruned takes, of never more cells", _percent(result.per_potential), best[1]),
            _figure("bounded takes", _percent(result.per_potential_bounded)),
        ]
    if isinstance(result, Overhead):
        return _overhead_rows(result)
    if isinstance(result, Prefill):
        rows = [
            _times(f"unbounded {name}", times, f"{N_UBATCH} in the middle") for name, times in result.looked_at.items()
        ]
        rows += [_times(f"unbounded {result.setting}", result.unbounded), _times("bounded", result.bounded)]
        rows.append(_times("  of it evicting", result.evicting))
        return [*rows, _figure("bounded is faster", f"{result.gain:.2f} x")]
    if isinstance(result, Memory):
        whole = "does not fit" if result.unbounded is None else _size(result.unbounded)
        return [
            _figure("bounded", _size(result.bounded), f"{_percent(result.per_cells)} of its cells"),
            _figure("  at the most", _size(result.bounded_most)),
            _figure("as many cells, without csp", _size(result.plain)),
            _figure("unbounded", whole, f"{_size(result.n_token * result.cell_bytes)} of cells"),
        ]
    if isinstance(result, Eviction):
        rows = [_times("decode", result.decode)]
        for policy, steps in result.policies.items():
            rows += [_times(f"{policy}: {name}", getattr(steps, name)) for name in (*STEPS, "total")]
            rows.append(_figure(f"{policy} takes", f"{result.decode_steps[policy]:.2f} decode steps"))
            if ratio := steps.to_csp:
                rows.append(_ratio(f"{policy}, times csp", ratio, "rounds"))
        return rows
    if isinstance(result, Turns):
        rows = [_times("going on", result.going_on), _times("evaluating all again", result.again)]
        return [*rows, _figure("going on takes", _percent(result.share))]
    fields = ("first", "second", "again")
    words = ("new pictures", "a further question", "the same pictures, new conversation")
    return [
        _times(word, getattr(result, name), f"{n} encoder runs")
        for name, word, n in zip(fields, words, result.n_encoded, strict=True)
    ]


def _overhead_rows(result: Overhead) -> list[Row]:
    found = {
        f"decode, {result.n_cell} cells, recording": result.decode_recording,
        f"prefill, {result.n_batch} tokens, recording": result.prefill_recording,
        f"decode, {result.n_cell} cells, ours without csp": result.decode_detached,
        f"prefill, {result.n_batch} tokens, ours without csp": result.prefill_detached,
    }
    return [_ratio(name, ratio, "pairs") for name, ratio in found.items() if ratio is not None]


def _times(name: str, times: Times, note: str = "") -> Row:
    low, high = times.spread
    return name, f"{times.median:.2f}", f"{low:.2f}", f"{high:.2f}", note


def _ratio(name: str, ratio: Ratio, pairs: str) -> Row:
    median, low, high = (f"{figure:.4f}" for figure in (ratio.median, ratio.low, ratio.high))
    return name, median, low, high, f"95 % interval, {ratio.n_pair} {pairs}"


def _figure(name: str, value: str, note: str = "") -> Row:
    return name, value, "", "", note


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _size(n_bytes: float) -> str:
    return f"{n_bytes / (1 << 20):.1f} MiB" if n_bytes < 1 << 30 else f"{n_bytes / (1 << 30):.2f} GiB"


def can_plot() -> bool:
    """True if matplotlib is installed."""
    return find_spec("matplotlib") is not None


def write_plot(path: Path, reports: list[ModelReport]) -> None:
    """Decode against cells and batches of the prompt, a row per model.

    Raises BenchError if there is nothing to draw or the file cannot be written.
    """
    from matplotlib.figure import Figure

    drawn = [report for report in reports if report.decode or report.prefill]
    if not drawn:
        raise BenchError("there is nothing to plot: neither decode nor prefill was measured")
    figure = Figure(figsize=(11, 4 * len(drawn)), layout="constrained")
    for report, (left, right) in zip(drawn, figure.subplots(len(drawn), 2, squeeze=False), strict=True):
        _plot_decode(left, report)
        _plot_prefill(right, report)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise BenchError(f"{path} cannot be written ({getattr(error, 'strerror', None) or error})") from error


def _plot_decode(axes: Any, report: ModelReport) -> None:
    axes.set(title=f"{report.name}: decode", xlabel="cells evaluated before", ylabel="ms per token")
    cells = [point.n_cell for point in report.decode]
    best = {
        "unpruned, best setting": [point.unpruned[point.best_unpruned] for point in report.decode],
        "pruned": [point.pruned[point.best_pruned] for point in report.decode],
        "bounded": [point.bounded[point.best_pruned] for point in report.decode],
        "never more cells": [point.small[point.best_pruned] for point in report.decode],
    }
    for (name, times), style in zip(best.items(), ("o-", "o-", "s:", "x--"), strict=True):
        axes.plot(cells, [one.median for one in times], style, label=name)
        axes.fill_between(cells, *zip(*(np.quantile(one.ms, (0.25, 0.75)) for one in times), strict=True), alpha=0.2)
    if cells:
        axes.set_ylim(bottom=0)
        axes.legend()


def _plot_prefill(axes: Any, report: ModelReport) -> None:
    axes.set(title=f"{report.name}: prefill", xlabel="tokens read before", ylabel=f"ms per {N_UBATCH} tokens")
    if report.prefill is None:
        return
    bounded = f"bounded to {report.prefill.cells} cells, evictions included"
    for name, batches in (
        (f"unbounded, {report.prefill.setting}", report.prefill.unbounded_batches),
        (bounded, report.prefill.bounded_batches),
    ):
        axes.plot([i * N_UBATCH for i in range(len(batches))], batches, label=name)
    axes.set_ylim(bottom=0)
    axes.legend()
