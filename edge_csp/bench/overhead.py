"""What recording the window costs while nothing is evicted: steps in turns with the library that has no window."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from edge_csp.bench.alternate import Ratio, paired_ratio
from edge_csp.bench.decode import filled
from edge_csp.bench.models import BenchModel
from edge_csp.bench.process import RemoteCache, Workers
from edge_csp.bench.runtime import Setting

BLOCK_MS = 4000
"""Time that a block of pairs may take per variant."""
N_BATCH = 128
"""Tokens of a batch: few, so that there are many pairs; more would make recording, of the last 32, look cheaper."""


@dataclass(frozen=True)
class Overhead:
    """Times in those of the baseline, for a token with n_cell cells and for a batch at the beginning.

    baseline: "unpatched library", or "ours without csp" where there is none. recording: ours with the window recorded;
    detached: ours without csp, None if that is the baseline.
    """

    n_cell: int
    n_batch: int
    baseline: str
    decode_recording: Ratio
    prefill_recording: Ratio
    decode_detached: Ratio | None
    prefill_detached: Ratio | None


def measure_overhead(model: BenchModel, workers: Workers, n_cell: int, *, n_block: int) -> Overhead:
    """Every block makes its contexts anew; within it, the variants alternate token by token, batch by batch."""
    has_upstream = workers.plain is not workers.ours
    decode: list[list[tuple[float, ...]]] = []
    prefill: list[list[tuple[float, ...]]] = []
    n_batch = min(N_BATCH, n_cell)
    for _ in range(n_block):
        caches = [
            RemoteCache(workers.plain, n_cell, Setting()),
            RemoteCache(workers.ours, n_cell, Setting(), records=True),
        ]
        if has_upstream:
            caches.append(RemoteCache(workers.ours, n_cell, Setting()))
        try:
            for cache in caches:
                filled(cache, n_cell - 1)
            decode.append(_in_turns(caches, RemoteCache.step))
            prefill.append(_in_turns(caches, lambda cache: _first_batch(cache, n_batch)))
        finally:
            for cache in caches:
                cache.close()

    def ratio(blocks: list[list[tuple[float, ...]]], i: int) -> Ratio:
        return paired_ratio([[(times[0], times[i]) for times in block] for block in blocks])

    return Overhead(
        n_cell,
        n_batch,
        "unpatched library" if has_upstream else "ours without csp",
        ratio(decode, 1),
        ratio(prefill, 1),
        ratio(decode, 2) if has_upstream else None,
        ratio(prefill, 2) if has_upstream else None,
    )


def _first_batch(cache: RemoteCache, n_batch: int) -> float:
    cache.clear()
    return cache.decode(n_batch)


def _in_turns(caches: list[RemoteCache], time: Callable[[RemoteCache], float]) -> list[tuple[float, ...]]:
    """Times of all caches, again and again, beginning with another one each time."""
    expected = max(time(cache) for cache in caches)
    found = []
    for i in range(max(3, min(300, int(BLOCK_MS / expected)))):
        order = [(i + j) % len(caches) for j in range(len(caches))]
        ms = {j: time(caches[j]) for j in order}
        found.append(tuple(ms[j] for j in range(len(caches))))
    return found
