"""The KV cache as it should be: every layer and KV head holds its own tokens, and a token sees what was held when it
was evaluated. Plain numpy, one array per fact; nothing in the cache is ever computed again.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from .numpy_llama import Array, NumpyLlama, round_f16, round_q8_0, window_scores

IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Query:
    """A query of the observation window. It saw the cells up to its own."""

    q: Array  # [n_layer, n_head, head_dim], rounded as it is multiplied with keys of the cache's type
    cell: int
    tag: int


@dataclass(frozen=True, eq=False)
class NumpyCache:
    """One sequence. Every change makes a new cache, so that an old one is a saved one."""

    k: Array  # [n_layer, n_head_kv, n_cell, head_dim]
    v: Array  # [n_layer, n_head_kv, n_cell, head_dim]
    pos: IntArray  # [n_layer, n_head_kv, n_cell]
    tag: npt.NDArray[np.uint8]  # [n_layer, n_head_kv, n_cell]
    n_kept: int = 0  # cells up to here came out of keep()
    n_past: int = 0  # position of the next token
    window: tuple[Query, ...] = field(default=(), repr=False)

    @classmethod
    def empty(cls, model: NumpyLlama) -> NumpyCache:
        shape = (model.n_layer, model.n_head_kv, 0)
        rows = np.zeros((*shape, model.head_dim), np.float32)
        return cls(rows, rows, np.zeros(shape, np.int32), np.zeros(shape, np.uint8))

    @property
    def n_cell(self) -> int:
        return self.pos.shape[-1]

    def evaluate(
        self, model: NumpyLlama, embd: Array, positions: npt.ArrayLike, tag: int, n_window: int, cache_type: str
    ) -> tuple[NumpyCache, Array]:
        """Fill cells with embd [n, n_embd] at positions [n] or [4, n]; also returns the logits [n, n_vocab].

        n_window: queries that the window holds at most. cache_type: of K and V, f32, f16 or q8_0.
        """
        f16, q8 = cache_type == "f16", cache_type == "q8_0"
        past = self.k, self.v
        done = model.forward(embd=embd, positions=positions, f16_cache=f16, q8_cache=q8, past=past)
        q = round_f16(done.q) if f16 else round_q8_0(done.q) if q8 else done.q
        pos = np.asarray(positions, np.int32)
        times = pos if pos.ndim == 1 else pos[0]
        shape = (*self.pos.shape[:2], len(embd))
        queries = [Query(q[:, :, i], self.n_cell + i, tag) for i in range(len(embd))]
        after = NumpyCache(
            done.k,
            done.v,
            np.concatenate([self.pos, np.broadcast_to(times, shape)], axis=-1),
            np.concatenate([self.tag, np.full(shape, tag, np.uint8)], axis=-1),
            self.n_kept,
            int(pos.max()) + 1,
            (*self.window, *queries)[-n_window:],
        )
        return after, done.logits

    def keep(self, cells: IntArray) -> NumpyCache:
        """Hold these cells only, [n_layer, n_head_kv, n_keep]; the window starts anew if anything goes."""
        if cells.shape[-1] == self.n_cell:
            return self
        index = cells.astype(np.int64)
        k, v = (np.take_along_axis(rows, index[..., None], axis=2) for rows in (self.k, self.v))
        pos, tag = (np.take_along_axis(facts, index, axis=2) for facts in (self.pos, self.tag))
        return NumpyCache(k, v, pos, tag, cells.shape[-1], self.n_past)

    def removable(self) -> list[int]:
        """Positions from which on cells can be removed: those behind all kept cells."""
        behind = {*self.pos[0, 0, self.n_kept :].tolist()}
        last = int(self.pos[0, 0, self.n_kept - 1]) if self.n_kept else -1
        return sorted(pos for pos in behind if pos > last)

    def remove(self, begin: int) -> NumpyCache:
        """Forget all cells from position `begin` on; it is one of removable()."""
        n = int((self.pos[0, 0] < begin).sum())
        window = tuple(query for query in self.window if query.cell < n)
        cut = (slice(None), slice(None), slice(n))
        return NumpyCache(self.k[cut], self.v[cut], self.pos[cut], self.tag[cut], self.n_kept, begin, window)

    def restored(self) -> NumpyCache:
        """After save and restore: queries are not saved."""
        return replace(self, window=())

    def scores(self, n_obs: int, softmax_n: float, n_modality: int) -> Array:
        """What llama_csp_scores() should return, f32 [n_layer, n_head_kv, n_modality, n_cell]."""
        q = np.stack([query.q for query in self.window], axis=2)
        own = np.array([query.cell for query in self.window])
        seen = np.arange(self.n_cell) <= own[:, None]
        tags = [query.tag for query in self.window]
        return window_scores(q, self.k, tags, n_obs, softmax_n, seen, n_modality=n_modality)
