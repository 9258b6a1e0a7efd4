"""A long prompt in a bounded cache, evictions included, and in one that holds all of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from edge_csp.bench.alternate import Times, does_not_fit
from edge_csp.bench.decode import bytes_per_cell, filled
from edge_csp.bench.models import BenchModel
from edge_csp.bench.process import RemoteCache, Workers
from edge_csp.bench.runtime import N_UBATCH, SETTINGS, Setting
from edge_csp.errors import BenchError, BudgetError

SAY_EVERY = 2048
"""Tokens after which a word is said: a long prompt takes long."""


@dataclass(frozen=True)
class Prefill:
    """A prompt of n_token tokens in `cells` cells and in as many as it needs.

    looked_at: a batch in the middle of the prompt, per unpruned setting; setting: the best of them. unbounded, bounded:
    milliseconds of the whole prompt, evictions included. evicting: the part of `bounded` that evicts. The batches are
    those of the last repetition: milliseconds per N_UBATCH tokens, evictions included.
    """

    n_token: int
    cells: int
    setting: str
    looked_at: dict[str, Times]
    unbounded: Times
    bounded: Times
    evicting: Times
    unbounded_batches: tuple[float, ...]
    bounded_batches: tuple[float, ...]

    @property
    def gain(self) -> float:
        """How many times faster the bounded cache is."""
        return self.unbounded.median / self.bounded.median


def measure_prefill(
    model: BenchModel, workers: Workers, n_token: int, cells: int, *, n_repeat: int, say: Callable[[str], None]
) -> Prefill | None:
    """The two alternate batch by batch. None, and a word about it, if the whole prompt does not fit into memory."""
    looked_at: dict[Setting, Times] = {}
    for setting in SETTINGS:
        try:
            if reason := does_not_fit(n_token, bytes_per_cell(model, setting)):
                raise BenchError(reason)
            cache = RemoteCache(workers.plain, n_token, setting)
            try:
                n_batch = min(N_UBATCH, n_token // 2)
                looked_at[setting] = Times((filled(cache, n_token // 2).decode(n_batch),))
            finally:
                cache.close()
        except (BenchError, BudgetError) as error:
            say(f"{model.name}, left out: {setting}: {error}")
    if not looked_at:
        return None
    best = min(looked_at, key=lambda setting: looked_at[setting].median)
    totals: list[tuple[float, float, float]] = []
    for _ in range(n_repeat):
        unbounded, bounded, evicting = _run(workers, best, n_token, cells, say)
        totals.append((sum(unbounded), sum(bounded), evicting))
    whole, held, evicted = (Times(tuple(column)) for column in zip(*totals, strict=True))
    looked = {str(setting): times for setting, times in looked_at.items()}
    return Prefill(n_token, cells, str(best), looked, whole, held, evicted, tuple(unbounded), tuple(bounded))


def _run(
    workers: Workers, setting: Setting, n_token: int, cells: int, say: Callable[[str], None]
) -> tuple[list[float], list[float], float]:
    """Milliseconds per batch unbounded and bounded, and of all evictions."""
    large = RemoteCache(workers.plain, n_token, setting)
    small = RemoteCache(workers.ours, cells, Setting(), records=True, cells=cells)
    unbounded, bounded, evicting = [], [], 0.0
    try:
        for begin in range(0, n_token, N_UBATCH):
            n = min(N_UBATCH, n_token - begin)
            unbounded.append(large.decode(n))
            ms, evict_ms = fill_bounded(small, n)
            bounded.append(ms + evict_ms)
            evicting += evict_ms
            if (begin + n) % SAY_EVERY == 0:
                say(f"{begin + n} of {n_token} tokens read; ms of the last {n}: {unbounded[-1]:.0f}, {bounded[-1]:.0f}")
    finally:
        large.close()
        small.close()
    return unbounded, bounded, evicting


def fill_bounded(cache: RemoteCache, n_token: int) -> tuple[float, float]:
    """Evaluate tokens in a bounded cache, in batches of its size; milliseconds of evaluation and of eviction."""
    ms = evict_ms = 0.0
    n_batch = cache.n_batch
    for begin in range(0, n_token, n_batch):
        n = min(n_batch, n_token - begin)
        evict_ms += cache.make_room(n)
        ms += cache.decode(n)
    return ms, evict_ms
