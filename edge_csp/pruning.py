"""When to evict and how far: after a prompt down to the budget, and before new cells would overflow a bounded cache.

The policy chooses which cells stay; `Pruner` knows the numbers. It sees one context, and no messages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from edge_csp.budget import Budget, protected_cells
from edge_csp.context import Context
from edge_csp.errors import BudgetError, PolicyError
from edge_csp.policy import CspPolicy, Policy
from edge_csp.policy.base import IntArray

Span = tuple[int, int]
"""Positions [begin, end) of the conversation."""


@dataclass(frozen=True)
class Layout:
    """What is where in a conversation. Positions.

    pinned: what stays. bounds: where a picture, or the text behind it, begins; ascending.
    """

    pinned: Sequence[Span] = ()
    bounds: Sequence[int] = ()


MIN_GAIN = 16
"""A share is not enforced for less than 1/16 of the cells: an eviction costs about as much as a few decode steps."""


@dataclass(frozen=True)
class Pruning:
    """What to evict, and when.

    budget: what may stay after every prompt. A share counts all tokens of the conversation, not those that are left,
    and is enforced as soon as that frees at least 1/16 of the cells. None keeps everything that fits.
    cells: the cache never holds more than this; before it would, while reading or answering, cells are evicted. None:
    what does not fit into the context is refused.
    n_obs: queries that vote. n_recent, n_sink: last and first cells that stay in any case; limited by the budget, see
    budget.protected_cells(). softmax_n: n of the scoring softmax.
    """

    budget: Budget | None = None
    policy: Policy = field(default_factory=CspPolicy)
    cells: int | None = None
    n_obs: int = 32
    n_recent: int = 32
    n_sink: int = 4
    softmax_n: float = 1.0


class Pruner:
    """Evicts cells of one context."""

    def __init__(self, context: Context, pruning: Pruning, layout: Callable[[], Layout] = Layout) -> None:
        """layout: asked at every eviction.

        Raises PolicyError if `pruning.cells` bounds the cache, but nothing can be evicted from it.
        """
        self.context = context
        self.pruning = pruning
        self._layout = layout
        if self.is_bounded and (context.csp is None or pruning.policy.n_keep(1, 2) > 1):
            raise PolicyError(
                f"policy {pruning.policy.name} keeps everything: it cannot hold a conversation in {pruning.cells} cells"
            )

    @property
    def is_bounded(self) -> bool:
        """True if a conversation of any length fits."""
        return self.pruning.cells is not None

    @property
    def n_cell_max(self) -> int:
        """Cells that the conversation may fill at any time."""
        return min(self.pruning.cells or self.context.n_ctx, self.context.n_ctx)

    @property
    def n_batch(self) -> int:
        """Cells to fill at once. In a bounded cache a quarter of it: the rest is there to be looked at."""
        if not self.is_bounded:
            return self.context.n_batch
        return max(1, min(self.context.n_batch, self.n_cell_max // 4))

    def prune(self, n_token: int) -> int:
        """Evict down to the budget of a conversation of n_token tokens, if that pays; a bounded cache gets room for
        an answer too. Returns the cells evicted per layer and KV head.

        Raises BudgetError, before anything has changed, if the pinned cells or one cell exceed the budget.
        """
        if self.context.csp is None:
            return 0
        budget, n_cell, target = self.pruning.budget, self.context.n_cell, self.context.n_cell
        if budget is not None:
            target = budget.cells(n_token, self.context.bytes_per_cell)
            if budget.kind == "ratio" and n_cell - target < n_cell / MIN_GAIN:
                target = n_cell
        if self.is_bounded and n_cell > self.n_cell_max - self.n_batch // 2:
            target = min(target, self.n_cell_max - self.n_batch)
        return self._shrink(target)

    def make_room(self, n_new: int) -> int:
        """Evict so that n_new cells can be filled; nothing if they are free. Returns the cells evicted per layer and
        KV head. An eviction frees at least `n_batch` cells, so that they are few.

        Raises BudgetError, before anything has changed, if the pinned cells leave too little room.
        """
        if self.context.n_cell + n_new <= self.n_cell_max:
            return 0
        if n_new >= self.n_cell_max:
            raise BudgetError(f"{n_new} cells have to be filled at once, but the cache is bounded to {self.n_cell_max}")
        return self._shrink(self.n_cell_max - max(n_new, self.n_batch))

    def _shrink(self, target: int) -> int:
        """Keep `target` cells."""
        n_cell = self.context.n_cell
        target = max(target, 0)
        if self.pruning.policy.n_keep(target, n_cell) >= n_cell:
            return 0
        cells = self.select(target)
        self.context.keep(cells)
        return n_cell - int(cells.shape[-1])

    def select(self, target: int) -> IntArray:
        """The cells that stay, i32 [n_layer, n_head_kv, n_keep], if `target` are to.

        Raises BudgetError if the pinned cells are more.
        """
        groups, layout = self.context.layer_groups(), self._layout()
        n_keep = self.pruning.policy.n_keep(target, self.context.n_cell)
        cells = np.empty((groups[-1].stop, self.context.n_head_kv, n_keep), np.int32)
        for layers in groups:
            cells[layers.start : layers.stop] = self._select_of(layers, target, layout)
        return cells

    def _select_of(self, layers: range, target: int, layout: Layout) -> IntArray:
        """The cells that stay in some layers, i32 [n_layer, n_head_kv, n_keep]."""
        pruning = self.pruning
        observation = self.context.observe(
            layers,
            needs=pruning.policy.needs,
            n_obs=pruning.n_obs,
            softmax_n=pruning.softmax_n,
            bounds=layout.bounds,
        )
        protected = np.zeros(observation.shape, np.bool_)
        for begin, end in layout.pinned:
            protected |= (observation.pos >= begin) & (observation.pos < end)
        protected[..., -1] = True
        n_pinned = int(protected.sum(axis=-1).max())
        if n_pinned > target:
            raise BudgetError(
                f"pinned turns and pictures take {n_pinned - 1} cells, but only {target} may stay: "
                "unpin some, or raise the budget or the size of the cache"
            )
        n_recent, n_sink = protected_cells(target - n_pinned + 1, n_recent=pruning.n_recent, n_sink=pruning.n_sink)
        protected[..., :n_sink] = True
        protected[..., observation.n_cell - n_recent :] = True
        return pruning.policy.select(observation, target, protected)
