"""A context of ours to be measured: it records its window and evicts."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np

from edge_csp import native
from edge_csp.bench.quality.specs import parse_spec
from edge_csp.bench.runtime import N_UBATCH, Cache, Model, Setting
from edge_csp.context import Context
from edge_csp.model import VisionModel
from edge_csp.policy import Observation, Span
from edge_csp.pruning import Layout, Pruner, Pruning

PICTURE = Span(576, is_picture=True, columns=24)
TEXT = Span(32)


def conversation(n_cell: int) -> list[Span]:
    """Text, then pictures with text behind each, as many as fit; the first text has what is left over."""
    n_picture = max(0, n_cell - TEXT.n_cell) // (PICTURE.n_cell + TEXT.n_cell)
    first = Span(n_cell - n_picture * (PICTURE.n_cell + TEXT.n_cell))
    return [first, *[PICTURE, TEXT] * n_picture]


class _Observed(Context):
    """Counts the time of observing."""

    clock = staticmethod(time.perf_counter)
    observe_s = 0.0

    def observe(self, *args: Any, **settings: Any) -> Observation:
        begin = self.clock()
        observation = super().observe(*args, **settings)
        self.observe_s += self.clock() - begin
        return observation


class PrunedCache(Cache):
    """The context of a session, with the defaults of pruning: csp, a window of 32 queries. What fill() fills is a
    conversation with pictures, see conversation(); what is evaluated later is text.
    """

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
        self._spans = conversation(0)
        super().__init__(model, n_ctx, setting, n_ubatch=n_ubatch)
        self._context.clock = self._clock
        self._pruner = Pruner(self._context, Pruning(cells=cells), self._layout)
        self._pruners: dict[str, Pruner] = {}  # of policies: they find out once what they want to know of the model
        self.n_batch = self._pruner.n_batch(n_ctx + 1 if cells else 0)

    def _open(self, model: Model, n_ctx: int, setting: Setting, n_ubatch: int) -> Any:
        self._context = _Observed(
            self._vision,
            n_ctx=n_ctx,
            n_batch=n_ubatch,
            type_k=setting.type_k,
            type_v=setting.type_v,
            flash_attn="on" if setting.flash_attn else "off",
            n_window=Pruning().n_obs,
        )
        return self._context.handle

    def _layout(self) -> Layout:
        *spans, last = self._spans
        return Layout(
            [*spans, replace(last, n_cell=last.n_cell + self.n_past - sum(span.n_cell for span in self._spans))]
        )

    def clear(self) -> None:
        """Forget everything."""
        super().clear()
        self._spans = conversation(0)
        for pruner in (self._pruner, *self._pruners.values()):
            pruner.forget()

    def _set_state(self, state: Any, n_cell: int) -> None:
        super()._set_state(state, n_cell)
        self._spans = conversation(n_cell)
        tags = [native.IMAGE if span.is_picture else native.TEXT for span in self._spans]
        csp = self._context.csp
        assert csp
        known = csp.state()  # of a cache that was never pruned: it ends with the tags of the cells
        csp.set_state(
            known[:-n_cell] + np.repeat(tags, [span.n_cell for span in self._spans]).astype(np.uint8).tobytes()
        )

    def make_room(self, n_token: int) -> float:
        """Evict so that n_token cells can be filled within the bound; milliseconds."""
        begin = self._clock()
        self._pruner.make_room(n_token)
        return 1000 * (self._clock() - begin)

    def evict(self, n_keep: int, policy: str) -> dict[str, float]:
        """Keep n_keep cells, as Pruner does with a policy, see parse_spec(); milliseconds of scores, select and keep.
        What policies want to be noted while a conversation is read is what the window tells.
        """
        if policy not in self._pruners:
            self._pruners[policy] = self._pruner.replaced(parse_spec(policy).pruning())
            self._pruners[policy].select(n_keep)
        pruner = self._pruners[policy]
        pruner.note_mass()
        self._context.observe_s = 0.0
        begin = self._clock()
        cells = pruner.select(n_keep)
        middle, scores_s = self._clock(), self._context.observe_s
        pruner.evict(cells)
        end = self._clock()
        return {
            "scores": 1000 * scores_s,
            "select": 1000 * (middle - begin - scores_s),
            "keep": 1000 * (end - middle),
        }

    def close(self) -> None:
        """Free the context. A second call does nothing."""
        self._context.close()
        self.ctx = None
