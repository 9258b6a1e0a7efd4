"""`edge-csp demo`: the embedded model and its album, with the full cache beside the pruned one."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edge_csp.cli import options
from edge_csp.cli.options import ContextOptions, PruningOptions, Threads, demo_files, grouped
from edge_csp.errors import ModelError

if TYPE_CHECKING:
    from rich.table import Table

    from edge_csp.chat import Message
    from edge_csp.context import Context
    from edge_csp.pruning import Pruning
    from edge_csp.usage import CacheUse, Counters

PRUNING = PruningOptions(budget="20%")
N_PREDICT = 64
WHAT_IT_IS = (
    "This is the embedded demo model: small enough to come along, trained on drawn pictures, no product model. "
    "It shows what pruning keeps and saves; for real questions give a real model with -m or -hf."
)


@dataclass(frozen=True)
class Album:
    """Messages with pictures in them, and questions about them with their answers."""

    messages: list[Message]
    questions: list[tuple[str, str]]
    note: str


@dataclass(frozen=True)
class Answer:
    """An answer, the use of the cache when it began, and what the conversation took."""

    text: str
    right: bool
    use: CacheUse
    counters: Counters


@dataclass(frozen=True)
class Row:
    """A question, and what came out with the full cache and with the pruned one."""

    question: str
    expected: str
    full: Answer
    pruned: Answer


@grouped
def command(
    context: ContextOptions,
    pruning: PruningOptions = PRUNING,
    threads: Threads = 1,  # more only wait for each other in a model of this size
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Show pruning on the embedded model and album: the same questions with the full cache and with the budget.

    Every question is asked in a fresh conversation: the whole album first, the question last. Answers are greedy.
    """
    from edge_csp.budget import parse_budget
    from edge_csp.cli.render import Bars
    from edge_csp.context import Context
    from edge_csp.model import VisionModel
    from edge_csp.opening import bounded_cells

    files = demo_files()
    album = read_album(options.DEMO / "album")
    bars = Bars()
    try:
        with (
            VisionModel(*files, n_threads=threads if threads > 0 else None, on_progress=bars) as model,
            Context(model, prune=False, **{**context.settings(), "softmax_n": 0.0}) as full,
            Context(model, n_window=pruning.n_obs, **context.settings()) as pruned,
        ):
            settings = pruning.pruning()
            if pruning.cells:
                settings = replace(settings, cells=bounded_cells(parse_budget(pruning.cells), model, album.messages))
            rows = []
            for number, (question, expected) in enumerate(album.questions):
                bars("demo", number / len(album.questions))
                everything = _ask(full, album, question, expected, None)
                rows.append(Row(question, expected, everything, _ask(pruned, album, question, expected, settings)))
            n_encoded = model.n_encoded
    finally:
        bars.close()
    show = _print_json if as_json else _print_tables
    show(rows, album.note, pruning, n_encoded)


def read_album(folder: Path) -> Album:
    """Read album.json and its pictures. Raises ModelError if the folder does not hold them."""
    from edge_csp.images import load_picture

    file = folder / "album.json"

    def part(given: dict[str, Any]) -> dict[str, Any]:
        if given["type"] != "image":
            return given
        return {"type": "image", "picture": load_picture(folder / given["image"], name=given["image"])}

    def content(given: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
        return given if isinstance(given, str) else [part(one) for one in given]

    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        messages = [{**message, "content": content(message["content"])} for message in data["messages"]]
        questions = [(str(question["q"]), str(question["a"])) for question in data["questions"]]
        if not questions:
            raise ValueError("no questions")
    except OSError as error:
        raise ModelError(f"the embedded album is not installed: {file} ({error.strerror})") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"the embedded album is damaged: {file} ({error!r})") from error
    return Album(list(messages), questions, str(data.get("note", "")))


