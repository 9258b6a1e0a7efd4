"""The contract of a policy: which cells of the KV cache stay, per layer and KV head.

A policy sees arrays, never a model or a cache. Shapes are numpy order, last index fastest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from edge_csp.errors import PolicyError

BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int32]
TagArray = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Observation:
    """What the runtime knows about the cells in use; the arrays are read-only.

    scores: f32 [n_layer, n_head_kv, n_modality, n_cell], attention mass that a cell got from the queries of one
            modality, summed over the observation window
    tag:    u8 [n_layer, n_head_kv, n_cell], modality of the token in the cell, below n_modality
    pos:    i32 [n_layer, n_head_kv, n_cell], true position of that token

    Raises PolicyError if shapes, types or tags do not fit.
    """

    scores: FloatArray
    tag: TagArray
    pos: IntArray

    def __post_init__(self) -> None:
        object.__setattr__(self, "scores", _read_only("scores", self.scores, np.float32, 4))
        object.__setattr__(self, "tag", _read_only("tag", self.tag, np.uint8, 3))
        object.__setattr__(self, "pos", _read_only("pos", self.pos, np.int32, 3))
        n_layer, n_head_kv, n_modality, n_cell = self.scores.shape
        if min(self.scores.shape) < 1:
            raise PolicyError(f"scores have the shape {self.scores.shape}: nothing to select from")
        for name, array in (("tag", self.tag), ("pos", self.pos)):
            if array.shape != (n_layer, n_head_kv, n_cell):
                raise PolicyError(f"{name} has the shape {array.shape}, scores have {self.scores.shape}")
        if (highest := int(self.tag.max())) >= n_modality:
            raise PolicyError(f"tag {highest} has no scores: they tell {n_modality} modalities apart")

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
        scores: FloatArray = np.take_along_axis(self.scores, self.tag[:, :, None].astype(np.intp), axis=2)[:, :, 0]
        return scores

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
    The same arguments give the same cells; inputs are never changed.
    """

    name: ClassVar[str]
    needs_scores: ClassVar[bool] = True  # False: the caller may pass zeros

    def n_keep(self, budget: int, n_cell: int) -> int:
        """Cells that every row keeps."""
        return min(budget, n_cell)

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
        protected.flags.writeable = False
        keep = self.pick(observation, n_keep, protected)
        if keep.shape != observation.shape or (keep.sum(axis=-1) != n_keep).any() or (protected & ~keep).any():
            raise PolicyError(f"policy {self.name} broke its contract: not {n_keep} cells with the protected ones")
        cells: IntArray = np.nonzero(keep)[-1].astype(np.int32).reshape(*observation.shape[:2], n_keep)
        return cells

    @abstractmethod
    def pick(self, observation: Observation, n_keep: int, protected: BoolArray) -> BoolArray:
        """True for the cells that stay, bool [n_layer, n_head_kv, n_cell].

        Called with 1 <= n_keep < n_cell; `protected` is read-only, holds the last cell and at most n_keep per row.
        Every row of the result has n_keep cells, all protected ones among them.
        """
