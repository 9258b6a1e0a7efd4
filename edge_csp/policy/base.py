"""The contract of a policy: which cells of the KV cache stay, per layer and KV head.

A policy sees arrays, never a model or a cache. Shapes are numpy order, last index fastest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from edge_csp.errors import PolicyError

BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int32]
TagArray = npt.NDArray[np.uint8]


MEASURED = {"scores": 4, "mass": 3, "repeated": 3, "described": 3, "key_norm": 3, "value_norm": 3, "keys": 4}
"""What can be measured of the cells, and the number of its dimensions."""
REHEARSED = frozenset({"repeated", "described"})
"""Of these, what takes a rehearsal before the eviction, see rehearsal.py."""


@dataclass(frozen=True)
class Span:
    """A part of a picture, or a run of text between pictures.

    n_cell: cells that it filled. columns: of the grid on which the patches of a picture lie, row by row; 0 where that
    is not known.
    """

    n_cell: int
    is_picture: bool = False
    columns: int = 0


class Observation:
    """What the runtime knows about the cells in use, of all layers or of some of them; the arrays are read-only.

    tag:  u8 [n_layer, n_head_kv, n_cell], modality of the token in the cell
    pos:  i32 [n_layer, n_head_kv, n_cell], true position of that token
    span: i32 [n_layer, n_head_kv, n_cell], which of `spans` the token belongs to, ascending
    offset: i32 [n_layer, n_head_kv, n_cell], its place there: how many cells of the span were filled before it
    spans: what the conversation is made of, in its order
    first_layer: number of the first of these layers

    The following are measured only for policies that name them in `needs`, others get a PolicyError:

    scores:   f32 [n_layer, n_head_kv, n_modality, n_cell], attention mass that a cell got from the queries of one
              modality, summed over the observation window
    mass:     f32 [n_layer, n_head_kv, n_cell], attention mass from all queries since the cell was filled
    repeated: f32 [n_layer, n_head_kv, n_cell], most attention of a batch of queries while the text was rehearsed, mean
              over these queries, see rehearsal.py; 0 in cells that were not there then
    described: f32 [n_layer, n_head_kv, n_cell], most attention mass of a cue about a picture and its answer
    key_norm, value_norm: f32 [n_layer, n_head_kv, n_cell], length of the key, of the value
    keys:     f32 [n_layer, n_head_kv, n_cell, head_dim], the keys, with the rotation of their positions

    Raises PolicyError if shapes, types or tags do not fit.
    """

    def __init__(
        self,
        tag: TagArray,
        pos: IntArray,
        *,
        span: IntArray | None = None,
        offset: IntArray | None = None,
        spans: Sequence[Span] = (),
        first_layer: int = 0,
        **measured: FloatArray,
    ) -> None:
        """Without spans, all cells are one run of text."""
        self.tag: TagArray = _read_only("tag", tag, np.uint8, 3)
        self.pos: IntArray = _read_only("pos", pos, np.int32, 3)
        whole = np.broadcast_to(np.int32(0), tag.shape)
        self.span: IntArray = _read_only("span", whole if span is None else span, np.int32, 3)
        self.offset: IntArray = _read_only("offset", pos if offset is None else offset, np.int32, 3)
        self.spans = tuple(spans) or (Span(int(tag.shape[-1])),)
        self.first_layer = first_layer
        self._measured: dict[str, FloatArray] = {}
        if min(self.tag.shape) < 1:
            raise PolicyError(f"tag has the shape {self.tag.shape}: nothing to select from")
        for name, array in (("pos", self.pos), ("span", self.span), ("offset", self.offset)):
            if array.shape != self.tag.shape:
                raise PolicyError(f"{name} has the shape {array.shape}, tag has {self.tag.shape}")
        for name, given in measured.items():
            values: FloatArray = _read_only(name, given, np.float32, MEASURED[name])
            cells = values.shape[:2] + values.shape[3:] if name == "scores" else values.shape[:3]
            if cells != self.tag.shape:
                raise PolicyError(f"{name} has the shape {values.shape}, tag has {self.tag.shape}")
            self._measured[name] = values
        if int(self.span.max()) >= len(self.spans):
            raise PolicyError(f"a cell is of span {int(self.span.max())}, but there are {len(self.spans)}")
        if "scores" in measured and (highest := int(self.tag.max())) >= (n_modality := self.scores.shape[2]):
            raise PolicyError(f"tag {highest} has no scores: they tell {n_modality} modalities apart")

    def of_layer(self, i: int) -> Observation:
        """The i-th of these layers alone."""
        measured = {name: values[i : i + 1] for name, values in self._measured.items()}
        part = slice(i, i + 1)
        return Observation(
            self.tag[part],
            self.pos[part],
            span=self.span[part],
            offset=self.offset[part],
            spans=self.spans,
            first_layer=self.first_layer + i,
            **measured,
        )

    def _get(self, name: str) -> FloatArray:
        if name not in self._measured:
            raise PolicyError(f"{name} was not measured: the policy has to name it in `needs`")
        return self._measured[name]

    @property
    def scores(self) -> FloatArray:
        return self._get("scores")

    @property
    def mass(self) -> FloatArray:
        return self._get("mass")

    @property
    def repeated(self) -> FloatArray:
        return self._get("repeated")

    @property
    def described(self) -> FloatArray:
        return self._get("described")

    @property
    def key_norm(self) -> FloatArray:
        return self._get("key_norm")

    @property
    def value_norm(self) -> FloatArray:
        return self._get("value_norm")

    @property
    def keys(self) -> FloatArray:
        return self._get("keys")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(n_layer, n_head_kv, n_cell)"""
        n_layer, n_head_kv, n_cell = self.tag.shape
        return n_layer, n_head_kv, n_cell

    @property
    def n_cell(self) -> int:
        """Cells in use."""
        return self.shape[2]

    @property
    def score_self(self) -> FloatArray:
        """f32 [n_layer, n_head_kv, n_cell], mass from the queries of the cell's own modality."""
        own = self.scores[:, :, 0].copy()
        for modality in range(1, self.scores.shape[2]):
            np.copyto(own, self.scores[:, :, modality], where=self.tag == modality)
        return own

    @property
    def score_cross(self) -> FloatArray:
        """f32 [n_layer, n_head_kv, n_cell], mass from the queries of all other modalities, summed in their order."""
        total = np.zeros(self.shape, np.float32)
        for modality in range(self.scores.shape[2]):
            np.add(total, self.scores[:, :, modality], out=total, where=self.tag != modality)
        return total


