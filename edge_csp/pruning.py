"""When to evict and how far: before new cells would overflow the cache, and after a prompt down to a budget, if there
is one. While a conversation fits and has no budget, nothing goes.

The policy chooses which cells stay; `Pruner` knows the numbers. It sees one context, and no messages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from edge_csp.budget import Budget, protected_cells
from edge_csp.context import Context
from edge_csp.errors import BudgetError, PolicyError
from edge_csp.policy import BlendPolicy, Observation, Policy, Span
from edge_csp.policy.base import REHEARSED, BoolArray, FloatArray, IntArray

Positions = tuple[int, int]
"""From the first one on, up to and without the second one."""


@dataclass(frozen=True)
class Layout:
    """What is where in a conversation.

    spans: in order, all cells that were filled. pinned: what stays. n_new: cells of text at the end that belong to the
    present turn, the question and what there is of its answer; None if that is not known.
    """

    spans: Sequence[Span] = ()
    pinned: Sequence[Positions] = ()
    n_new: int | None = None


MIN_GAIN = 16
"""A share is not enforced for less than 1/16 of the cells: an eviction costs about as much as a few decode steps."""
REHEARSAL = 64
"""Cells that a full cache keeps free for rehearsals, for policies that want them, unless it is very small."""
ROOM = 4
"""What has to be evicted frees at least 1/4 of the cache, so that evictions are few."""


@dataclass(frozen=True)
class Pruning:
    """What to evict, and when.

    budget: what may stay after every prompt. A share counts all tokens of the conversation, not those that are left,
    is never less than min_cells, and is enforced as soon as that frees at least 1/16 of the cells. None keeps
    everything that fits.
    cells: the cache never holds more than this; before it would, while reading or answering, cells are evicted. None:
    as many as the context has.
    min_cells: a share of a budget keeps at least so many cells: below, decoding gets no faster.
    n_obs: queries that vote. n_recent: last cells that stay in any case, as far as they are text of the present turn.
    n_sink: first cells that stay. Both are limited by the budget, see budget.protected_cells(). softmax_n: n of the
    scoring softmax.
    cues: what is asked about every picture before cells go, each answered in cue_predict tokens at most, by policies
    that rehearse; {n} is the number of the picture. None: those of the model, see rehearsal.cues_of().
    reread: pictures that get at least this share of the attention where an answer begins, and have lost more than half
    of their cells, are read again for the answer; 0: none.
    """

    budget: Budget | None = None
    policy: Policy = field(default_factory=BlendPolicy)
    cells: int | None = None
    min_cells: int = 128
    n_obs: int = 32
    n_recent: int = 32
    n_sink: int = 4
    softmax_n: float = 1.0
    cues: tuple[str, ...] = ()
    cue_predict: int = 16
    reread: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.reread <= 1:
            raise PolicyError(f"reread is {self.reread}: it is a share of the attention, 0 to 1")
        if not 0 <= self.softmax_n < math.inf:
            raise PolicyError(f"softmax_n is {self.softmax_n}; it must be 0 or more, and finite")
        for name, least in (("min_cells", 0), ("n_obs", 1), ("n_recent", 0), ("n_sink", 0), ("cue_predict", 0)):
            if (value := getattr(self, name)) < least:
                raise PolicyError(f"{name} is {value}; it must be {least} or more")


class Pruner:
    """Evicts cells of one context."""

    def __init__(
        self,
        context: Context,
        pruning: Pruning,
        layout: Callable[[], Layout] = Layout,
        rehearse: Callable[[int], dict[str, FloatArray]] = lambda _n_free: {},
    ) -> None:
        """layout: asked at every eviction. rehearse: called with the number of free cells before an eviction by a
        policy that wants notes of a rehearsal; returns them by their names, see rehearsal.Rehearsal.run().

        Raises PolicyError if `pruning.cells` bounds the cache, but nothing can be evicted from it, and if the policy
        rehearses, but nothing can be taken back from the cache.
        """
        self.context = context
        self.pruning = pruning
        self._layout = layout
        self._rehearse = rehearse
        self._fitted: Policy | None = None  # the policy, once it has found something out
        self._seen: tuple[int, FloatArray] | None = None  # position and scores before a rehearsal took the window
        self._noted: dict[str, FloatArray] = {}  # attention that was seen and is over, f32 [n_layer, n_head_kv, n_cell]
        if pruning.cells is not None and not self.is_bounded:
            raise PolicyError(
                f"policy {pruning.policy.name} keeps everything: it cannot hold a conversation in {pruning.cells} cells"
            )
        if self.rehearses and not context.takes_back:
            raise PolicyError(
                f"policy {pruning.policy.name} rehearses, but nothing can be taken back from the cache of "
                f"{context.model.info.path}: choose one that does not"
            )

    def replaced(self, pruning: Pruning) -> Pruner:
        """One that prunes otherwise from now on. Raises what the constructor raises."""
        other = Pruner(self.context, pruning, self._layout, self._rehearse)
        other._noted, other._seen = self._noted, self._seen
        if pruning.policy == self.pruning.policy:
            other._fitted = self._fitted
        return other

    def forget(self) -> None:
        """To be called when cells have been removed."""
        self._noted = {name: self._note(name) for name in self._noted}
        self._seen = None

    @property
    def rehearses(self) -> bool:
        """True if the policy wants notes of rehearsals."""
        return bool(self.pruning.policy.needs & REHEARSED) and self.context.csp is not None

    @property
    def is_bounded(self) -> bool:
        """True if a conversation of any length fits, because cells can be evicted."""
        return self.context.csp is not None and self.pruning.policy.n_keep(1, 2) == 1

    @property
    def n_cell_max(self) -> int:
        """Cells that the conversation may fill at any time."""
        most = self._n_cell_bound
        return most - REHEARSAL if self.rehearses and most >= 4 * REHEARSAL else most

    @property
    def _n_cell_bound(self) -> int:
        return min(self.pruning.cells or self.context.n_ctx, self.context.n_ctx)

    @property
    def n_room(self) -> int:
        """Cells that an eviction frees at least, when the cache is full."""
        return max(1, self.n_cell_max // ROOM)

    def n_batch(self, n_left: int = 0) -> int:
        """Cells to fill at once, if n_left are still to be filled. While these fit, as many as the context takes, so
        that what is computed is what it would be without pruning; then no more than an eviction frees: the rest is
        there to be looked at. No more than the window holds, if the attention of all queries is wanted.
        """
        most = self.context.n_batch
        if self.is_bounded and self.context.n_cell + n_left > self.n_cell_max:
            most = min(most, self.n_room)
        if "mass" in self.pruning.policy.needs:
            most = min(most, self.context.n_window)
        return max(1, most)

    def note_mass(self) -> None:
        """Add the attention of the queries that came since the last call, for policies that want that of all queries.

        To be called before every batch, and before cells are evicted or other queries come.
        """
        if "mass" not in self.pruning.policy.needs or self.context.csp is None:
            return
        n_cell = self.context.n_cell
        n_new = n_cell - self._note("mass").shape[-1]
        if n_new > 0:
            self._noted["mass"] = self._note("mass", n_cell) + self.context.mass(n_new, self.pruning.softmax_n)

    def _note_rehearsal(self) -> None:
        """Rehearse what is new, for policies that want that; the scores of the window are kept before it goes."""
        n_past = self.context.n_past
        if not self.rehearses or (self._seen and self._seen[0] == n_past):
            return
        scores = self.context.scores(self.pruning.n_obs, self.pruning.softmax_n)
        for name, noted in self._rehearse(self._n_cell_bound - self.context.n_cell).items():
            self._noted[name] = np.maximum(self._note(name, noted.shape[-1]), noted)
            self._seen = n_past, scores

    def _note(self, name: str, n_cell: int | None = None) -> FloatArray:
        """What is noted of the first n_cell cells (default: as many as are noted and in use), 0 of new ones."""
        csp = self.context.csp
        assert csp is not None
        info = csp.info(seq_id=self.context.seq_id)
        noted = self._noted.get(name, np.zeros((info.n_layer, info.n_head_kv, 0), np.float32))[..., : info.n_cell]
        if n_cell is None or n_cell <= noted.shape[-1]:
            return noted
        return np.pad(noted, [(0, 0), (0, 0), (0, n_cell - noted.shape[-1])])

    def prune(self, n_token: int, n_new: int = 0) -> int:
        """Evict down to the budget of a conversation of n_token tokens, if that pays, and so that n_new cells can be
        filled, if there are any, and an answer behind them. Returns the cells evicted per layer and KV head.

        Raises BudgetError, before anything has changed, if the pinned cells or one cell exceed the budget.
        """
        return 0 if self.context.csp is None else self._shrink(self._target(n_token, n_new))

    def check(self, n_token: int) -> None:
        """Raises BudgetError if prune() would; nothing is evicted."""
        if self.context.csp is None:
            return
        target = self._target(n_token)
        if not self._evicts(target):
            return
        layout = self._layout()
        if layout.pinned or target < 1:
            for layers in self.context.layer_groups():
                self._protect_pinned(self.context.cells(layers)[0], target, layout)

    def _target(self, n_token: int, n_new: int = 0) -> int:
        """Cells that prune() keeps. Raises BudgetError if the budget is smaller than one cell."""
        budget, n_cell, target = self.pruning.budget, self.context.n_cell, self.context.n_cell
        if budget is not None:
            target = budget.cells(n_token, self.context.bytes_per_cell, self.pruning.min_cells)
            if budget.kind == "ratio" and n_cell - target < n_cell / MIN_GAIN:
                target = n_cell
        if self.is_bounded and n_new and n_cell + n_new + self.n_room > self.n_cell_max:
            target = min(target, self.n_cell_max - n_new - self.n_room)
        return max(target, 0)

    def make_room(self, n_new: int) -> int:
        """Evict so that n_new cells can be filled; nothing if they are free. Returns the cells evicted per layer and
        KV head. An eviction frees at least `n_room` cells, so that they are few.

        Raises BudgetError, before anything has changed, if the pinned cells leave too little room.
        """
        self.note_mass()
        if self.context.n_cell + n_new <= self.n_cell_max:
            return 0
        if n_new >= self.n_cell_max:
            raise BudgetError(f"{n_new} cells have to be filled at once, but the cache is bounded to {self.n_cell_max}")
        return self._shrink(self.n_cell_max - max(n_new, self.n_room))

    def _shrink(self, target: int) -> int:
        """Keep `target` cells."""
        if not self._evicts(target):
            return 0
        n_cell, cells = self.context.n_cell, self.select(target)
        self.evict(cells)
        return n_cell - int(cells.shape[-1])

    def _evicts(self, target: int) -> bool:
        return self.pruning.policy.n_keep(target, self.context.n_cell) < self.context.n_cell

    def evict(self, cells: IntArray) -> None:
        """Keep the cells that select() has chosen, after what goes was merged into them if the policy does that."""
        self.merge(cells)
        n_cell = self.context.n_cell
        noted = {name: np.take_along_axis(self._note(name, n_cell), cells, axis=-1) for name in self._noted}
        self.context.keep(cells)
        self._noted, self._seen = noted, None

    def merge(self, cells: IntArray) -> None:
        """Let the policy merge what goes into what stays, layer by layer; nothing happens if it does not do that."""
        if not self.pruning.policy.merges:
            return
        layout = self._layout()
        for layer, kept in enumerate(cells):
            observation = self._observe(range(layer, layer + 1), layout)
            rows = self.context.rows(layer, "k"), self.context.rows(layer, "v")
            for kind, merged in zip("kv", self.pruning.policy.merge_rows(observation, *rows, kept), strict=True):
                self.context.set_rows(layer, kind, merged)

    def select(self, target: int) -> IntArray:
        """The cells that stay, i32 [n_layer, n_head_kv, n_keep], if `target` are to.

        Raises BudgetError if the pinned cells are more.
        """
        self.note_mass()
        self._note_rehearsal()
        groups, layout = self.context.layer_groups(), self._layout()
        if self._fitted is None and any(span.is_picture for span in layout.spans):
            fitted = self.pruning.policy.fit(self._observe(layers, layout) for layers in groups)
            if fitted != self.pruning.policy:
                self._fitted = fitted
        n_keep = self.pruning.policy.n_keep(target, self.context.n_cell)
        cells = np.empty((groups[-1].stop, self.context.n_head_kv, n_keep), np.int32)
        for layers in groups:
            cells[layers.start : layers.stop] = self._select_of(layers, target, layout)
        return cells

    def _observe(self, layers: range, layout: Layout) -> Observation:
        pruning, n_cell = self.pruning, self.context.n_cell
        noted = {name: self._note(name, n_cell) for name in ("mass", *REHEARSED) if name in pruning.policy.needs}
        if self._seen and self._seen[0] == self.context.n_past and "scores" in pruning.policy.needs:
            noted["scores"] = self._seen[1]
        return self.context.observe(
            layers,
            needs=pruning.policy.needs,
            n_obs=pruning.n_obs,
            softmax_n=pruning.softmax_n,
            spans=layout.spans,
            **{name: values[layers.start : layers.stop] for name, values in noted.items()},
        )

    def _select_of(self, layers: range, target: int, layout: Layout) -> IntArray:
        """The cells that stay in some layers, i32 [n_layer, n_head_kv, n_keep]."""
        pruning, observation = self.pruning, self._observe(layers, layout)
        protected, n_pinned = self._protect_pinned(observation.pos, target, layout)
        n_recent = pruning.n_recent if layout.n_new is None else min(pruning.n_recent, layout.n_new)
        n_recent, n_sink = protected_cells(target - n_pinned + 1, n_recent=n_recent, n_sink=pruning.n_sink)
        protected[..., :n_sink] = True
        protected[..., observation.n_cell - n_recent :] = True
        return (self._fitted or pruning.policy).select(observation, target, protected)

    @staticmethod
    def _protect_pinned(pos: IntArray, target: int, layout: Layout) -> tuple[BoolArray, int]:
        """Which cells are pinned, with the last one, bool [n_layer, n_head_kv, n_cell], and the most of a head.

        Raises BudgetError if more than `target`.
        """
        protected = np.zeros(pos.shape, np.bool_)
        for begin, end in layout.pinned:
            protected |= (pos >= begin) & (pos < end)
        protected[..., -1] = True
        n_pinned = int(protected.sum(axis=-1).max())
        if n_pinned > target:
            raise BudgetError(
                f"pinned turns and pictures take {n_pinned - 1} cells, but only {target} may stay: "
                "unpin some, or raise the budget or the size of the cache"
            )
        return protected, n_pinned
