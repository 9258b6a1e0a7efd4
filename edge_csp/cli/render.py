"""What commands print: progress bars, tables, sizes. Progress, notes and errors go to stderr, results to stdout."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.progress_bar import ProgressBar
from rich.table import Table

if TYPE_CHECKING:
    from edge_csp.images import Picture
    from edge_csp.patches import TurnUse
    from edge_csp.session import Session
    from edge_csp.usage import CacheUse, Counters

_WORDS = {
    "load": "loading the model",
    "encode": "encoding a picture",
    "prefill": "reading the prompt",
    "demo": "asking",
}
_BAR_WIDTH = 40


@cache
def stdout() -> Console:
    return Console(highlight=False, soft_wrap=True)


@cache
def stderr() -> Console:
    return Console(stderr=True, highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """A dim note on stderr."""
    stderr().print(f"[dim]{escape(printable(text))}[/dim]")


def say_error(error: Exception) -> None:
    stderr().print(f"[red]edge-csp: error:[/red] {escape(str(error))}")


def printable(text: str) -> str:
    """Text without control characters, which could give orders to a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def write(text: str) -> None:
    """A piece of an answer on stdout; bytes for a file or pipe are left alone."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def size(n_bytes: float) -> str:
    """Bytes in words; powers of 1024."""
    for unit in ("bytes", "KiB", "MiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.0f} bytes" if unit == "bytes" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.1f} GiB"


def percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f}%" if whole else "-"


def speed(n: int, seconds: float) -> str:
    """Tokens per second in words."""
    return f"{n / seconds:.1f} tokens/s" if n and seconds else "-"


def rounded(values: Sequence[float], digits: int = 1) -> list[float]:
    """Values rounded so that they still add up: the largest remainders are rounded up."""
    scale = 10**digits
    floors = [math.floor(value * scale + 1e-6) for value in values]
    missing = round(sum(values) * scale) - sum(floors)
    order = sorted(range(len(values)), key=lambda i: floors[i] - values[i] * scale)
    for i in order[:missing]:
        floors[i] += 1
    return [floor / scale for floor in floors]


class Bars:
    """Progress bars on stderr, one at a time, as a callback of the session; nothing where stderr is no terminal."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._what = ""

    def __call__(self, what: str, done: float) -> None:
        """Show that the part `done` of "load", "encode" or "prefill" is done."""
        if not stderr().is_terminal:
            return
        if what != self._what or self._progress is None:
            self.close()
            columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn()
            self._progress = Progress(*columns, console=stderr(), transient=True)
            self._progress.start()
            self._task = self._progress.add_task(_WORDS[what], total=None if what == "encode" else 1.0)
            self._what = what
        if self._task is not None:
            self._progress.update(self._task, completed=done)
        if done >= 1:
            self.close()

    def close(self) -> None:
        """Take the bar away. A second call does nothing."""
        if self._progress is not None:
            self._progress.stop()
        self._progress, self._what = None, ""


def rows_table(rows: Iterable[tuple[str, str]]) -> Table:
    """A table of labels and values."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in rows:
        table.add_row(escape(label), escape(value))
    return table


def column_table(first: str, *others: str) -> Table:
    """An empty table: a column of names, columns of numbers."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def notes(picture: Picture) -> None:
    """Say what was done to a picture."""
    for note in picture.notes:
        say(f"{picture.name}: {note}")


def kept_line(session: Session) -> str:
    """How much of the conversation is in the cache now."""
    n_cell, n_token, per_cell = session.n_cell, session.n_token, session.context.bytes_per_cell
    return (
        f"kept {n_cell} of {n_token} cells ({percent(n_cell, n_token)}), "
        f"{size(n_cell * per_cell)} of {size(n_token * per_cell)}"
    )


def cache_line(session: Session) -> str:
    """The cache in words."""
    context = session.context
    bound = "bounded to " if session.pruning.cells else ""
    return (
        f"{bound}{session.n_cell_max} cells of {size(context.bytes_per_cell)}, K {context.type_k}, V {context.type_v}, "
        f"flash attention {context.flash_attn}"
    )