def _read_only(name: str, array: npt.NDArray[Any], dtype: npt.DTypeLike, ndim: int) -> npt.NDArray[Any]:
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != ndim:
        found = f"{array.dtype} with {array.ndim}" if isinstance(array, np.ndarray) else type(array).__name__
        raise PolicyError(f"{name}: expected {np.dtype(dtype)} with {ndim} dimensions, got {found}")
    view: npt.NDArray[Any] = array.view()
    view.flags.writeable = False
    return view


@dataclass(frozen=True)
class Policy(ABC):
    """One way to choose the cells that stay. A subclass is a frozen dataclass of settings with one method, `pick`.

    `select` owns the contract: every row keeps exactly `n_keep(budget, n_cell)` cells, among them the protected ones.
    The same arguments give the same cells; inputs are never changed. Layers are chosen on their own: all at once or one
    after the other gives the same. What a policy does wrong is a PolicyError that names the first such row.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset({"scores"})  # what has to be measured, of MEASURED

    def n_keep(self, budget: int, n_cell: int) -> int:
        """Cells that every row keeps."""
        return min(budget, n_cell)

    def fit(self, layers: Iterable[Observation]) -> Policy:
        """The same policy, with what it has found out about the model in all of its layers, which come group after
        group; itself if that is nothing. Called before selections from a conversation with pictures, until it has
        found something.
        """
        return self

    def select(self, observation: Observation, budget: int, protected: BoolArray) -> IntArray:
        """Cells to keep, ascending.

        budget:    cells per layer and KV head, >= 1
        protected: bool [n_layer, n_head_kv, n_cell], cells that stay in any case (sink, recent, pinned). The last cell
                   is always protected: the runtime counts positions from it.
        Returns i32 [n_layer, n_head_kv, n_keep].
        Raises PolicyError if the budget is below 1 or below the protected cells of a row.
        """
        if budget < 1:
            raise PolicyError(f"budget is {budget} cells; at least 1 is needed")
        if protected.dtype != np.bool_ or protected.shape != observation.shape:
            raise PolicyError(f"protected: expected bool {observation.shape}, got {protected.dtype} {protected.shape}")
        n_keep = self.n_keep(budget, observation.n_cell)
        protected = protected.copy()
        protected[..., -1] = True
        if (most := int(protected.sum(axis=-1).max())) > n_keep:
            raise PolicyError(f"{most} cells are protected, the budget is {n_keep}")
        if n_keep == observation.n_cell:
            everything: IntArray = np.broadcast_to(np.arange(n_keep, dtype=np.int32), observation.shape).copy()
            return everything
        keep = self._checked(self._picked(observation, n_keep, protected.copy()), observation, n_keep, protected)
        rows = np.flatnonzero(keep).reshape(-1, n_keep) - np.arange(0, keep.size, observation.n_cell)[:, None]
        return rows.astype(np.int32).reshape(*observation.shape[:2], n_keep)

    def _picked(self, observation: Observation, n_keep: int, protected: BoolArray) -> object:
        """What `pick` returns, its errors as PolicyErrors."""
        protected.flags.writeable = False
        try:
            return self.pick(observation, n_keep, protected)
        except MemoryError:
            raise
        except PolicyError as error:
            raise PolicyError(f"policy {self.name}: {error}") from error
        except Exception as error:
            does = "changes its input" if "read-only" in str(error) else "failed"
            raise PolicyError(f"policy {self.name} {does}: {type(error).__name__}: {error}") from error

    def _checked(self, keep: object, observation: Observation, n_keep: int, protected: BoolArray) -> BoolArray:
        """What `pick` returned, if it keeps the contract."""
        if not isinstance(keep, np.ndarray) or keep.dtype != np.bool_ or keep.shape != observation.shape:
            got = f"{keep.dtype} {keep.shape}" if isinstance(keep, np.ndarray) else type(keep).__name__
            raise PolicyError(f"policy {self.name} broke its contract: pick gave {got}, not bool {observation.shape}")
        n_kept = np.count_nonzero(keep, axis=-1)
        lost = protected & ~keep
        if (wrong := np.argwhere(n_kept != n_keep)).size:
            what = f"keeps {n_kept[tuple(wrong[0])]} cells instead of {n_keep}"
        elif (wrong := np.argwhere(lost)).size:
            what = f"evicts cell {wrong[0][-1]}, which is protected"
        else:
            return keep
        il, head = observation.first_layer + wrong[0][0], wrong[0][1]
        raise PolicyError(f"policy {self.name} broke its contract: layer {il}, head {head} {what}")

    @abstractmethod
    def pick(self, observation: Observation, n_keep: int, protected: BoolArray) -> BoolArray:
        """True for the cells that stay, bool [n_layer, n_head_kv, n_cell].

        Called with 1 <= n_keep < n_cell; `protected` is read-only, holds the last cell and at most n_keep per row.
        Every row of the result has n_keep cells, all protected ones among them.
        """

    @property
    def merges(self) -> bool:
        """True if `merge_rows` is to be called for every layer before cells are evicted."""
        return False

    def merge_rows(
        self, observation: Observation, k: FloatArray, v: FloatArray, cells: IntArray
    ) -> tuple[FloatArray, FloatArray]:
        """The rows of K and V of one layer, after what is evicted has been merged into what stays.

        observation: of this layer alone. k, v: f32 [n_head_kv, n_cell, head_dim], read-only; head_dim of K and V may
        differ. Keys have the rotation of their positions, and keep it: a cell's position stays what it was.
        cells: i32 [n_head_kv, n_keep], the cells that stay, ascending.
        Returns new arrays of the same shapes; only rows of cells that stay matter.
        """
        return k, v
