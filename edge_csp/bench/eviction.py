"""What an eviction costs, in tokens that could have been decoded instead."""

from __future__ import annotations

from dataclasses import dataclass

from edge_csp.bench.alternate import Times
from edge_csp.bench.decode import filled
from edge_csp.bench.process import RemoteCache, Workers
from edge_csp.bench.runtime import Setting
from edge_csp.budget import Budget


@dataclass(frozen=True)
class Eviction:
    """Milliseconds with n_cell cells: of a token, and of evicting down to n_keep cells, by its steps."""

    n_cell: int
    n_keep: int
    decode: Times
    scores: Times
    select: Times
    keep: Times

    @property
    def decode_steps(self) -> float:
        """The whole eviction in decode steps."""
        return (self.scores.median + self.select.median + self.keep.median) / self.decode.median


def measure_eviction(workers: Workers, n_cell: int, budget: Budget, *, cell_bytes: int, n_repeat: int) -> Eviction:
    """The first eviction is not counted: it loads the compiled selection."""
    n_keep = budget.cells(n_cell, cell_bytes)
    decode: list[float] = []
    steps: list[dict[str, float]] = []
    cache = RemoteCache(workers.ours, n_cell, Setting(), records=True)
    try:
        for i in range(n_repeat + 1):
            filled(cache, n_cell - 1)
            steps_ms = [cache.step() for _ in range(3)]
            cache.decode(1)
            evicted = cache.evict(n_keep)
            if i:
                decode += steps_ms
                steps.append(evicted)
    finally:
        cache.close()
    scores, select, keep = (Times(tuple(step[name] for step in steps)) for name in ("scores", "select", "keep"))
    return Eviction(n_cell, n_keep, Times(tuple(decode)), scores, select, keep)