def cells_table(use: CacheUse) -> Table:
    """Cells and bytes per picture and modality; the kept ones are means over layers and KV heads and add up."""
    filled = [picture.n_cell for picture in use.pictures]
    kept = rounded([*(picture.kept for picture in use.pictures), use.text_kept])
    in_pictures = round(sum(kept[:-1]), 1)
    table = column_table("", "cells", "kept", "", "bytes")

    def add(name: str, n_cell: int, n_kept: float) -> None:
        n_bytes = size(n_kept * use.bytes_per_cell)
        table.add_row(escape(name), str(n_cell), f"{n_kept:.1f}", percent(n_kept, n_cell), n_bytes)

    for number, (picture, n_kept) in enumerate(zip(use.pictures, kept, strict=False), start=1):
        pinned = " (pinned)" if picture.pinned else ""
        add(f"{number} {Path(printable(picture.name)).name}{pinned}", picture.n_cell, n_kept)
    add("pictures", sum(filled), in_pictures)
    add("text", use.n_text, kept[-1])
    add("all", use.n_token, use.n_cell)
    return table


def kept_bars(use: CacheUse, turns: Sequence[TurnUse]) -> Table:
    """A bar of the cells that are left of every picture, and of the text of every turn."""
    rows = [
        (f"{number} {Path(printable(picture.name)).name}", picture.n_cell, picture.kept)
        for number, picture in enumerate(use.pictures, start=1)
    ]
    rows += [(f"turn {turn.number}, text" if turn.number else "system", turn.n_cell, turn.kept) for turn in turns]
    table = column_table("", "kept", "cells", "")
    table.add_column("", width=_BAR_WIDTH)
    for name, n_cell, kept in rows:
        bar = ProgressBar(total=max(n_cell, 1), completed=kept, width=_BAR_WIDTH)
        table.add_row(escape(name), f"{kept:.1f}", str(n_cell), percent(kept, n_cell), bar)
    return table


def stats_rows(session: Session) -> list[tuple[str, str]]:
    """What a session has done."""
    counters, n_token = session.counters, session.n_token
    n_evaluated = counters.n_text_cell + counters.n_picture_cell
    n_prompt = n_evaluated - counters.n_generated
    n_from_memory = counters.n_picture - counters.n_encoded - counters.n_from_disk
    once = "each evaluated once" if n_evaluated == n_token else "some again, or taken back"
    return [
        ("cache", cache_line(session)),
        ("turns", str(counters.n_turn)),
        ("tokens evaluated", f"{n_evaluated} for a conversation of {n_token} cells: {once}"),
        ("started over", str(counters.n_restart)),
        ("pictures", f"{counters.n_encoded} encoded, {n_from_memory} from memory, {counters.n_from_disk} from disk"),
        ("cells evicted", f"{counters.n_evicted} per layer and KV head, in {counters.n_eviction} evictions"),
        ("pictures read again", f"{counters.n_reread}, {counters.n_reread_cell} cells in {counters.reread_s:.2f} s"),
        ("encoding", f"{counters.encode_s:.2f} s"),
        ("reading", f"{counters.prefill_s:.2f} s, {speed(n_prompt, counters.prefill_s)}"),
        ("evicting", f"{1000 * counters.evict_s:.1f} ms"),
        ("answering", f"{counters.decode_s:.2f} s, {speed(counters.n_generated, counters.decode_s)}"),
    ]


def use_dict(use: CacheUse) -> dict[str, Any]:
    """The use of the cache for JSON; kept cells are means over layers and KV heads."""
    in_pictures = sum(picture.kept for picture in use.pictures)
    return {
        "cells": use.n_token,
        "kept": use.n_cell,
        "bytes_per_cell": use.bytes_per_cell,
        "bytes": use.n_token * use.bytes_per_cell,
        "bytes_kept": use.n_cell * use.bytes_per_cell,
        "text": {"cells": use.n_text, "kept": use.text_kept},
        "image": {"cells": sum(picture.n_cell for picture in use.pictures), "kept": in_pictures},
        "pictures": [{"name": p.name, "cells": p.n_cell, "kept": p.kept} for p in use.pictures],
    }


def times_dict(counters: Counters) -> dict[str, Any]:
    """Times and speeds for JSON."""
    return {
        "encode_s": counters.encode_s,
        "prefill_s": counters.prefill_s,
        "evict_s": counters.evict_s,
        "decode_s": counters.decode_s,
        "reread_s": counters.reread_s,
        "n_generated": counters.n_generated,
        "tokens_per_s": counters.n_generated / counters.decode_s if counters.decode_s else None,
    }
