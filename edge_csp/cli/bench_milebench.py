"""`edge-csp bench milebench` and `milebench-score`."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edge_csp.cli.options import (
    ContextOptions,
    ModelOptions,
    PromptOptions,
    PruningOptions,
    SamplingOptions,
    clean,
    grouped,
    opened,
)
from edge_csp.errors import BenchError

if TYPE_CHECKING:
    from edge_csp.bench.milebench.runner import Outcome
    from edge_csp.session import Session

MAX_PROMPT, N_PREDICT, TEMPLATE_ROOM = 4096, 512, 256
"""As in bench.milebench.runner, which would load numpy; a test compares them."""
CONTEXT = ContextOptions(ctx_size=MAX_PROMPT + N_PREDICT + TEMPLATE_ROOM)


def register(app: typer.Typer) -> None:
    """Add the commands to `edge-csp bench`."""
    app.command("milebench", help=run.__doc__)(run)
    app.command("milebench-score", help=score.__doc__)(score)


@grouped
def run(
    data_dir: Annotated[
        Path, typer.Argument(metavar="DATA_DIR", help="Folder of the sets, ALFRED/ALFRED.json and so on.")
    ],
    model: ModelOptions,
    pruning: PruningOptions = PruningOptions(min_cells=0),  # noqa: B008
    context: ContextOptions = CONTEXT,
    dataset: Annotated[
        str | None, typer.Option("--dataset", metavar="NAME,NAME…", help="Only these sets; default: all 29.")
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Answers and scores; a later run goes on with what is there.")
    ] = Path("milebench"),
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", min=1, help="Only the first N samples of every set.")
    ] = None,
    predict: Annotated[
        int, typer.Option("-n", "--predict", metavar="N", min=1, help="Most tokens of an answer.")
    ] = N_PREDICT,
    max_prompt: Annotated[
        int,
        typer.Option(
            "--max-prompt",
            metavar="N",
            min=1,
            help="Tokens and cells of pictures that a prompt is cut to, as published.",
        ),
    ] = MAX_PROMPT,
    system_prompt: Annotated[
        str | None, typer.Option("-sys", "--system-prompt", metavar="TEXT", help="System message.")
    ] = None,
) -> None:
    """Ask the questions of MileBench, each in a fresh conversation, greedily, and score the answers.

    Answers are kept as they come; the same command goes on where it was stopped. What cannot be read is told and left
    out, and the exit status is then 1.
    """
    from edge_csp.bench.milebench.data import select
    from edge_csp.bench.milebench.runner import Listener, Runner, claim
    from edge_csp.cli.render import Bars

    names = select(data_dir, dataset)
    sampling, prompt = SamplingOptions(temp=0), PromptOptions(system_prompt=system_prompt, predict=predict)
    bars = Bars()

    def on_progress(what: str, done: float) -> None:
        if what == "load":
            bars(what, done)

    with ExitStack() as stack:
        stack.callback(bars.close)
        settings = model, context, pruning, sampling, prompt
        session = stack.enter_context(opened(*settings, on_progress=on_progress, on_notice=lambda notice: None))
        _check_fit(session, max_prompt, predict)
        claim(
            out,
            _files(session)
            | asdict(context)
            | asdict(pruning)
            | {"max_prompt": max_prompt, "predict": predict, "system_prompt": system_prompt and clean(system_prompt)},
        )
        shown = stack.enter_context(_Shown())
        runner = Runner(session, data_dir, out, Listener(shown.progress, shown.left_out), max_prompt, predict, limit)
        outcomes = [shown.done(outcome) for outcome in runner.run(names)]
    _report(outcomes)


def score(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder with a folder per set, which holds pred.json or pred.jsonl.")
    ],
    data_dir: Annotated[
        Path | None,
        typer.Option(
            "--data-dir",
            metavar="DIR",
            help="Folder of the sets. Without it options and pictures are those of the prompts, which may be cut.",
        ),
    ] = None,
    dataset: Annotated[
        str | None, typer.Option("--dataset", metavar="NAME,NAME…", help="Only these sets; default: all in DIR.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Write there; default: DIR itself.")] = None,
) -> None:
    """Score predictions of MileBench that are there already, of this program or of the published ones."""
    from edge_csp.bench.milebench.runner import score_folder

    folders = _folders(directory, dataset)
    with _Shown() as shown:
        outcomes = [score_folder(one, (out or directory) / one.name, data_dir, shown.left_out) for one in folders]
    _report(outcomes)


def _folders(directory: Path, dataset: str | None) -> list[Path]:
    if dataset:
        return [directory / name.strip() for name in dataset.split(",")]
    found = sorted({file.parent for name in ("pred.json", "pred.jsonl") for file in directory.glob(f"*/{name}")})
    if not found:
        raise BenchError(f"{directory} holds no predictions: there is no folder with pred.json or pred.jsonl in it")
    return found


def _check_fit(session: Session, max_prompt: int, predict: int) -> None:
    needed = max_prompt + predict + TEMPLATE_ROOM
    if session.pruning.cells is None and session.context.n_ctx < needed:
        raise BenchError(
            f"a context of {session.context.n_ctx} cells is too small for prompts of {max_prompt} tokens, answers of "
            f"{predict} and a chat template: raise it (-c {needed}), bound the cache (--cells), or lower --max-prompt"
        )


def _files(session: Session) -> dict[str, Any]:
    """What a model is known by in the settings of a run."""
    info, mmproj = session.model.info, session.model.mmproj_info
    found = {"model": info.path.name, "model_bytes": info.path.stat().st_size}
    return found | {
        "mmproj": mmproj.path.name if mmproj else None,
        "mmproj_bytes": mmproj.path.stat().st_size if mmproj else None,
    }


class _Shown:
    """Progress and what is left out, on stderr. Bars appear in a terminal only."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        from edge_csp.cli.render import stderr

        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self._progress = Progress(*columns, console=stderr(), transient=True, disable=not stderr().is_terminal)
        self._tasks: dict[str, Any] = {}

    def progress(self, name: str, done: int, total: int) -> None:
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name)
        self._progress.update(self._tasks[name], completed=done, total=total, visible=done < total)

    def left_out(self, line: str) -> None:
        from edge_csp.cli.render import say_error

        say_error(BenchError(line))

    def done(self, outcome: Outcome) -> Outcome:
        """Tell the score of a set, long before the last set has one."""
        from edge_csp.cli.render import say

        if outcome.scores:
            say(f"{outcome.name}: {100 * outcome.scores.value:.1f} from {outcome.n_scored} answers")
        return outcome

    def __enter__(self) -> _Shown:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


def _report(outcomes: Iterable[Outcome]) -> None:
    """Print the scores; the exit status is 1 if something was left out."""
    from rich.markup import escape

    from edge_csp.bench.milebench.score import LEVELS
    from edge_csp.cli.render import column_table, say, stdout

    table = column_table("", "metric", "score", *LEVELS, "answers", "left out")
    n_left_out = 0
    for outcome in outcomes:
        n_left_out += outcome.n_left_out
        figures = ["-"] * (2 + len(LEVELS))
        if outcome.scores:
            total = outcome.scores.total
            means, results = total["image_quantity_level-Accuracy"], total["image_quantity_level-Result"]
            levels = [f"{100 * means[level]:.1f}" if results[level][1] else "-" for level in LEVELS]
            figures = [outcome.scores.metric, f"{100 * outcome.scores.value:.1f}", *levels]
        table.add_row(escape(outcome.name), *figures, str(outcome.n_scored), str(outcome.n_left_out or ""))
    stdout().print(table)
    if n_left_out:
        say(f"{n_left_out} left out, see above")
        raise typer.Exit(1)
