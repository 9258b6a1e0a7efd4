"""`edge-csp bench`: measure on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edge_csp.cli import bench_milebench
from edge_csp.cli.bench_quality import quality
from edge_csp.cli.options import demo_files
from edge_csp.errors import BenchError

if TYPE_CHECKING:
    from edge_csp.bench.speed import Settings

app = typer.Typer(help="Measure pruning on this machine.", no_args_is_help=True)

SECTIONS = "decode,overhead,prefill,memory,eviction,turns"


@app.callback()
def _start() -> None:
    """Measure pruning on this machine."""


app.command("quality")(quality)


@app.command("speed")
def speed(
    model: Annotated[
        list[str],
        typer.Option(
            "-m",
            "--model",
            metavar="MODEL",
            help="Shape of random weights (7b, 3b, 1.7b, 135m), GGUF file, or demo; may be repeated [default: 135m].",
        ),
    ] = [],  # noqa: B006
    mmproj: Annotated[
        Path | None, typer.Option("--mmproj", metavar="FILE", help="GGUF that reads pictures, for turns.")
    ] = None,
    layers: Annotated[
        int | None, typer.Option("--layers", metavar="N", min=1, help="Fewer layers than the shape has.")
    ] = None,
    threads: Annotated[int, typer.Option("-t", "--threads", metavar="N", min=1, help="Threads.")] = 1,
    gpu_layers: Annotated[
        int, typer.Option("-ngl", "--gpu-layers", metavar="N", help="Layers on the GPU, if there is one; -1: all.")
    ] = -1,
    clock: Annotated[
        str,
        typer.Option(
            "--clock", metavar="wall|cpu", help="cpu: time of the processor, where others use the machine too."
        ),
    ] = "wall",
    only: Annotated[str, typer.Option("--only", metavar="SECTIONS", help="What to measure.")] = SECTIONS,
    cells: Annotated[
        str, typer.Option("--cells", metavar="N,N…", help="decode, eviction: cells; overhead, turns: the fewest.")
    ] = "1024,4096,8192,16384",
    budget: Annotated[
        str, typer.Option("--budget", metavar="SIZE", help="What stays of them: 20%, 512 (cells) or 64MiB.")
    ] = "20%",
    policy: Annotated[
        list[str],
        typer.Option(
            "--policy",
            metavar="SPEC",
            help="eviction: NAME or NAME:SETTING=VALUE,…; may be repeated; by default blend and csp.",
        ),
    ] = [],  # noqa: B006
    prefill_tokens: Annotated[
        int, typer.Option("--prefill-tokens", metavar="N", min=2, help="prefill, memory: tokens of the prompt.")
    ] = 16384,
    prefill_cells: Annotated[
        int, typer.Option("--prefill-cells", metavar="N", min=256, help="prefill: cells of the bounded cache.")
    ] = 1024,
    prefill_repeat: Annotated[
        int, typer.Option("--prefill-repeat", metavar="N", min=1, help="prefill: repetitions of the prompt.")
    ] = 1,
    memory_cells: Annotated[
        int, typer.Option("--memory-cells", metavar="N", min=256, help="memory: cells of the bounded cache.")
    ] = 2048,
    ubatch_size: Annotated[
        int, typer.Option("-ub", "--ubatch-size", metavar="N", min=1, help="memory: tokens evaluated at once.")
    ] = 512,
    repeat: Annotated[int, typer.Option("--repeat", metavar="N", min=1, help="Rounds of everything else.")] = 5,
    upstream_python: Annotated[
        str | None,
        typer.Option(
            "--upstream-python",
            metavar="PATH",
            envvar="EDGE_CSP_UPSTREAM_PYTHON",
            show_envvar=False,
            help="Python with the unpatched llama-cpp-python, for all that is unpruned.",
        ),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all times there.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draw decode and prefill: PNG.")] = None,
) -> None:
    """Decode, prefill, memory and eviction, pruned against the best unpruned setting, in turns in one run."""
    from edge_csp.bench.speed import Settings
    from edge_csp.budget import parse_budget

    settings = Settings(
        budget=parse_budget(budget),
        policies=_policies(policy),
        models=tuple(str(demo_files()[0]) if name == "demo" else name for name in model or ["135m"]),
        sections=_sections(only),
        n_layer=layers,
        mmproj=mmproj,
        n_thread=threads,
        n_gpu_layers=gpu_layers,
        clock=_clock(clock, threads),
        cells=_cells(cells),
        prefill_tokens=prefill_tokens,
        prefill_cells=prefill_cells,
        prefill_repeat=prefill_repeat,
        memory_cells=memory_cells,
        n_ubatch=ubatch_size,
        n_repeat=repeat,
        upstream_python=upstream_python,
    )
    _run(settings, json_file, plot)


bench_milebench.register(app)


def _run(settings: Settings, json_file: Path | None, plot: Path | None) -> None:
    """Measure, print as it goes, write files; what has been measured is written even if the rest fails."""
    from edge_csp.bench import report
    from edge_csp.bench.speed import Listener, ModelReport, Result, measure
    from edge_csp.cli.render import rows_table, say, stdout

    if plot and not report.can_plot():
        say("no plot: matplotlib is not installed (pip install 'edge-csp[plot]')")
        plot = None
    out, reports = stdout(), list[ModelReport]()
    out.print(rows_table(report.machine_rows(settings)))

    def on_model(found: ModelReport) -> None:
        reports.append(found)
        out.print()
        out.print(rows_table(report.model_rows(found, settings)))

    def on_result(_found: ModelReport, result: Result) -> None:
        out.print()
        out.print(report.result_table(result))

    try:
        measure(settings, Listener(on_model, on_result, say))
    finally:
        if json_file and reports:
            _write(json_file, json.dumps(report.to_dict(settings, reports), indent=1) + "\n")
    if plot:
        report.write_plot(plot, reports)


def _policies(specs: list[str]) -> tuple[str, ...]:
    from edge_csp.bench.eviction import POLICIES
    from edge_csp.bench.quality.specs import parse_spec

    for number, spec in enumerate(specs):
        if parse_spec(spec).policy is None or parse_spec(spec).keeps_all:
            raise BenchError(f"{spec} evicts nothing: there is nothing to measure")
        if spec in specs[:number]:
            raise BenchError(f"policy {spec} is there twice")
    return tuple(specs) or POLICIES


def _clock(name: str, n_thread: int) -> str:
    if name not in ("wall", "cpu"):
        raise BenchError(f"clock {name!r} is unknown: use wall or cpu")
    if name == "cpu" and n_thread > 1:
        raise BenchError(f"--clock cpu adds up the time of all threads: it needs one thread, not {n_thread}")
    return name


def _sections(text: str) -> tuple[str, ...]:
    known = SECTIONS.split(",")
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise BenchError(f"section {name!r} is unknown: use {', '.join(known)}")
    return tuple(name for name in known if name in names)


def _cells(text: str) -> tuple[int, ...]:
    try:
        cells = sorted({int(number) for number in text.split(",")})
    except ValueError:
        raise BenchError(f"cells {text!r} are not whole numbers with commas between them") from None
    for n_cell in cells:
        if n_cell < 256 or n_cell % 256:
            raise BenchError(f"{n_cell} cells cannot be measured: llama.cpp has multiples of 256")
    return tuple(cells)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BenchError(f"{path} cannot be written ({error.strerror or error})") from error
