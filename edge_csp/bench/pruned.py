"""A context of ours to be measured: it records its window and evicts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from edge_csp.bench.runtime import N_UBATCH, Cache, Model, Setting
from edge_csp.context import Context
from edge_csp.model import VisionModel
from edge_csp.pruning import Pruner, Pruning

Result = TypeVar("Result")


class PrunedCache(Cache):
    """The context of a session, with the defaults of pruning: csp, a window of 32 queries."""

    n_decode = Pruning().n_obs

    def __init__(
        self,
        vision: VisionModel,
        model: Model,
        n_ctx: int,
        setting: Setting,
        *,
        n_ubatch: int = N_UBATCH,
        cells: int | None = None,
    ) -> None:
        """cells: bound of make_room(). Raises NativeError if the cache cannot be pruned."""
        self._vision = vision
        super().__init__(model, n_ctx, setting, n_ubatch=n_ubatch)
        self._pruner = Pruner(self._context, Pruning(cells=cells))
        self.n_batch = self._pruner.n_batch

    def _open(self, model: Model, n_ctx: int, setting: Setting, n_ubatch: int) -> Any:
        self._context = Context(
            self._vision,
            n_ctx=n_ctx,
            n_batch=n_ubatch,
            type_k=setting.type_k,
            type_v=setting.type_v,
            flash_attn="on" if setting.flash_attn else "off",
            n_window=Pruning().n_obs,
        )
        return self._context.handle

    def make_room(self, n_token: int) -> float:
        """Evict so that n_token cells can be filled within the bound; milliseconds."""
        begin = self._clock()
        self._pruner.make_room(n_token)
        return 1000 * (self._clock() - begin)

    def evict(self, n_keep: int) -> dict[str, float]:
        """Keep n_keep cells, as Pruner does; milliseconds of scores, select and keep."""
        pruning, context, ms = self._pruner.pruning, self._context, {}

        def timed(name: str, function: Callable[[], Result]) -> Result:
            begin = self._clock()
            result = function()
            ms[name] = 1000 * (self._clock() - begin)
            return result

        def observe() -> None:
            for layers in context.layer_groups():
                context.observe(layers, needs=pruning.policy.needs, n_obs=pruning.n_obs, softmax_n=pruning.softmax_n)

        timed("scores", observe)
        cells = timed("select", lambda: self._pruner.select(n_keep))
        ms["select"] -= ms["scores"]  # it observes too
        timed("keep", lambda: context.keep(cells))
        return ms

    def close(self) -> None:
        """Free the context. A second call does nothing."""
        self._context.close()
        self.ctx = None
