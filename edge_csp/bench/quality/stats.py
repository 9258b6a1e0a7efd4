"""Means of records, and intervals of paired differences: questions are drawn again, whole albums at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

N_RESAMPLE = 2000
Row = dict[str, Any]
"""A record."""


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences, and its 95 % interval."""

    mean: float
    low: float
    high: float


def difference(values: Sequence[float], clusters: Sequence[Hashable], *, n_resample: int = N_RESAMPLE) -> Difference:
    """Mean of the values with its interval by bootstrap: whole clusters are drawn with replacement, as many as there
    are; percentiles 2.5 and 97.5 of the means of all values that were drawn. The same values give the same interval.
    A single cluster tells nothing about others: its interval has no bounds.
    """
    names = {cluster: i for i, cluster in enumerate(dict.fromkeys(clusters))}
    if len(names) == 1:
        return Difference(float(np.mean(values)), -math.inf, math.inf)
    of = np.array([names[cluster] for cluster in clusters])
    sums = np.bincount(of, np.asarray(values, np.float64))
    counts = np.bincount(of).astype(np.float64)
    times = np.random.default_rng(0).multinomial(len(names), np.full(len(names), 1 / len(names)), n_resample)
    means = (times @ sums) / (times @ counts)
    low, high = np.quantile(means, (0.025, 0.975))
    return Difference(float(np.mean(values)), float(low), float(high))


@dataclass(frozen=True)
class Summary:
    """Of all answers of a policy at a budget in a protocol. Shares 0 .. 1; cells are means.
    is_over: with more cells than the budget, somewhere.

    full: accuracy of the full cache on the same questions. same: exact agreement with it. to_full: accuracy minus that
    of the full cache; to_reference: minus that of the reference policy, None without the same questions. evict_ms:
    median, the first time loads what is compiled. extra_token, extra_s: per picture, of what was run besides.
    """

    protocol: str
    budget: str
    policy: str
    n: int
    n_album: int
    accuracy: float
    full: float
    same: float
    kl: float
    share: float
    is_over: bool
    kept_text: float
    kept_picture: float
    evict_ms: float
    extra_token: float
    extra_s: float
    to_full: Difference
    to_reference: Difference | None = None


def protocol_of(record: Row) -> str:
    """As it is reported: the question that chose the cells stands apart from the later ones."""
    return "later, first" if record["protocol"] == "later" and record["turn"] == 0 else str(record["protocol"])


def album_of(record: Row) -> tuple[str, int, int, int]:
    """Questions of an album are drawn together, those of all models on it too."""
    return record["topic"], record["length"], record["n_picture"], record["album"]


def _question_of(record: Row) -> Hashable:
    return *album_of(record), *(record[name] for name in ("model", "protocol", "budget", "question"))


def summarise(records: Iterable[Row], reference: str | None = None) -> list[Summary]:
    """Summaries of (protocol, policy, budget), in the order in which these came first; `continue` has none."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    right: dict[Hashable, bool] = {}
    for record in records:
        if record["protocol"] == "continue":
            continue
        found.setdefault((protocol_of(record), record["policy"], record["budget"]), []).append(record)
        if record["policy"] == reference:
            right[_question_of(record)] = record["right"]
    return [_summary(key, rows, right) for key, rows in found.items()]


def _summary(key: tuple[str, str, str], rows: list[Row], reference: Mapping[Hashable, bool]) -> Summary:
    def mean(name: str) -> float:
        return float(np.mean([row[name] for row in rows]))

    def median(name: str) -> float:
        return float(np.median([row[name] for row in rows]))

    n_picture = max(1, sum(row.get("extra_picture") or row["n_picture"] for row in rows if row["extra_s"]))
    paired = [row for row in rows if _question_of(row) in reference]
    return Summary(
        protocol=key[0],
        policy=key[1],
        budget=key[2],
        n=len(rows),
        n_album=len({album_of(row) for row in rows}),
        accuracy=mean("right"),
        full=mean("full_right"),
        same=mean("same"),
        kl=mean("kl"),
        share=float(np.mean([row["n_cell"] / row["n_token"] for row in rows])),
        is_over=any(row["n_cell"] > row["n_budget"] for row in rows),
        kept_text=mean("kept_text"),
        kept_picture=mean("kept_picture"),
        evict_ms=1000 * median("evict_s"),
        extra_token=sum(row["extra_token"] for row in rows) / n_picture,
        extra_s=sum(row["extra_s"] for row in rows) / n_picture,
        to_full=_paired(rows, lambda row: float(row["right"]) - float(row["full_right"])),
        to_reference=_paired(paired, lambda row: float(row["right"]) - float(reference[_question_of(row)]))
        if paired
        else None,
    )


def _paired(rows: Sequence[Row], value: Callable[[Row], float]) -> Difference:
    return difference([value(row) for row in rows], [album_of(row) for row in rows])


@dataclass(frozen=True)
class Continuation:
    """Of all passages that a policy has pruned to a budget. kl: from the full cache, mean in nats. agreement: share of
    tokens. perplexity, full_perplexity: of the true tokens. to_reference: kl minus that of the reference policy on the
    same passages, None without. The rest: see Summary.
    """

    policy: str
    budget: str
    n: int
    kl: Difference
    agreement: Difference
    perplexity: float
    full_perplexity: float
    share: float
    is_over: bool
    to_reference: Difference | None = None


def continuations(records: Iterable[Row], reference: str | None = None) -> list[Continuation]:
    """Of (policy, budget) in `continue`, in the order in which these came first."""
    found: dict[tuple[str, str], list[Row]] = {}
    kl: dict[Hashable, float] = {}
    for record in records:
        if record["protocol"] == "continue":
            found.setdefault((record["policy"], record["budget"]), []).append(record)
            if record["policy"] == reference:
                kl[_question_of(record)] = record["kl"]
    return [_continuation(key, rows, kl) for key, rows in found.items()]


def _continuation(key: tuple[str, str], rows: list[Row], reference: Mapping[Hashable, float]) -> Continuation:
    paired = [row for row in rows if _question_of(row) in reference]
    return Continuation(
        policy=key[0],
        budget=key[1],
        n=len(rows),
        kl=_paired(rows, lambda row: float(row["kl"])),
        agreement=_paired(rows, lambda row: float(row["agreement"])),
        perplexity=math.exp(np.mean([row["nll"] for row in rows])),
        full_perplexity=math.exp(np.mean([row["full_nll"] for row in rows])),
        share=float(np.mean([row["n_cell"] / row["n_token"] for row in rows])),
        is_over=any(row["n_cell"] > row["n_budget"] for row in rows),
        to_reference=_paired(paired, lambda row: float(row["kl"]) - reference[_question_of(row)]) if paired else None,
    )
