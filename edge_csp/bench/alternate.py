"""Variants measured in turns, so that whatever else the machine does meets all of them; and what the times say."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from edge_csp.bench.process import RemoteCache


@dataclass(frozen=True)
class Times:
    """Milliseconds of the same thing, measured again and again."""

    ms: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.ms)

    @property
    def spread(self) -> tuple[float, float]:
        """The shortest and the longest."""
        return min(self.ms), max(self.ms)


@dataclass(frozen=True)
class Lane:
    """A variant. open: makes its context, ready for a step. n_bytes: of its cells."""

    name: str
    open: Callable[[], RemoteCache]
    n_bytes: int


def alternate(lanes: Sequence[Lane], *, n_round: int, n_step: int) -> dict[str, Times]:
    """Times of n_step single tokens per lane and round. Every second round goes through the lanes backwards.

    The contexts stay open if all of them fit into half of the free memory; else each is made anew in every round. The
    first step after a change of lanes is not counted: it finds the processor's caches full of another lane's data.
    """
    is_kept = sum(lane.n_bytes for lane in lanes) <= free_memory() // 2
    ms: dict[str, list[float]] = {lane.name: [] for lane in lanes}
    caches: dict[str, RemoteCache] = {}
    try:
        for i_round in range(n_round):
            for lane in lanes[:: -1 if i_round % 2 else 1]:
                if lane.name not in caches:
                    caches[lane.name] = lane.open()
                caches[lane.name].step()
                ms[lane.name] += [caches[lane.name].step() for _ in range(n_step)]
                if not is_kept:
                    caches.pop(lane.name).close()
    finally:
        for cache in caches.values():
            cache.close()
    return {name: Times(tuple(times)) for name, times in ms.items()}


@dataclass(frozen=True)
class Ratio:
    """Median of paired ratios. low, high: bounds of its 95 % confidence interval, by bootstrap over blocks of pairs."""

    median: float
    low: float
    high: float
    n_pair: int


def paired_ratio(blocks: Sequence[Sequence[tuple[float, float]]], *, n_resample: int = 2000) -> Ratio:
    """Ratio second / first of pairs that were measured one right after the other.

    Pairs of a block share their contexts, and with them where these lie in memory: whole blocks are drawn, then pairs.
    """
    ratios = [np.array([second / first for first, second in block]) for block in blocks]
    random = np.random.default_rng(0)
    medians = []
    for _ in range(n_resample):
        drawn = [ratios[i] for i in random.integers(0, len(ratios), len(ratios))]
        medians.append(np.median(np.concatenate([random.choice(block, len(block)) for block in drawn])))
    low, high = (float(x) for x in np.quantile(medians, (0.025, 0.975)))
    return Ratio(float(np.median(np.concatenate(ratios))), low, high, sum(map(len, ratios)))


def does_not_fit(n_cell: int, cell_bytes: int) -> str | None:
    """In words that so many cells do not fit into the free memory, None if they do."""
    n_bytes, n_free = n_cell * cell_bytes, free_memory()
    if n_bytes <= 0.9 * n_free:
        return None
    return f"{n_cell} cells x {cell_bytes} bytes = {n_bytes / 2**30:.1f} GiB, free are {n_free / 2**30:.1f} GiB"


def free_memory() -> int:
    """Bytes that new processes can have, without swapping."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return 1024 * int(fields["MemAvailable"].split()[0])
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 if hasattr(os, "sysconf") else 4 << 30
