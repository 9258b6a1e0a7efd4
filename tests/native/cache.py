"""What llama.cpp itself says: the rows of K and V in its cache, and tensors of a graph. Independent of our code."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp import _ggml

from tests.oracle.runtime import Runtime

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class CacheRows:
    """Bytes of one head in one cell; the last axis is head_dim elements of the cache's type."""

    k: Bytes  # [n_layer, n_head_kv, n_cell, n_byte]
    v: Bytes  # [n_layer, n_head_kv, n_cell, n_byte]


def sequence_state(runtime: Runtime, seq_id: int = 0) -> Bytes:
    size = llama_cpp.llama_state_seq_get_size(runtime.ctx, seq_id)
    data = np.empty(size, np.uint8)
    pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
    assert llama_cpp.llama_state_seq_get_data(runtime.ctx, pointer, size, seq_id) == size
    return data


def restore_sequence(runtime: Runtime, state: Bytes, seq_id: int = 0) -> None:
    pointer = np.ascontiguousarray(state).ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
    assert llama_cpp.llama_state_seq_set_data(runtime.ctx, pointer, state.size, seq_id) == state.size


def read_rows(runtime: Runtime, n_layer: int, n_head_kv: int, n_cell: int, seq_id: int = 0) -> CacheRows:
    """Rows of the first cache in the state of a sequence (where there are two: of the full-attention layers).

    u32 v_trans, u32 n_layer, then for every K and every V a header (i32 type, u64 row size; a transposed V: i32 type,
    u32 element size, u32 rows) and its data. What lies before it, positions, has a variable size; what follows it are
    the caches of other layers.
    """
    data = sequence_state(runtime, seq_id)
    for offset in range(0, data.size - 8, 4):
        v_trans, layers = data[offset : offset + 8].view(np.uint32)
        if v_trans in (0, 1) and layers == n_layer:
            rows = _parse(data[offset + 8 :], bool(v_trans), n_layer, n_head_kv, n_cell)
            if rows is not None:
                return rows
    raise AssertionError("no K and V rows found in the state")


def _parse(data: Bytes, v_trans: bool, n_layer: int, n_head_kv: int, n_cell: int) -> CacheRows | None:
    k, data = _parse_rows(data, n_layer, n_head_kv, n_cell)
    if k is None:
        return None
    v, data = (_parse_columns if v_trans else _parse_rows)(data, n_layer, n_head_kv, n_cell)
    return None if v is None else CacheRows(k, v)


def _parse_rows(data: Bytes, n_layer: int, n_head_kv: int, n_cell: int) -> tuple[Bytes | None, Bytes]:
    layers = []
    for _ in range(n_layer):
        if data.size < 12:
            return None, data
        row_size = int(data[4:12].view(np.uint64)[0])
        if row_size == 0 or row_size % n_head_kv or data.size < 12 + n_cell * row_size:
            return None, data
        layers.append(data[12 : 12 + n_cell * row_size].reshape(n_cell, n_head_kv, -1).transpose(1, 0, 2))
        data = data[12 + n_cell * row_size :]
    return np.stack(layers), data


def _parse_columns(data: Bytes, n_layer: int, n_head_kv: int, n_cell: int) -> tuple[Bytes | None, Bytes]:
    layers = []
    for _ in range(n_layer):
        if data.size < 12:
            return None, data
        element_size, n_element = (int(n) for n in data[4:12].view(np.uint32))
        size = n_cell * element_size * n_element
        if size == 0 or n_element % n_head_kv or data.size < 12 + size:
            return None, data
        columns = data[12 : 12 + size].reshape(n_head_kv, n_element // n_head_kv, n_cell, element_size)
        layers.append(columns.transpose(0, 2, 1, 3).reshape(n_head_kv, n_cell, -1))
        data = data[12 + size :]
    return np.stack(layers), data


class GraphTap:
    """Reads named tensors of a graph while llama.cpp computes it: pass `params` as context_params."""

    def __init__(self, *names: str) -> None:
        base = _ggml.libggml
        base.ggml_get_name.restype = ctypes.c_char_p
        base.ggml_get_name.argtypes = [ctypes.c_void_p]
        base.ggml_nelements.restype = ctypes.c_int64
        base.ggml_nelements.argtypes = [ctypes.c_void_p]
        base.ggml_backend_tensor_get.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
        self._base = base
        self._prefixes = tuple(f"{name}-" for name in names or ("Qcur",))
        self._callback = llama_cpp.ggml_backend_sched_eval_callback(self._on_tensor)
        self.params: dict[str, Any] = {"cb_eval": self._callback}
        self._tensors: dict[str, npt.NDArray[np.float32]] = {}

    def _on_tensor(self, tensor: Any, ask: bool, user_data: Any) -> bool:
        name = self._base.ggml_get_name(tensor).decode()
        is_wanted = name.startswith(self._prefixes)
        if not ask and is_wanted:
            values = np.empty(self._base.ggml_nelements(tensor), np.float32)
            self._base.ggml_backend_tensor_get(tensor, values.ctypes.data, 0, values.nbytes)
            self._tensors[name] = values  # the last one of a layer, for Qcur the one after RoPE
        return is_wanted if ask else True

    def heads(self, name: str, layers: int | Iterable[int], n_head: int, head_dim: int) -> npt.NDArray[np.float32]:
        """A tensor of some layers (of the first ones) at the last decode, [n_layer, n_head, n_token, head_dim]."""
        wanted = range(layers) if isinstance(layers, int) else layers
        rows = [self._tensors[f"{name}-{il}"].reshape(-1, n_head, head_dim) for il in wanted]
        return np.stack(rows).transpose(0, 2, 1, 3)

    def queries(self, n_layer: int, n_head: int, head_dim: int) -> npt.NDArray[np.float32]:
        return self.heads("Qcur", n_layer, n_head, head_dim)

    def attention(
        self, layers: Iterable[int], n_head: int, n_stream: int = 1, n_token: int = 1
    ) -> npt.NDArray[np.float32]:
        """Rows of the softmax at the last decode, as [n_layer, n_stream, n_head, n_token of a stream, n_kv]; pass
        "kq_soft_max" to the constructor, flash attention off.
        """
        return np.stack([self._tensors[f"kq_soft_max-{il}"].reshape(n_stream, n_head, n_token, -1) for il in layers])
