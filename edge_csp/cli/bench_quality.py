"""`edge-csp bench quality`: what pruning does to answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edge_csp.cli.options import demo_files
from edge_csp.errors import BenchError

if TYPE_CHECKING:
    from collections.abc import Callable

    from edge_csp.bench.quality.albums import Source
    from edge_csp.bench.quality.run import ModelFiles, Settings

TASKS = ("albums", "text")


def quality(
    model: Annotated[
        list[str],
        typer.Option("-m", "--model", metavar="FILE", help="GGUF file, or demo; may be repeated; by default demo."),
    ] = [],  # noqa: B006
    mmproj: Annotated[
        list[Path],
        typer.Option(
            "--mmproj", metavar="FILE", help="GGUF that reads pictures, one for each -m; default: the one beside it."
        ),
    ] = [],  # noqa: B006
    task: Annotated[
        str, typer.Option("--task", metavar="NAME", help="What is read: albums (of pictures) or text.")
    ] = "albums",
    protocol: Annotated[
        str | None,
        typer.Option(
            "--protocol",
            metavar="NAMES",
            help="When cells are evicted and what is asked then; by default window,first,before,later,bounded, "
            "text: continue,window,before,later,bounded.",
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            metavar="SIZES",
            help="What stays: shares of the prompt (20%) or cells (256); by default 40%,20%,10%,5%, text: 40%,20%.",
        ),
    ] = None,
    policy: Annotated[
        list[str],
        typer.Option(
            "--policy",
            metavar="SPEC",
            help="NAME or NAME:SETTING=VALUE,…; may be repeated; by default all, see docs/bench.md.",
        ),
    ] = [],  # noqa: B006
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="SPEC", help="Policy that all others are compared with; by default blend."),
    ] = None,
    pictures: Annotated[str, typer.Option("--pictures", metavar="N,N…", help="Pictures of the drawn albums.")] = "8,12",
    lengths: Annotated[
        str, typer.Option("--lengths", metavar="N,N…", help="text: tokens of the texts, about.")
    ] = "1000,2000",
    albums: Annotated[
        int | None,
        typer.Option(
            "--albums",
            metavar="N",
            min=1,
            help="Albums of each size, or of the folder at most; by default 12, text: 4 of each topic and length.",
        ),
    ] = None,
    questions: Annotated[
        int | None,
        typer.Option(
            "--questions", metavar="N", min=1, help="Questions about an album, at most; by default 24, text: 8."
        ),
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--folder", metavar="FOLDER", help="Your own pictures and questions (docs/bench.md).")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Draws other albums.")] = 1,
    predict: Annotated[int, typer.Option("-n", "--predict", metavar="N", min=1, help="Most tokens of an answer.")] = 24,
    jobs: Annotated[int, typer.Option("-j", "--jobs", metavar="N", min=1, help="Worker processes.")] = 1,
    threads: Annotated[int, typer.Option("-t", "--threads", metavar="N", min=1, help="Threads of each.")] = 1,
    gpu_layers: Annotated[
        int, typer.Option("-ngl", "--gpu-layers", metavar="N", help="Layers on the GPU, if there is one; -1: all.")
    ] = 0,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="JSON lines, as they are made; a run on the same file goes on."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", min=1, help="Stop after N new answers; go on later.")
    ] = None,
    report: Annotated[Path | None, typer.Option("--report", metavar="FILE", help="Write Markdown there.")] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw accuracy against cells: PNG.")
    ] = None,
) -> None:
    """Answers from pruned caches beside those of the full cache, on the same questions: accuracy, agreement, KL."""
    from edge_csp.bench.quality.run import Settings
    from edge_csp.bench.quality.specs import REFERENCE

    if task == "text":
        measure = _text(model, folder, _numbers("--lengths", lengths), albums or 4, questions or 8, seed)
    elif task == "albums":
        numbers = () if folder else _numbers("--pictures", pictures)
        measure = _albums(folder, numbers, albums or 12, questions or 24, seed)
    else:
        raise BenchError(f"--task {task!r} is unknown: use {' or '.join(TASKS)}")
    settings = Settings(
        models=_models(model or ["demo"], mmproj),
        source=measure.source,
        policies=tuple(policy) or measure.policies,
        budgets=measure.budgets if budget is None else _names(budget),
        protocols=measure.protocols if protocol is None else _names(protocol),
        n_predict=predict,
        n_job=jobs,
        n_thread=threads,
        n_gpu_layers=gpu_layers,
    )
    if against is None and REFERENCE in settings.policies:
        against = REFERENCE
    if against is not None and against not in settings.policies:
        raise BenchError(f"--against {against!r} is none of the policies {', '.join(settings.policies)}")
    _run(settings, out, limit, against, report, plot)


@dataclass(frozen=True)
class _Task:
    """What is measured, unless something else is asked for."""

    source: Source
    policies: tuple[str, ...]
    protocols: tuple[str, ...]
    budgets: tuple[str, ...]


def _albums(folder: Path | None, n_pictures: tuple[int, ...], n_album: int, n_question: int, seed: int) -> _Task:
    from edge_csp.bench.quality.albums import AlbumSource
    from edge_csp.bench.quality.protocols import PROTOCOLS
    from edge_csp.bench.quality.run import BUDGETS
    from edge_csp.bench.quality.specs import DEFAULTS

    return _Task(AlbumSource(n_album, n_question, seed, n_pictures, folder), DEFAULTS, PROTOCOLS, BUDGETS)


def _text(
    model: list[str], folder: Path | None, lengths: tuple[int, ...], n_album: int, n_question: int, seed: int
) -> _Task:
    from edge_csp.bench.quality.texts import BUDGETS, POLICIES, PROTOCOLS, TextSource

    if not model:
        raise BenchError("--task text is about models that know English: name some (-m)")
    if folder:
        raise BenchError("--folder has albums in it: leave it out, or --task text")
    return _Task(TextSource(n_album, n_question, seed, lengths), POLICIES, PROTOCOLS, BUDGETS)


def _run(
    settings: Settings, out: Path | None, limit: int | None, against: str | None, report: Path | None, plot: Path | None
) -> None:
    from edge_csp.bench.quality import report as reports
    from edge_csp.bench.quality import text_report
    from edge_csp.bench.quality.run import run
    from edge_csp.bench.quality.texts import TextSource
    from edge_csp.bench.report import can_plot
    from edge_csp.cli.render import say, stdout

    if plot and not can_plot():
        say("no plot: matplotlib is not installed (pip install 'edge-csp[plot]')")
        plot = None
    with _progress() as progress:
        records = run(settings, out, limit=limit, on_progress=progress)
    found = reports.Summaries(settings, records, against)
    about_text = None
    if isinstance(settings.source, TextSource):
        about_text = text_report.TextSummaries(settings, records, against)
    table, console = text_report.table(about_text) if about_text else reports.table(found), stdout()
    width = console.measure(table, options=console.options.update(max_width=1000)).maximum
    console.width = max(console.width, width)  # a policy may have many settings
    console.print(table)
    if report:
        _write(report, text_report.markdown(about_text) if about_text else reports.markdown(found))
    if plot:
        reports.write_plot(plot, found)


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar with the time that is left, on stderr."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from edge_csp.cli.render import stderr

    columns = TextColumn("answers"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=stderr(), transient=True, disable=not stderr().is_terminal) as bar:
        task = bar.add_task("answers", total=None)

        def show(n_done: int, n_all: int) -> None:
            bar.update(task, completed=n_done, total=n_all)

        yield show


def _models(names: list[str], mmproj: list[Path]) -> tuple[ModelFiles, ...]:
    from edge_csp.bench.quality.run import ModelFiles

    if mmproj and len(mmproj) != len(names):
        raise BenchError(f"{len(mmproj)} --mmproj were given for {len(names)} models: one for each, or none")
    stems = [Path(name).stem for name in names]
    models = []
    for number, name in enumerate(names):
        given = mmproj[number] if mmproj else None
        if name == "demo":
            own, beside = demo_files()
            models.append(ModelFiles("demo", own, given or beside))
            continue
        path = Path(name)
        shown = path.stem if stems.count(path.stem) == 1 else f"{path.resolve().parent.name}/{path.stem}"
        models.append(ModelFiles(shown, path, given))
    return tuple(models)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(number) for number in text.split(",")}))
    except ValueError:
        raise BenchError(f"{option} {text!r} are not whole numbers with commas between them") from None


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BenchError(f"{path} cannot be written ({error.strerror or error})") from error
