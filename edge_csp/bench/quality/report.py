"""What the records say: a table for a terminal, Markdown with everything, plots."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from edge_csp.bench.quality.protocols import PROTOCOLS
from edge_csp.bench.quality.run import Settings
from edge_csp.bench.quality.stats import Difference, Row, Summary, album_of, summarise
from edge_csp.bench.report import machine
from edge_csp.errors import BenchError

REPORTED = tuple(one for name in PROTOCOLS for one in ((name, "later, first") if name == "later" else (name,)))
WORDS = {
    "window": "Question in the window, all of the answer from what is left",
    "first": "Question in the window, first token of the answer from the full prefill (what the runtime does)",
    "before": "Pruned before the question",
    "later": "Later questions in a chat that was pruned on the first one",
    "later, first": "That first question itself",
    "bounded": "A long conversation in a bounded cache",
}
AHEAD = "▲"
"""Marks a policy that is ahead of the reference by more than the interval."""
BEHIND = "▼"
"""Marks the reference where some policy is."""
OVER = "†"
"""Marks what has more cells than the budget, because text alone takes more; it is not compared."""


class Summaries:
    """Summaries by protocol, policy and budget."""

    def __init__(self, settings: Settings, records: Sequence[Row], against: str | None) -> None:
        self.settings, self.records, self.against = settings, records, against
        self.found = {(one.protocol, one.policy, one.budget): one for one in summarise(records, against)}
        self.protocols = [name for name in REPORTED if any(key[0] == name for key in self.found)]

    def row(self, protocol: str, policy: str) -> list[Summary | None]:
        """One for each budget."""
        return [self.found.get((protocol, policy, budget)) for budget in self.settings.budgets]

    def policies(self, protocol: str) -> list[str]:
        return [policy for policy in self.settings.policies if any(self.row(protocol, policy))]

    def ahead(self) -> list[Summary]:
        """Where a policy is ahead of the reference by more than the interval."""
        order = [self.found[key] for name in self.protocols for key in self.found if key[0] == name]
        return [one for one in order if is_ahead(one)]


def is_ahead(summary: Summary) -> bool:
    """Of the reference, with no more cells than the budget."""
    return not summary.is_over and summary.to_reference is not None and summary.to_reference.low > 0


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def interval(difference: Difference) -> str:
    """Percentage points."""
    if math.isinf(difference.low):
        return "no interval"
    return f"{100 * difference.low:+.1f} … {100 * difference.high:+.1f}".replace("-", "−")


def table(found: Summaries) -> Table:
    """Accuracy in percent, and the difference to the full cache in percentage points."""
    out = Table(box=None, padding=(0, 2, 0, 0))
    out.add_column("", no_wrap=True)
    for budget in found.settings.budgets:
        out.add_column(budget, justify="right", no_wrap=True)
    for protocol in found.protocols:
        out.add_row(f"[bold]{protocol}[/bold] (full {percent(full_accuracy(found, protocol))})")
        for policy in found.policies(protocol):
            out.add_row(f"  {policy}", *(_short(one) for one in found.row(protocol, policy)))
    return out


def full_accuracy(found: Summaries, protocol: str) -> float:
    """Accuracy of the full cache, on the questions of the policy that answered most."""
    return max((one for key, one in found.found.items() if key[0] == protocol), key=lambda one: one.n).full


def _short(one: Summary | None) -> str:
    if one is None:
        return "-"
    return f"{percent(one.accuracy)} ({100 * one.to_full.mean:+.1f})".replace("-", "−") + _marks(one)


def _cell(found: Summaries, one: Summary | None) -> str:
    if one is None:
        return "-"
    of_full = percent(one.accuracy / one.full) if one.full else "-"
    first = f"**{of_full}** ({interval(one.to_full)}){_marks(one)}"
    if one.policy == found.against and any(
        (one.protocol, one.budget) == (other.protocol, other.budget) for other in found.ahead()
    ):
        first += f" {BEHIND}"
    return f"{first}<br>{percent(one.same)}; {one.kl:.3f}"


def _marks(one: Summary) -> str:
    if one.is_over and one.share < 1:
        return f" {OVER}"
    return f" {AHEAD}" if is_ahead(one) else ""


def command(found: Summaries) -> str:
    """That measures the same; models by their paths where these hold elsewhere, or by the names in records."""
    settings = found.settings
    words = ["edge-csp", "bench", "quality"]
    for model in settings.models:
        words += ["-m", model.name if model.path.is_absolute() else model.path.as_posix()]
    for policy in settings.policies:
        words += ["--policy", policy]
    words += ["--protocol", ",".join(settings.protocols), "--budget", ",".join(settings.budgets)]
    words += [*settings.source.options(), "-n", str(settings.n_predict)]
    return shlex.join(words + (["--against", found.against] if found.against else []))


def markdown(found: Summaries) -> str:
    """The whole report."""
    settings = found.settings
    against = (
        f" {AHEAD}: ahead of `{found.against}` by more than the interval of their difference on the same questions; "
        f"{BEHIND}: there `{found.against}` is behind."
        if found.against
        else ""
    )
    parts = [
        "# Quality\n",
        "<!-- Written by `edge-csp bench quality`; do not edit. -->\n",
        _about(found),
        "## Answers\n",
        "In every cell: right answers in percent of those of the full cache; in brackets the 95 % interval of the "
        "difference to it on the same questions, in percentage points. Below: answers that are exactly those of the "
        f"full cache, in percent; KL divergence in nats.{against} {OVER}: with more cells than the budget, because "
        "text alone takes more.\n",
    ]
    for protocol in found.protocols:
        rows = [
            [f"`{policy}`", *(_cell(found, one) for one in found.row(protocol, policy))]
            for policy in found.policies(protocol)
        ]
        n = max(one.n for key, one in found.found.items() if key[0] == protocol)
        parts.append(
            f"### {WORDS[protocol]}\n\n`{protocol}`: {n} answers each; the full cache is right in "
            f"{percent(full_accuracy(found, protocol))} %.\n"
        )
        parts.append(markdown_table(["policy", *settings.budgets], rows))
    if found.against:
        parts.append(_against(found))
    for name, words in (("model", "Model"), ("n_picture", "Pictures")):
        values = list(dict.fromkeys(record[name] for record in found.records))
        if len(values) > 1:
            parts += [_by(found, name, f"{words} {value}", value) for value in values]
    parts += [
        "## Cells\n",
        "Cells that stay of text + pictures, means over layers, KV heads and evictions; in brackets their share.\n",
    ]
    parts.append(_details(found, lambda one: f"{one.kept_text:.0f} + {one.kept_picture:.0f} ({percent(one.share)})"))
    parts += [
        "## Cost\n",
        "Seconds of choosing, merging and moving cells, per eviction (`bounded`: per turn), medians. Where something "
        "is run besides, its tokens and seconds per picture (`downsample`: reading the smaller pictures).\n",
    ]
    parts.append(_details(found, cost))
    return "\n".join(parts)


def cost(one: Summary) -> str:
    extra = f"; {one.extra_token:.1f} tokens, {one.extra_s:.3f} s" if one.extra_s else ""
    return f"{one.evict_ms / 1000:.4f}{extra}"


def _about(found: Summaries) -> str:
    settings = found.settings
    n_question = len(
        {(*album_of(record), record["question"], record["protocol"] == "bounded") for record in found.records}
    )
    albums = {(record["n_picture"], record["album"]) for record in found.records}
    pictures = ", ".join(str(n) for n in sorted({n for n, _ in albums}))
    return (
        f"    {command(found)}\n\n"
        f"{len(found.records)} answers; models: {', '.join(model.name for model in settings.models)}; "
        f"{n_question} questions about {len(albums)} albums of {pictures} pictures ({settings.source.origin}); "
        f"greedy, at most {settings.n_predict} tokens; {made_with()}. What protocols, "
        "policies and columns mean: [bench.md](bench.md#quality).\n"
    )


def made_with() -> str:
    versions = machine()
    return (
        f"edge-csp {versions['edge_csp']}, llama-cpp-python {versions['llama_cpp_python']}, numpy {versions['numpy']}, "
        f"{versions['system']}"
    )


def _against(found: Summaries) -> str:
    head = f"## Where `{found.against}` is behind\n\n"
    rows = [
        [one.protocol, one.budget, f"`{one.policy}`", interval(one.to_reference), f"{one.n}"]
        for one in found.ahead()
        if one.to_reference
    ]
    if not rows:
        return f"{head}Nowhere by more than the interval.\n"
    words = "The 95 % interval of the difference, in percentage points.\n\n"
    return head + words + markdown_table(["protocol", "budget", "policy", "ahead by", "answers"], rows)


def _details(found: Summaries, words: Any) -> str:
    rows = [
        [protocol, f"`{policy}`", *("-" if one is None else words(one) for one in found.row(protocol, policy))]
        for protocol in found.protocols
        for policy in found.policies(protocol)
    ]
    return markdown_table(["protocol", "policy", *found.settings.budgets], rows)


def _by(found: Summaries, name: str, title: str, value: Any) -> str:
    """Of the records with a value alone."""
    part = Summaries(found.settings, [row for row in found.records if row[name] == value], None)
    rows = [
        [
            f"`{policy}`",
            *(
                " / ".join("-" if one is None else percent(one.accuracy) for one in part.row(protocol, policy))
                for protocol in part.protocols
            ),
        ]
        for policy in found.settings.policies
    ]
    full = ["(full cache)", *(percent(full_accuracy(part, protocol)) for protocol in part.protocols)]
    words = f"## {title}\n\nRight answers in percent, at {' / '.join(found.settings.budgets)}.\n\n"
    return words + markdown_table(["policy", *part.protocols], [full, *rows])


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def write_plot(path: Path, found: Summaries) -> None:
    """Accuracy at every budget, a panel per protocol; what has more cells than the budget is left out.

    Raises BenchError if the file cannot be written.
    """
    from matplotlib.figure import Figure

    n = max(1, len(found.protocols))
    n_column = min(3, n)
    n_row = -(-n // n_column)
    figure = Figure(figsize=(5 * n_column, 3.5 * n_row + 0.5), layout="constrained")
    panels = list(figure.subplots(n_row, n_column, squeeze=False).flat)
    for axes, protocol in zip(panels, found.protocols, strict=False):
        _plot(axes, found, protocol)
    for axes in panels[len(found.protocols) :]:
        axes.set_visible(False)
    lines = {line.get_label(): line for axes in panels for line in axes.get_lines()}
    figure.legend(handles=list(lines.values()), loc="outside lower center", ncols=6)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise BenchError(f"{path} cannot be written ({getattr(error, 'strerror', None) or error})") from error


def _plot(axes: Any, found: Summaries, protocol: str) -> None:
    budgets = found.settings.budgets
    axes.axhline(100 * full_accuracy(found, protocol), linestyle="--", color="grey", label="full cache")
    for number, policy in enumerate(found.settings.policies):
        ones = [(at, one) for at, one in enumerate(found.row(protocol, policy)) if one and not one.is_over]
        if not ones:
            continue
        at, right = [at for at, _ in ones], [100 * one.accuracy for _, one in ones]
        axes.plot(at, right, "o-", color=f"C{number}", label=policy)
        bounds = [(100 * (one.full + one.to_full.low), 100 * (one.full + one.to_full.high)) for _, one in ones]
        if np.isfinite(bounds).all():
            axes.fill_between(at, *zip(*bounds, strict=True), color=f"C{number}", alpha=0.12)
    axes.set(title=protocol, ylabel="right answers, %", ylim=(0, 102), xticks=range(len(budgets)), xticklabels=budgets)
