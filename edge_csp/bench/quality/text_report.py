"""What the records of `--task text` say, model by model: a table for a terminal, and Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.table import Table

from edge_csp.bench.quality.report import (
    BEHIND,
    OVER,
    Summaries,
    command,
    full_accuracy,
    made_with,
    markdown_table,
    percent,
)
from edge_csp.bench.quality.run import Settings
from edge_csp.bench.quality.stats import (
    Continuation,
    Difference,
    Row,
    Summary,
    album_of,
    continuations,
)

WORDS = {
    "continue": "Text that goes on",
    "window": "Question in the window, all of the answer from what is left",
    "first": "Question in the window, first token of the answer from the full prefill",
    "before": "Pruned before the question",
    "later": "Later questions in a chat that was pruned on the first one",
    "later, first": "That first question itself",
    "bounded": "A chat in a bounded cache",
}
ALL = "all models"


@dataclass(frozen=True)
class Verdict:
    """The reference policy beside the best of the others. value, best: percent of full, or KL. ahead_by: of the best
    one, in the same unit and so that more is better.
    """

    model: str
    protocol: str
    budget: str
    value: float
    policy: str
    best: float
    ahead_by: Difference

    @property
    def is_behind(self) -> bool:
        """By more than the interval."""
        return self.ahead_by.low > 0


class TextSummaries:
    """Summaries of a model, or of all together. Of answers only those count that the full cache gets right."""

    def __init__(self, settings: Settings, records: Sequence[Row], against: str | None, model: str = ALL) -> None:
        self.settings, self.against, self.model = settings, against, model
        self.records = [row for row in records if model in (ALL, row["model"])]
        answers = [row for row in self.records if row["protocol"] != "continue"]
        self.every = Summaries(settings, answers, None)
        self.answers = Summaries(settings, [row for row in answers if row["full_right"]], against)
        self.continued = {(one.policy, one.budget): one for one in continuations(self.records, against)}

    def parts(self) -> list[TextSummaries]:
        """One for every model, and one for all if there are several."""
        names = [model.name for model in self.settings.models]
        parts = [TextSummaries(self.settings, self.records, self.against, name) for name in names]
        return [*parts, self] if len(names) > 1 else parts

    def verdicts(self) -> list[Verdict]:
        """For every protocol and budget; policies with more cells than the budget do not count."""
        budgets, answers = self.settings.budgets, self.answers.found
        found = [self._verdict("continue", budget, _at(self.continued, budget)) for budget in budgets]
        for protocol in self.answers.protocols:
            of_protocol = {key: one for key, one in answers.items() if key[0] == protocol}
            found += [self._verdict(protocol, budget, _at(of_protocol, budget)) for budget in budgets]
        return [one for one in found if one is not None]

    def _verdict(self, protocol: str, budget: str, ones: Sequence[Summary | Continuation]) -> Verdict | None:
        own = next((one for one in ones if one.policy == self.against), None)
        others = [one for one in ones if one is not own and not one.is_over and one.to_reference]
        if own is None or not others:
            return None
        sign = -1 if protocol == "continue" else 1
        best = max(others, key=lambda one: sign * _figure(one))
        assert best.to_reference
        ahead_by = _times(best.to_reference, -1 if protocol == "continue" else 100)
        return Verdict(self.model, protocol, budget, _figure(own), best.policy, _figure(best), ahead_by)


def _at(found: Mapping[Any, Summary] | Mapping[Any, Continuation], budget: str) -> list[Summary | Continuation]:
    return [one for one in found.values() if one.budget == budget]


def _figure(one: Summary | Continuation) -> float:
    """KL, or percent of full."""
    return one.kl.mean if isinstance(one, Continuation) else 100 * one.accuracy


def _times(difference: Difference, factor: float) -> Difference:
    ends = sorted((factor * difference.low, factor * difference.high))
    return Difference(factor * difference.mean, *ends)


def table(found: TextSummaries) -> Table:
    """KL of `continue`, and right answers in percent of those of the full cache, model by model."""
    out = Table(box=None, padding=(0, 2, 0, 0))
    out.add_column("", no_wrap=True)
    for budget in found.settings.budgets:
        out.add_column(budget, justify="right", no_wrap=True)
    for part in found.parts():
        out.add_row(f"[bold]{part.model}[/bold]")
        if part.continued:
            out.add_row("continue (KL)")
            for policy in found.settings.policies:
                out.add_row(f"  {policy}", *(_short_kl(one) for one in _continued(part, policy)))
        for protocol in part.answers.protocols:
            out.add_row(f"{protocol} ({_of_full(part, protocol)})")
            for policy in part.answers.policies(protocol):
                out.add_row(f"  {policy}", *(_short(one) for one in part.answers.row(protocol, policy)))
    return out


def _continued(found: TextSummaries, policy: str) -> list[Continuation | None]:
    return [found.continued.get((policy, budget)) for budget in found.settings.budgets]


def _short_kl(one: Continuation | None) -> str:
    return "-" if one is None else f"{one.kl.mean:.3f}{_over(one)}"


def _short(one: Summary | None) -> str:
    return "-" if one is None else f"{100 * one.accuracy:.0f}{_over(one)}"


def _over(one: Summary | Continuation) -> str:
    return f" {OVER}" if one.is_over and one.share < 1 else ""


def _of_full(found: TextSummaries, protocol: str) -> str:
    """How many questions there are, and how many count."""
    n = max(one.n for key, one in found.every.found.items() if key[0] == protocol)
    return f"full cache right in {percent(full_accuracy(found.every, protocol))} % of {n}"


def markdown(found: TextSummaries) -> str:
    """The whole report."""
    settings = found.settings
    lengths = ", ".join(map(str, sorted({row["length"] for row in found.records})))
    n_album = len({album_of(row) for row in found.records})
    out = [
        "# Quality on text\n",
        "<!-- Written by `edge-csp bench quality`; do not edit. -->\n",
        f"    {command(found.answers)}\n\n"
        f"{len(found.records)} records; models: {', '.join(model.name for model in settings.models)}; {n_album} texts "
        f"of about {lengths} tokens ({settings.source.origin}); greedy; {made_with()}. What is asked, and what the "
        "columns mean: [bench.md](bench.md#text).\n",
    ]
    if found.against:
        out += [f"## Where `{found.against}` stands\n", _standing(found)]
    for part in found.parts():
        out += [f"## {part.model[0].upper()}{part.model[1:]}\n" if part.model == ALL else f"## {part.model}\n"]
        if part.continued:
            out += [_continue_tables(part)]
        for protocol in part.answers.protocols:
            out += [_answer_table(part, protocol)]
    budgets = " / ".join(settings.budgets)
    out += [
        "## In detail\n",
        f"Of all models, at {budgets}: KL, or right answers in percent of the questions that count; in brackets how "
        "many these are.\n",
    ]
    out += [
        _by(found, name, words) for name, words in (("topic", "Topics"), ("length", "Tokens"), ("kind", "Questions"))
    ]
    out += [
        "## Cost\n",
        "Seconds of choosing and moving cells, per eviction (`bounded`: per turn), medians; with the tokens and "
        "seconds of what is run besides, means.\n",
        _cost_table(found),
    ]
    return "\n".join(out)


def _standing(found: TextSummaries) -> str:
    """The reference policy beside the best of the others."""
    verdicts = [one for part in found.parts() for one in part.verdicts()]
    rows = [
        [
            one.model,
            one.protocol,
            one.budget,
            _value(one, one.value),
            f"`{one.policy}` {_value(one, one.best)}",
            _interval(one.ahead_by, 3 if one.protocol == "continue" else 1),
            f"{BEHIND} behind" if one.is_behind else ("ahead" if one.ahead_by.high < 0 else "even"),
        ]
        for one in verdicts
    ]
    words = (
        "Beside the best of the others in each row (KL for `continue`, else percent of full). The 95 % interval is "
        "that of its lead on the same texts, in the same unit; the best of many is partly so by chance, "
        "which it does not know of. *behind*, *ahead*: by more than the interval.\n"
    )
    n_behind = sum(one.is_behind for one in verdicts)
    count = f"Behind in {n_behind} of {len(verdicts)} rows.\n"
    head = ["model", "protocol", "budget", f"`{found.against}`", "best other", "its lead", ""]
    return f"{words}\n{count}\n{markdown_table(head, rows)}"


def _value(verdict: Verdict, value: float) -> str:
    return f"{value:.3f}" if verdict.protocol == "continue" else f"{value:.1f}"


def _interval(difference: Difference, n_digit: int, factor: float = 1, offset: float = 0) -> str:
    if math.isinf(difference.low):
        return "no interval"
    low, high = (offset + factor * end for end in (difference.low, difference.high))
    return f"{low:.{n_digit}f} … {high:.{n_digit}f}".replace("-", "−")


def _continue_tables(found: TextSummaries) -> str:
    """KL with intervals, agreement and perplexity."""
    rows = [
        [f"`{policy}`", *(_kl_cell(one) for one in _continued(found, policy))] for policy in found.settings.policies
    ]
    n, full = max((one.n, one.full_perplexity) for one in found.continued.values())
    return (
        f"### {WORDS['continue']}\n\n`continue`: {n} texts. KL divergence from the full cache in nats, with its 95 % "
        "interval; below: tokens where the likeliest one is the same, in percent; perplexity (full cache: "
        f"{full:.2f}).\n\n{markdown_table(['policy', *found.settings.budgets], rows)}"
    )


def _kl_cell(one: Continuation | None) -> str:
    if one is None:
        return "-"
    return (
        f"**{one.kl.mean:.3f}** ({_interval(one.kl, 3)}){_over(one)}<br>{percent(one.agreement.mean)}; "
        f"{one.perplexity:.2f}"
    )


def _answer_table(found: TextSummaries, protocol: str) -> str:
    rows = [
        [f"`{policy}`", *(_answer_cell(one) for one in found.answers.row(protocol, policy))]
        for policy in found.answers.policies(protocol)
    ]
    return (
        f"### {WORDS[protocol]}\n\n`{protocol}`: {_of_full(found, protocol)} questions. Of these, right in percent, "
        f"with the 95 % interval; below: KL divergence.\n\n{markdown_table(['policy', *found.settings.budgets], rows)}"
    )


def _answer_cell(one: Summary | None) -> str:
    if one is None:
        return "-"
    return f"**{percent(one.accuracy)}** ({_interval(one.to_full, 1, 100, 100)}){_over(one)}<br>{one.kl:.3f}"


def _by(found: TextSummaries, name: str, words: str) -> str:
    """KL of passages and percent of full, of all models, a column for each value that records have under a name."""
    values = [one for one in dict.fromkeys(row[name] for row in found.records) if one != ""]
    parts = [TextSummaries(found.settings, [row for row in found.records if row[name] == one], None) for one in values]
    out = [f"### {words}\n"]
    if any(part.continued for part in parts):
        some = [(value, part) for value, part in zip(values, parts, strict=True) if part.continued]
        rows = [
            [f"`{policy}`", *(" / ".join(_short_kl(one) for one in _continued(part, policy)) for _, part in some)]
            for policy in found.settings.policies
        ]
        out.append(markdown_table(["continue (KL)", *(f"{value}" for value, _ in some)], rows))
    for protocol in found.answers.protocols:
        some = [(value, part) for value, part in zip(values, parts, strict=True) if protocol in part.answers.protocols]
        rows = [
            [
                f"`{policy}`",
                *(" / ".join(_short(one) for one in part.answers.row(protocol, policy)) for _, part in some),
            ]
            for policy in found.answers.policies(protocol)
        ]
        head = [f"{value} ({_n_counted(part, protocol)})" for value, part in some]
        out.append(markdown_table([protocol, *head], rows))
    return "\n".join(out)


def _n_counted(found: TextSummaries, protocol: str) -> int:
    """Questions that the full cache gets right."""
    return max(one.n for key, one in found.answers.found.items() if key[0] == protocol)


def _cost_table(found: TextSummaries) -> str:
    rows = []
    for policy in found.settings.policies:
        cells = []
        for budget in found.settings.budgets:
            some = [row for row in found.records if (row["policy"], row["budget"]) == (policy, budget)]
            cells.append(_cost(some) if some else "-")
        rows.append([f"`{policy}`", *cells])
    return markdown_table(["policy", *found.settings.budgets], rows)


def _cost(rows: Sequence[Row]) -> str:
    text = f"{np.median([row['evict_s'] for row in rows]):.4f}"
    if not any(row["extra_s"] for row in rows):
        return text
    n_token, seconds = (np.mean([row[name] for row in rows]) for name in ("extra_token", "extra_s"))
    return f"{text}; {n_token:.0f} tokens, {seconds:.3f} s"