def _ask(context: Context, album: Album, question: str, expected: str, pruning: Pruning | None) -> Answer:
    """Ask in a fresh conversation."""
    from edge_csp.sampling import Sampling
    from edge_csp.session import Session

    context.clear()
    session = Session(context, pruning=pruning, sampling=Sampling(temperature=0))
    session.prefill([*album.messages, {"role": "user", "content": question}])
    session.prune()
    use = session.cache_use()
    text = "".join(session.generate(n_predict=N_PREDICT)).strip()
    return Answer(text, text == expected, use, session.counters)


def _n_right(rows: Sequence[Row]) -> tuple[int, int]:
    return sum(row.full.right for row in rows), sum(row.pruned.right for row in rows)


def _print_tables(rows: Sequence[Row], note: str, pruning: PruningOptions, n_encoded: int) -> None:
    from edge_csp.cli.render import cells_table, say, stdout

    out, first = stdout(), rows[0].pruned.use
    say(WHAT_IT_IS + (f" {note}" if note else ""))
    out.print(_answers_table(rows, pruning))
    out.print(
        f"\nCells at the first question ({first.bytes_per_cell} bytes each; kept ones are a mean over layers and heads)"
    )
    out.print(cells_table(first))
    out.print()
    out.print(_sides_table(rows, pruning))
    n_full, n_pruned = _n_right(rows)
    out.print(f"\n{len(first.pictures)} pictures, encoded {n_encoded} times for {2 * len(rows)} conversations; greedy")
    out.print(
        f"{n_full} of {len(rows)} answers right with the full cache, {n_pruned} of {len(rows)} with {pruning.budget}"
    )


def _answers_table(rows: Sequence[Row], pruning: PruningOptions) -> Table:
    from rich.table import Table

    from edge_csp.cli.render import printable

    table = Table("question", "expected", "full cache", "", f"{pruning.policy} {pruning.budget}", "", "cells", box=None)
    for row in rows:
        texts = row.question, row.expected, row.full.text, _mark(row.full), row.pruned.text, _mark(row.pruned)
        cells = f"{row.pruned.use.n_cell} of {row.pruned.use.n_token}"
        table.add_row(*(printable(text).replace("[", r"\[") for text in texts), cells)
    return table


def _mark(answer: Answer) -> str:
    mark, word = ("✓", "right") if answer.right else ("✗", "wrong")
    try:
        mark.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return word
    return mark


def _sides(rows: Sequence[Row], pruning: PruningOptions) -> list[tuple[str, list[Answer]]]:
    pruned = f"{pruning.policy} {pruning.budget}"
    return [("full cache", [row.full for row in rows]), (pruned, [row.pruned for row in rows])]


def _sides_table(rows: Sequence[Row], pruning: PruningOptions) -> Table:
    """Bytes and speeds of both sides."""
    from edge_csp.cli.render import column_table, size, speed

    table = column_table("", "cells", "bytes", "evicting", "answering")
    for name, answers in _sides(rows, pruning):
        use = answers[0].use
        evict_ms = 1000 * sum(answer.counters.evict_s for answer in answers) / len(answers)
        decode_s = sum(answer.counters.decode_s for answer in answers)
        n_generated = sum(answer.counters.n_generated for answer in answers)
        n_bytes = size(use.n_cell * use.bytes_per_cell)
        table.add_row(name, str(use.n_cell), n_bytes, f"{evict_ms:.1f} ms", speed(n_generated, decode_s))
    return table


def _print_json(rows: Sequence[Row], note: str, pruning: PruningOptions, n_encoded: int) -> None:
    from edge_csp.cli.render import times_dict, use_dict

    def answer(given: Answer) -> dict[str, Any]:
        what = {"answer": given.text, "right": given.right}
        return {**what, **use_dict(given.use), "times": times_dict(given.counters)}

    n_full, n_pruned = _n_right(rows)
    result = {
        "model": WHAT_IT_IS,
        "note": note,
        "policy": pruning.policy,
        "budget": pruning.budget,
        "pictures_encoded": n_encoded,
        "n_question": len(rows),
        "right_full": n_full,
        "right_pruned": n_pruned,
        "questions": [
            {"question": row.question, "expected": row.expected, "full": answer(row.full), "pruned": answer(row.pruned)}
            for row in rows
        ],
    }
    print(json.dumps(result, indent=1))
