"""A token against the number of cells: unpruned in every setting, pruned, and a cache that was never larger."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from edge_csp.bench.alternate import Lane, Times, alternate, does_not_fit
from edge_csp.bench.models import BenchModel
from edge_csp.bench.process import RemoteCache, Workers
from edge_csp.bench.runtime import N_UBATCH, SETTINGS, Setting
from edge_csp.budget import Budget, kv_bytes_per_cell
from edge_csp.errors import BenchError, BudgetError

CANDIDATE = 1.15
"""Settings within 15 % of the best one of the first look take part in the comparison."""
N_STEP = 3


@dataclass(frozen=True)
class DecodePoint:
    """Milliseconds per token with n_cell cells evaluated before, and with n_keep of them left.

    looked_at: every unpruned setting, a first look. unpruned: the best of them, compared in turns with
    pruned: by our own eviction, in a cache of n_cell cells;
    bounded: the same in a cache with room for a batch beside the n_keep cells;
    small: a cache of n_keep cells, without csp, the potential.
    These three by setting: those of unpruned, and f16 without flash attention. left_out: why a setting has no times.
    """

    n_cell: int
    n_keep: int
    looked_at: dict[str, Times]
    unpruned: dict[str, Times]
    pruned: dict[str, Times]
    bounded: dict[str, Times]
    small: dict[str, Times]
    left_out: tuple[str, ...]

    @property
    def best_unpruned(self) -> str:
        return min(self.unpruned, key=lambda name: self.unpruned[name].median)

    @property
    def best_pruned(self) -> str:
        return min(self.pruned, key=lambda name: self.pruned[name].median)

    @property
    def gain(self) -> float:
        """How many times faster than the best unpruned setting."""
        return self.unpruned[self.best_unpruned].median / self.pruned[self.best_pruned].median

    @property
    def gain_bounded(self) -> float:
        """The same of a bounded cache, in the setting that is best for pruned."""
        return self.unpruned[self.best_unpruned].median / self.bounded[self.best_pruned].median

    @property
    def per_potential(self) -> float:
        """Pruned time in that of a cache that never had more cells, in the same setting."""
        return self.pruned[self.best_pruned].median / self.small[self.best_pruned].median

    @property
    def per_potential_bounded(self) -> float:
        """The same of a bounded cache."""
        return self.bounded[self.best_pruned].median / self.small[self.best_pruned].median


def measure_decode(
    model: BenchModel, workers: Workers, n_cell: int, budget: Budget, *, n_round: int, say: Callable[[str], None]
) -> DecodePoint | None:
    """None, and a word about it, if not even one setting fits into memory."""
    n_keep = budget.cells(n_cell, bytes_per_cell(model, Setting()))
    lanes, left_out = [], []
    for setting in SETTINGS:
        try:
            lane = _full(model, workers, setting, n_cell)
            if reason := does_not_fit(n_cell, lane.n_bytes // n_cell):
                raise BenchError(reason)
            looked = alternate([lane], n_round=1, n_step=2)
        except (BenchError, BudgetError) as error:
            left_out.append(f"{setting}: {error}")
            say(f"{model.name}, left out: {setting}: {error}")
            continue
        lanes.append((looked[lane.name].median, setting, lane, looked[lane.name]))
    if not lanes:
        return None
    lanes.sort(key=lambda found: found[0])
    candidates = [found for found in lanes if found[0] <= CANDIDATE * lanes[0][0]]
    settings = dict.fromkeys([*(setting for _, setting, _, _ in candidates), Setting()])
    pruned = {str(setting): _pruned(model, workers, setting, n_cell, n_keep) for setting in settings}
    n_bounded = min(n_keep + N_UBATCH, n_cell)
    bounded = {str(setting): _pruned(model, workers, setting, n_bounded, n_keep) for setting in settings}
    small = {str(setting): _small(model, workers, setting, n_keep) for setting in settings}
    full = {str(setting): lane for _, setting, lane, _ in candidates}
    times = alternate(
        [*full.values(), *pruned.values(), *bounded.values(), *small.values()], n_round=n_round, n_step=N_STEP
    )

    def of(group: dict[str, Lane]) -> dict[str, Times]:
        return {name: times[lane.name] for name, lane in group.items()}

    looked_at = {str(setting): first for _, setting, _, first in lanes}
    return DecodePoint(n_cell, n_keep, looked_at, of(full), of(pruned), of(bounded), of(small), tuple(left_out))


def bytes_per_cell(model: BenchModel, setting: Setting) -> int:
    """Bytes of K and V of all layers."""
    info = model.info
    return kv_bytes_per_cell(
        info.n_layer, info.n_head_kv, info.head_dim_k, info.head_dim_v, setting.type_k, setting.type_v
    )


def _full(model: BenchModel, workers: Workers, setting: Setting, n_cell: int) -> Lane:
    def open_cache() -> RemoteCache:
        return filled(RemoteCache(workers.plain, n_cell, setting), n_cell - 1)

    return Lane(f"unpruned {setting}", open_cache, n_cell * bytes_per_cell(model, setting))


def _pruned(model: BenchModel, workers: Workers, setting: Setting, n_cell: int, n_keep: int) -> Lane:
    def open_cache() -> RemoteCache:
        cache = filled(RemoteCache(workers.ours, n_cell, setting, records=True), n_cell)
        cache.evict(n_keep - 1)
        return cache

    return Lane(f"pruned {n_cell} {setting}", open_cache, n_cell * bytes_per_cell(model, setting))


def _small(model: BenchModel, workers: Workers, setting: Setting, n_keep: int) -> Lane:
    def open_cache() -> RemoteCache:
        return filled(RemoteCache(workers.plain, n_keep, setting), n_keep - 1)

    return Lane(f"small {setting}", open_cache, n_keep * bytes_per_cell(model, setting))


def filled(cache: RemoteCache, n_cell: int) -> RemoteCache:
    """The same cache with n_cell random cells; closed if that fails."""
    try:
        cache.fill(n_cell)
    except BaseException:
        cache.close()
        raise
    return cache
