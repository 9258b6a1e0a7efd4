"""The installed llama.cpp, driven through its C API: load a model, decode, read logits."""

from __future__ import annotations

import ctypes
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

CACHE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8, "bf16": 30}

_log_lines: deque[str] = deque(maxlen=10_000)


@llama_cpp.llama_log_callback
def _collect_log(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
    _log_lines.append(text.decode(errors="replace"))


def log_tail(n_line: int = 200) -> str:
    """The last lines that llama.cpp logged."""
    return "".join(list(_log_lines)[-n_line:])


class Runtime:
    """One model and one context with a single sequence. Use it as a context manager, or close() it."""

    def __init__(
        self,
        path: Path,
        *,
        n_ctx: int = 256,
        n_ubatch: int = 64,
        type_k: str = "f32",
        type_v: str = "f32",
        flash_attn: bool = False,
        kv_unified: bool = True,
        n_threads: int = 1,
        model_params: dict[str, Any] | None = None,
        context_params: dict[str, Any] | None = None,
    ) -> None:
        """model_params, context_params: further fields of llama_model_params and llama_context_params."""
        llama_cpp.llama_log_set(_collect_log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.model: Any = None
        self.ctx: Any = None
        params = llama_cpp.llama_model_default_params()
        _set_fields(params, {"n_gpu_layers": 0} | (model_params or {}))
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            raise RuntimeError(f"{path}: cannot be loaded\n{log_tail()}")
        settings = {
            "n_ctx": n_ctx,
            "n_batch": n_ctx,
            "n_ubatch": n_ubatch,
            "n_threads": n_threads,
            "n_threads_batch": n_threads,
            "type_k": CACHE_TYPES[type_k],
            "type_v": CACHE_TYPES[type_v],
            "flash_attn_type": int(flash_attn),
            "kv_unified": kv_unified,
        }
        cparams = llama_cpp.llama_context_default_params()
        _set_fields(cparams, settings | (context_params or {}))
        self.ctx = llama_cpp.llama_init_from_model(self.model, cparams)
        if not self.ctx:
            self.close()
            raise RuntimeError(f"{path}: no context\n{log_tail()}")
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.n_past = 0  # position of the next token

    def decode(
        self,
        tokens: npt.ArrayLike | None = None,
        *,
        embd: npt.NDArray[np.float32] | None = None,
        positions: npt.ArrayLike | None = None,
        seq_id: int = 0,
    ) -> npt.NDArray[np.float32]:
        """Evaluate tokens [n] or embeddings [n, n_embd] and return the logits of all of them [n, n_vocab].

        positions: [n]; with embeddings and M-RoPE [4, n]. Default: one after the other from n_past on, which then
        follows the highest position.
        """
        if embd is None:
            token = np.ascontiguousarray(tokens, np.int32)
            n = len(token)
        else:
            data = np.ascontiguousarray(embd, np.float32)
            n = len(data)
        pos = np.ascontiguousarray(np.arange(n) + self.n_past if positions is None else positions, np.int32)
        owner = (ctypes.c_int32 * 1)(seq_id)
        batch = llama_cpp.llama_batch()
        batch.n_tokens = n
        if embd is None:
            batch.token = token.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        else:
            batch.embd = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        batch.pos = pos.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        batch.n_seq_id = (ctypes.c_int32 * n)(*[1] * n)
        batch.seq_id = (ctypes.POINTER(ctypes.c_int32) * n)(*[owner] * n)
        batch.logits = (ctypes.c_int8 * n)(*[1] * n)
        status = llama_cpp.llama_decode(self.ctx, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}\n{log_tail()}")
        self.n_past = int(pos.max()) + 1
        logits = llama_cpp.llama_get_logits(self.ctx)
        return np.ctypeslib.as_array(logits, shape=(n, self.n_vocab)).copy()

    def remove(self, begin: int, end: int) -> bool:
        """Remove the cells at the positions begin .. end - 1; False if that was refused."""
        memory = llama_cpp.llama_get_memory(self.ctx)
        return bool(llama_cpp.llama_memory_seq_rm(memory, 0, begin, end))

    def clear(self) -> None:
        """Forget all cells."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.ctx), True)
        self.n_past = 0

    def close(self) -> None:
        """Free context and model; may be called twice."""
        if self.ctx:
            llama_cpp.llama_free(self.ctx)
        if self.model:
            llama_cpp.llama_model_free(self.model)
        self.ctx = self.model = None

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _set_fields(params: ctypes.Structure, values: dict[str, Any]) -> None:
    for name, value in values.items():
        getattr(params, name)  # a misspelt name would be set without a word
        setattr(params, name, value)


def relative_error(actual: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> float:
    """Largest difference over the largest expected value."""
    return float(np.abs(actual - expected).max() / np.abs(expected).max())
