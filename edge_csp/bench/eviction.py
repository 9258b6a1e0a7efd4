"""What an eviction costs, in tokens that could have been decoded instead, with one policy and with others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edge_csp.bench.alternate import Ratio, Times, paired_ratio
from edge_csp.bench.decode import filled
from edge_csp.bench.process import RemoteCache, Workers
from edge_csp.bench.runtime import Setting
from edge_csp.budget import Budget

POLICIES = ("blend", "csp")
BASELINE = "csp"
STEPS = ("scores", "select", "keep")


@dataclass(frozen=True)
class Steps:
    """Milliseconds of an eviction by its steps. to_csp: the whole of it, against csp in the same rounds; None for csp,
    and where csp was not measured.
    """

    scores: Times
    select: Times
    keep: Times
    to_csp: Ratio | None = None

    @property
    def total(self) -> Times:
        return Times(tuple(map(sum, zip(self.scores.ms, self.select.ms, self.keep.ms, strict=True))))


@dataclass(frozen=True)
class Eviction:
    """Milliseconds with n_cell cells: of a token, and of evicting down to n_keep cells, by policy."""

    n_cell: int
    n_keep: int
    decode: Times
    policies: dict[str, Steps]

    @property
    def decode_steps(self) -> dict[str, float]:
        """The whole eviction in decode steps, by policy."""
        return {name: steps.total.median / self.decode.median for name, steps in self.policies.items()}


def measure_eviction(
    workers: Workers, n_cell: int, budget: Budget, *, cell_bytes: int, n_repeat: int, policies: Sequence[str] = POLICIES
) -> Eviction:
    """policies: as parse_spec() reads them. They take turns, every second round backwards. The first round is not
    counted: it loads what is compiled.
    """
    n_keep = budget.cells(n_cell, cell_bytes)
    decode: list[float] = []
    rounds: list[dict[str, dict[str, float]]] = []
    cache = RemoteCache(workers.ours, n_cell, Setting(), records=True)
    try:
        for i_round in range(n_repeat + 1):
            evicted = {}
            for policy in policies[:: -1 if i_round % 2 else 1]:
                filled(cache, n_cell - 1)
                steps_ms = [cache.step() for _ in range(3)]
                cache.decode(1)
                evicted[policy] = cache.evict(n_keep, policy)
                if i_round:
                    decode += steps_ms
            if i_round:
                rounds.append(evicted)
    finally:
        cache.close()
    return Eviction(n_cell, n_keep, Times(tuple(decode)), {policy: _steps(rounds, policy) for policy in policies})


def _steps(rounds: Sequence[dict[str, dict[str, float]]], policy: str) -> Steps:
    scores, select, keep = (Times(tuple(found[policy][name] for found in rounds)) for name in STEPS)
    if policy == BASELINE or BASELINE not in rounds[0]:
        return Steps(scores, select, keep)
    pairs = [(sum(found[BASELINE].values()), sum(found[policy].values())) for found in rounds]
    return Steps(scores, select, keep, paired_ratio([pairs]))
