"""ctypes of the fork's C API, `native/include/llama-csp.h`: arrays in, arrays out, status codes as `NativeError`.

Shapes are row-major as in the header; `Csp` adds no behaviour of its own.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_csp.errors import NativeError

MODALITY_AUTO = -1
TEXT, IMAGE, AUDIO = 0, 1, 2
UNSUPPORTED = -2
"""Status of a model or cache that cannot be pruned."""


class Params(ctypes.Structure):
    """struct llama_csp_params"""

    _fields_ = [("n_window", ctypes.c_int32), ("n_modality", ctypes.c_int32)]


class Info(ctypes.Structure):
    """struct llama_csp_info"""

    _fields_ = [
        (name, ctypes.c_int32)
        for name in ("n_layer", "n_head", "n_head_kv", "n_modality", "n_cell_max", "n_cell", "n_kept", "n_window")
    ]

    n_layer: int
    n_head: int
    n_head_kv: int
    n_modality: int
    n_cell_max: int
    n_cell: int
    n_kept: int
    n_window: int


class SelectParams(ctypes.Structure):
    """struct llama_csp_select_params"""

    _fields_ = [(name, ctypes.c_int32) for name in ("k_self", "k_cross", "n_recent", "n_sink")]


class MemoryInfo(ctypes.Structure):
    """struct llama_csp_memory_info: bytes"""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("weights", "repacked", "kv", "compute", "device_weights", "device_kv", "device_compute")
    ]

    weights: int
    repacked: int
    kv: int
    compute: int
    device_weights: int
    device_kv: int
    device_compute: int


_csp_p = ctypes.c_void_p
_seq_id = ctypes.c_int32
_layers = [ctypes.c_int32, ctypes.c_int32]  # the first, and how many
_f32_p = ctypes.POINTER(ctypes.c_float)
_i32_p = ctypes.POINTER(ctypes.c_int32)
_u8_p = ctypes.POINTER(ctypes.c_uint8)

# name -> (result, arguments), in the order of the header; tests compare this table with the header
PROTOTYPES: dict[str, tuple[Any, list[Any]]] = {
    "llama_csp_default_params": (Params, []),
    "llama_csp_init": (ctypes.c_int32, [ctypes.c_void_p, Params, ctypes.POINTER(_csp_p)]),
    "llama_csp_free": (None, [_csp_p]),
    "llama_csp_last_error": (ctypes.c_char_p, []),
    "llama_csp_get_info": (ctypes.c_int32, [_csp_p, _seq_id, ctypes.POINTER(Info)]),
    "llama_csp_set_modality": (ctypes.c_int32, [_csp_p, _seq_id, ctypes.c_int32]),
    "llama_csp_set_softmax_n": (ctypes.c_int32, [_csp_p, _f32_p, ctypes.c_size_t]),
    "llama_csp_scores": (
        ctypes.c_int32,
        [_csp_p, _seq_id, *_layers, ctypes.c_int32, ctypes.c_float, _f32_p, ctypes.c_size_t],
    ),
    "llama_csp_norms": (ctypes.c_int32, [_csp_p, _seq_id, *_layers, ctypes.c_int32, _f32_p, ctypes.c_size_t]),
    "llama_csp_get_rows": (ctypes.c_int32, [_csp_p, _seq_id, ctypes.c_int32, ctypes.c_int32, _f32_p, ctypes.c_size_t]),
    "llama_csp_set_rows": (ctypes.c_int32, [_csp_p, _seq_id, ctypes.c_int32, ctypes.c_int32, _f32_p, ctypes.c_size_t]),
    "llama_csp_select": (
        ctypes.c_int32,
        [_csp_p, _seq_id, *_layers, SelectParams, _f32_p, _u8_p, _i32_p, ctypes.c_size_t],
    ),
    "llama_csp_keep": (ctypes.c_int32, [_csp_p, _seq_id, _i32_p, ctypes.c_int32]),
    "llama_csp_cells": (ctypes.c_int32, [_csp_p, _seq_id, *_layers, _i32_p, _u8_p, ctypes.c_size_t]),
    "llama_csp_state_get_size": (ctypes.c_size_t, [_csp_p, _seq_id]),
    "llama_csp_state_get_data": (ctypes.c_size_t, [_csp_p, _seq_id, _u8_p, ctypes.c_size_t]),
    "llama_csp_state_set_data": (ctypes.c_int32, [_csp_p, _seq_id, _u8_p, ctypes.c_size_t]),
    "llama_csp_get_memory": (ctypes.c_int32, [ctypes.c_void_p, ctypes.POINTER(MemoryInfo)]),
    "llama_csp_use_huge_pages": (ctypes.c_int32, [ctypes.c_void_p]),
    "llama_csp_is_plain": (ctypes.c_int32, [ctypes.c_void_p, ctypes.c_char_p]),
}

_functions: dict[str, Callable[..., Any]] = {}
_log_errors: deque[str] = deque(maxlen=4)
_log_callback: Any = None


def silence_logs() -> None:
    """Keep llama.cpp and libmtmd from writing to stderr; the last errors are kept for messages.

    The environment variable EDGE_CSP_LOG=1 leaves the log on.
    """
    global _log_callback
    if _log_callback is not None or os.environ.get("EDGE_CSP_LOG") == "1":
        return
    import llama_cpp
    from llama_cpp import mtmd_cpp

    level = 0

    def collect(new_level: int, text: bytes, _user_data: Any) -> None:
        nonlocal level
        if new_level != 5:  # GGML_LOG_LEVEL_CONT goes on with the line before
            level = new_level
        line = text.decode(errors="replace").strip()
        if level == 4 and line:  # GGML_LOG_LEVEL_ERROR
            _log_errors.append(line)

    _log_callback = llama_cpp.llama_log_callback(collect)
    for set_log in (llama_cpp.llama_log_set, mtmd_cpp.mtmd_log_set, mtmd_cpp.mtmd_helper_log_set):
        set_log(_log_callback, ctypes.c_void_p(0))


def clear_log_errors() -> None:
    """Forget errors of the past, before a call whose failure is to be explained."""
    _log_errors.clear()


def last_log_error() -> str:
    """The first error that llama.cpp logged since clear_log_errors(), usually the cause of the others."""
    return _log_errors[0] if _log_errors else "no reason given"


@contextmanager
def encoder_log() -> Iterator[list[str]]:
    """The lines that libmtmd logs in a `with` block; nothing is printed meanwhile."""
    import llama_cpp
    from llama_cpp import mtmd_cpp

    lines: list[str] = []
    collect = llama_cpp.llama_log_callback(lambda _level, text, _user_data: lines.append(text.decode(errors="replace")))
    mtmd_cpp.mtmd_log_set(collect, ctypes.c_void_p(0))
    try:
        yield lines
    finally:
        mtmd_cpp.mtmd_log_set(_log_callback or llama_cpp.llama_log_callback(), ctypes.c_void_p(0))


def memory(context: Any) -> MemoryInfo:
    """Bytes that a llama_context pointer and its model take; those that they would take, of a model without data."""
    info = MemoryInfo()
    _check(_call("llama_csp_get_memory", context, ctypes.byref(info)))
    return info


def use_huge_pages(model: Any) -> None:
    """Move weights that are not mapped from the file to huge pages, where the system has them."""
    _check(_call("llama_csp_use_huge_pages", model))


def trim_heap() -> None:
    """Give what lies free between objects in the heap back to the system, where the C library is glibc.

    Arrays of an eviction leave holes that are too small for those of the next one: the process would grow with each.
    """
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None:
        trim(0)


def is_plain(model: Any, tensor: str) -> bool:
    """True if a tensor of a llama_model pointer lies in host memory as it is in the file."""
    return bool(_call("llama_csp_is_plain", model, tensor.encode()))


def has_gpu() -> bool:
    """True if llama.cpp sees a GPU in this machine."""
    from llama_cpp import _ggml

    find = _ggml.libggml.ggml_backend_dev_by_type
    find.restype = ctypes.c_void_p
    return any(find(kind) for kind in (1, 2))  # GGML_BACKEND_DEVICE_TYPE_GPU, _IGPU


def find_device(name: str) -> int:
    """The ggml_backend_dev_t of a name, as `CUDA0`, `Vulkan0`, `MTL0` or `CPU`; NativeError lists those there are."""
    from llama_cpp import _ggml

    ggml = _ggml.libggml
    ggml.ggml_backend_dev_by_name.restype = ctypes.c_void_p
    device: int | None = ggml.ggml_backend_dev_by_name(name.encode())
    if device is None:
        ggml.ggml_backend_dev_get.restype = ctypes.c_void_p
        ggml.ggml_backend_dev_name.restype = ctypes.c_char_p
        devices = (ctypes.c_void_p(ggml.ggml_backend_dev_get(i)) for i in range(ggml.ggml_backend_dev_count()))
        names = ", ".join(ggml.ggml_backend_dev_name(device).decode() for device in devices)
        raise NativeError(f"no device is called {name!r}: this llama.cpp sees {names}")
    return device


def _call(name: str, *args: Any) -> Any:
    """Call a function of the fork; the library is loaded at the first call."""
    if not _functions:
        from llama_cpp import llama_cpp

        library: ctypes.CDLL = llama_cpp._lib
        for function_name, (restype, argtypes) in PROTOTYPES.items():
            try:
                function = getattr(library, function_name)
            except AttributeError:
                message = (
                    f"llama-cpp-python {_llama_cpp_version()} is not the edge-csp fork ({function_name} is missing)"
                )
                raise NativeError(f"{message}: install it with `pip install ./native`", status=0) from None
            function.restype, function.argtypes = restype, argtypes
            _functions[function_name] = function
    return _functions[name](*args)


def _llama_cpp_version() -> str:
    import llama_cpp

    return str(llama_cpp.__version__)


def _check(status: int) -> None:
    if status != 0:
        message: bytes = _call("llama_csp_last_error")
        raise NativeError(message.decode(errors="replace"), status=status)


def _pointer(array: NDArray[Any], kind: Any) -> Any:
    return array.ctypes.data_as(kind)


@dataclass
class Csp:
    """A `llama_csp` attached to a llama_context; free it (`close`) before the context.

    `seq_id` names the sequence that a call is about. Raises NativeError with the status and the reason wherever the C
    function refuses.
    """

    _handle: ctypes.c_void_p

    @classmethod
    def attach(cls, context: Any, *, n_window: int = 32, n_modality: int = 3) -> Csp:
        """Attach to a llama_context pointer. `n_window` queries per layer vote; they are recorded from now on."""
        handle = _csp_p()
        _check(_call("llama_csp_init", context, Params(n_window, n_modality), ctypes.byref(handle)))
        return cls(handle)

    def close(self) -> None:
        """Detach; a second call does nothing."""
        _call("llama_csp_free", self._handle)
        self._handle = ctypes.c_void_p()

    def info(self, *, seq_id: int = 0) -> Info:
        info = Info()
        _check(_call("llama_csp_get_info", self._handle, seq_id, ctypes.byref(info)))
        return info

    def set_modality(self, modality: int, *, seq_id: int = 0) -> None:
        """Tag of the cells that later decodes fill; MODALITY_AUTO: tokens are text, embeddings are images."""
        _check(_call("llama_csp_set_modality", self._handle, seq_id, modality))

    def set_softmax_n(self, softmax_n: float | NDArray[np.float32]) -> None:
        """N of the softmax in attention: one for all heads, or f32 [n_layer, n_head]."""
        values = np.ascontiguousarray(softmax_n, np.float32)
        _check(_call("llama_csp_set_softmax_n", self._handle, _pointer(values, _f32_p), values.size))

    def scores(
        self, n_obs: int, softmax_n: float = 1.0, *, layers: range | None = None, seq_id: int = 0
    ) -> NDArray[np.float32]:
        """Attention mass per modality of the query, f32 [n_layer, n_head_kv, n_modality, n_cell]; `layers`: of these,
        not of all.
        """
        info = self.info(seq_id=seq_id)
        layers = layers or range(info.n_layer)
        scores = np.empty((len(layers), info.n_head_kv, info.n_modality, info.n_cell), np.float32)
        pointer = _pointer(scores, _f32_p)
        args = layers.start, len(layers), n_obs, softmax_n, pointer, scores.size
        _check(_call("llama_csp_scores", self._handle, seq_id, *args))
        return scores

    def norms(self, kind: str, *, layers: range | None = None, seq_id: int = 0) -> NDArray[np.float32]:
        """Lengths of the rows of K ("k") or V ("v"), f32 [n_layer, n_head_kv, n_cell]; `layers`: of these, not of
        all.
        """
        info = self.info(seq_id=seq_id)
        layers = layers or range(info.n_layer)
        norms = np.empty((len(layers), info.n_head_kv, info.n_cell), np.float32)
        args = layers.start, len(layers), "kv".index(kind), _pointer(norms, _f32_p), norms.size
        _check(_call("llama_csp_norms", self._handle, seq_id, *args))
        return norms

    def rows(self, layer: int, kind: str, head_dim: int, *, seq_id: int = 0) -> NDArray[np.float32]:
        """K ("k") or V ("v") of a layer, f32 [n_head_kv, n_cell, head_dim]."""
        info = self.info(seq_id=seq_id)
        rows = np.empty((info.n_head_kv, info.n_cell, head_dim), np.float32)
        args = layer, "kv".index(kind), _pointer(rows, _f32_p), rows.size
        _check(_call("llama_csp_get_rows", self._handle, seq_id, *args))
        return rows

    def set_rows(self, layer: int, kind: str, rows: NDArray[np.float32], *, seq_id: int = 0) -> None:
        """Write what rows() reads; values are rounded to the type of the cache."""
        rows = np.ascontiguousarray(rows, np.float32)
        args = layer, "kv".index(kind), _pointer(rows, _f32_p), rows.size
        _check(_call("llama_csp_set_rows", self._handle, seq_id, *args))

    def select(
        self,
        scores: NDArray[np.float32],
        *,
        k_self: int,
        k_cross: int,
        n_recent: int,
        n_sink: int = 0,
        pinned: NDArray[np.bool_] | None = None,
        layers: range | None = None,
        seq_id: int = 0,
    ) -> NDArray[np.int32]:
        """The CSP rule of the header: cells i32 [n_layer, n_head_kv, n_keep], ascending.

        scores f32 [n_layer, n_head_kv, n_modality, n_cell], pinned bool [n_layer, n_head_kv, n_cell].
        """
        info = self.info(seq_id=seq_id)
        layers = layers or range(info.n_layer)
        shape = (len(layers), info.n_head_kv, info.n_modality, info.n_cell)
        if scores.shape != shape:
            raise ValueError(f"scores have shape {scores.shape}, needed is {shape}")
        mask = None
        if pinned is not None:
            mask = np.ascontiguousarray(np.broadcast_to(pinned, shape[:2] + shape[3:]), np.uint8)
        scores = np.ascontiguousarray(scores, np.float32)
        n_keep = max(min(info.n_cell, k_self + k_cross + n_recent), 0)
        cells = np.empty((len(layers), info.n_head_kv, n_keep), np.int32)
        params = SelectParams(k_self, k_cross, n_recent, n_sink)
        pinned_p = None if mask is None else _pointer(mask, _u8_p)
        pointers = _pointer(scores, _f32_p), pinned_p, _pointer(cells, _i32_p)
        args = layers.start, len(layers), params, *pointers, cells.size
        _check(_call("llama_csp_select", self._handle, seq_id, *args))
        return cells

    def keep(self, cells: NDArray[np.int32], *, seq_id: int = 0) -> None:
        """Keep cells i32 [n_layer, n_head_kv, n_keep]: ascending rows that end with the last cell."""
        info = self.info(seq_id=seq_id)
        if cells.ndim != 3 or cells.shape[:2] != (info.n_layer, info.n_head_kv):
            raise ValueError(f"cells have shape {cells.shape}, needed is ({info.n_layer}, {info.n_head_kv}, n_keep)")
        cells = np.ascontiguousarray(cells, np.int32)
        _check(_call("llama_csp_keep", self._handle, seq_id, _pointer(cells, _i32_p), cells.shape[2]))

    def cells(self, *, layers: range | None = None, seq_id: int = 0) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """True position i32 and tag u8 of the token in every cell, both [n_layer, n_head_kv, n_cell]; `layers`: of
        these, not of all.
        """
        info = self.info(seq_id=seq_id)
        layers = layers or range(info.n_layer)
        pos = np.empty((len(layers), info.n_head_kv, info.n_cell), np.int32)
        tag = np.empty(pos.shape, np.uint8)
        args = layers.start, len(layers), _pointer(pos, _i32_p), _pointer(tag, _u8_p), pos.size
        _check(_call("llama_csp_cells", self._handle, seq_id, *args))
        return pos, tag

    def state(self, *, seq_id: int = 0) -> bytes:
        """Positions and tags, to be stored beside the state of the sequence."""
        data = np.empty(_call("llama_csp_state_get_size", self._handle, seq_id), np.uint8)
        if _call("llama_csp_state_get_data", self._handle, seq_id, _pointer(data, _u8_p), data.size) == 0:
            _check(-1)
        return data.tobytes()

    def set_state(self, state: bytes, *, seq_id: int = 0) -> None:
        """Restore what `state` returned, after the state of the sequence has been restored."""
        data = np.frombuffer(state, np.uint8)
        _check(_call("llama_csp_state_set_data", self._handle, seq_id, _pointer(data, _u8_p), data.size))
