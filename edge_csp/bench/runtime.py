"""A llama_context to be measured: fill it, decode. Runs with the unpatched library too; pruned.py does not.

Only llama_decode and llama_synchronize are timed, in milliseconds.
"""

from __future__ import annotations

import ctypes
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_csp import native
from edge_csp.bench.fill import random_state
from edge_csp.errors import BenchError, ContextError, ModelError

N_UBATCH = 512


@dataclass(frozen=True)
class Setting:
    """How a cache is kept and read: types of K and V, flash attention."""

    type_k: str = "f16"
    type_v: str = "f16"
    flash_attn: bool = False

    def __str__(self) -> str:
        types = self.type_k if self.type_k == self.type_v else f"{self.type_k} K {self.type_v} V"
        return f"{types}, FA {'on' if self.flash_attn else 'off'}"


SETTINGS = (
    Setting(),
    Setting(flash_attn=True),
    Setting("bf16", "bf16"),
    Setting("q8_0", "f16"),
    Setting("q8_0", "q8_0", flash_attn=True),
    Setting("q4_0", "q4_0", flash_attn=True),
)
"""What llama.cpp offers without pruning; quantised V needs flash attention."""
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""Seconds on the wall, or of the processor in all threads of this process."""
KV_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8, "bf16": 30}
"""Cache types by their ggml number."""


class Model:
    """A loaded text model, without its encoder. A model that the caller has loaded stays the caller's."""

    def __init__(
        self,
        path: str | Path,
        *,
        n_thread: int = 1,
        n_gpu_layers: int = -1,
        use_mmap: bool = True,
        device: str | None = None,
        clock: str = "wall",
        handle: Any = None,
    ) -> None:
        """device: a ggml device that takes all layers, as CUDA0. clock: one of CLOCKS. handle:
        llama_model pointer, if it is loaded already.

        Raises ModelError if the file cannot be loaded, NativeError if there is no such device.
        """
        import llama_cpp

        if not handle:
            native.silence_logs()
            native.clear_log_errors()
            llama_cpp.llama_backend_init()
            params = llama_cpp.llama_model_default_params()
            params.n_gpu_layers, params.use_mmap = n_gpu_layers, use_mmap
            if device is not None:
                self._devices = (ctypes.c_void_p * 2)(native.find_device(device), None)
                params.devices, params.n_gpu_layers = ctypes.cast(self._devices, ctypes.c_void_p), -1
            handle = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
        if not handle:
            raise ModelError(f"{path} cannot be loaded: {native.last_log_error()}")
        self.handle, self.n_thread, self.clock = handle, n_thread, CLOCKS[clock]
        self.n_vocab = int(llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(handle)))


class Cache:
    """A context as upstream makes it, with one sequence of random tokens. Close it before its model."""

    n_decode = 1
    """Cells that fill() evaluates: the last ones."""

    def __init__(self, model: Model, n_ctx: int, setting: Setting, *, n_ubatch: int = N_UBATCH) -> None:
        """Raises ContextError if llama.cpp cannot make the context."""
        self.n_past = 0
        self._generator = np.random.default_rng(3)
        self._n_vocab, self._clock = model.n_vocab, model.clock
        self.ctx = self._open(model, n_ctx, setting, n_ubatch)

    def _open(self, model: Model, n_ctx: int, setting: Setting, n_ubatch: int) -> Any:
        """A llama_context pointer."""
        import llama_cpp

        native.clear_log_errors()
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = n_ctx, n_ubatch, n_ubatch, 1
        params.n_threads = params.n_threads_batch = model.n_thread
        params.flash_attn_type = int(setting.flash_attn)
        params.type_k, params.type_v = KV_TYPES[setting.type_k], KV_TYPES[setting.type_v]
        ctx = llama_cpp.llama_init_from_model(model.handle, params)
        if not ctx:
            raise ContextError(f"no context of {n_ctx} cells, {setting}: {native.last_log_error()}")
        return ctx

    @property
    def n_ctx(self) -> int:
        """Cells of the cache."""
        import llama_cpp

        return int(llama_cpp.llama_n_ctx(self.ctx))

    @property
    def _memory(self) -> Any:
        import llama_cpp

        return llama_cpp.llama_get_memory(self.ctx)

    def fill(self, n_cell: int) -> None:
        """Fill n_cell cells with random rows, but for the last `n_decode`, which are evaluated.

        Raises BenchError if the cache is not a plain one.
        """
        import llama_cpp

        n_decode = min(self.n_decode, n_cell)
        self.clear()
        if n_cell > n_decode:
            self.decode(1)
            size = llama_cpp.llama_state_seq_get_size(self.ctx, 0)
            one_cell = np.empty(size, np.uint8)
            llama_cpp.llama_state_seq_get_data(self.ctx, _u8_pointer(one_cell), size, 0)
            self.clear()
            try:
                state = random_state(one_cell, n_cell - n_decode)
            except ValueError as error:
                raise BenchError(f"the cache cannot be filled: {error}") from error
            self._set_state(state, n_cell - n_decode)
        self.decode(n_decode)

    def _set_state(self, state: NDArray[np.uint8], n_cell: int) -> None:
        """Restore the state of n_cell cells."""
        import llama_cpp

        if llama_cpp.llama_state_seq_set_data(self.ctx, _u8_pointer(state), state.size, 0) != state.size:
            raise BenchError(f"{n_cell} cells cannot be filled: {native.last_log_error()}")
        self.n_past = n_cell

    def decode(self, n_token: int) -> float:
        """Evaluate random tokens, with the logits of the last one; milliseconds.

        Raises ContextError if no cells are free for them.
        """
        import llama_cpp

        tokens = (ctypes.c_int32 * n_token)(*self._generator.integers(0, self._n_vocab, n_token).tolist())
        batch = llama_cpp.llama_batch_get_one(tokens, n_token)
        native.clear_log_errors()
        begin = self._clock()
        status = llama_cpp.llama_decode(self.ctx, batch)
        llama_cpp.llama_synchronize(self.ctx)
        end = self._clock()
        if status == 1:
            raise ContextError(f"the cache of {self.n_ctx} cells is full: {n_token} more are needed")
        if status != 0:
            raise BenchError(f"llama.cpp failed to evaluate: {native.last_log_error()}")
        self.n_past += n_token
        return 1000 * (end - begin)

    def step(self) -> float:
        """Evaluate one token and forget it again; milliseconds of the evaluation."""
        import llama_cpp

        ms = self.decode(1)
        if not llama_cpp.llama_memory_seq_rm(self._memory, 0, self.n_past - 1, -1):
            raise BenchError("the last cell cannot be removed")
        self.n_past -= 1
        return ms

    def clear(self) -> None:
        """Forget everything."""
        import llama_cpp

        llama_cpp.llama_memory_clear(self._memory, False)
        self.n_past = 0

    def close(self) -> None:
        """Free the context. A second call does nothing."""
        import llama_cpp

        if self.ctx:
            llama_cpp.llama_free(self.ctx)
        self.ctx = None


def _u8_pointer(array: NDArray[np.uint8]) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
