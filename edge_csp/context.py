"""A llama_context with one sequence: evaluate tokens and pictures, observe the cells, keep some of them."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_csp import native
from edge_csp.budget import kv_bytes_per_cell
from edge_csp.errors import ContextError, ModelError, NativeError
from edge_csp.metadata import GgufInfo
from edge_csp.model import PicturePart, VisionModel
from edge_csp.policy import Observation

KV_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "iq4_nl": 20, "bf16": 30}
"""Cache types by their ggml number."""
FLASH_ATTN = {"auto": -1, "off": 0, "on": 1}
CELL_PAD = 256
"""llama.cpp rounds the size of a cache up to a multiple of this."""


class Context:
    """The KV cache of one conversation. Not thread-safe; close it before its model."""

    def __init__(
        self,
        model: VisionModel,
        *,
        n_ctx: int = 4096,
        n_batch: int = 512,
        type_k: str = "f16",
        type_v: str = "f16",
        flash_attn: str = "auto",
        n_window: int = 32,
        softmax_n: float = 0.0,
        prune: bool = True,
    ) -> None:
        """Allocate a cache of n_ctx cells (0: the context the model was trained on).

        n_batch: tokens evaluated at once. flash_attn: "on", "off" or "auto"; "auto" is off where the cache is in host
        memory and of a plain type, because llama.cpp is faster without it there. n_window: queries that vote.
        softmax_n: n of the softmax in attention itself. prune: False leaves the context as upstream makes it.

        Raises NativeError if the model's cache cannot be pruned, ContextError if n_ctx is too small or too large for
        the memory of the machine.
        """
        import llama_cpp

        n_ctx = n_ctx or model.info.n_ctx_train
        if n_ctx < 1:
            raise ContextError(f"context size is {n_ctx} cells; it must be at least 1, or 0 for the trained size")
        for name, value, known in (("K", type_k, KV_TYPES), ("V", type_v, KV_TYPES), ("", flash_attn, FLASH_ATTN)):
            if value not in known:
                what = f"{name} cache type" if name else "flash attention"
                raise ContextError(f"{what} {value!r} is unknown: use {', '.join(known)}")
        self.bytes_per_cell = bytes_per_cell(model.info, type_k, type_v)
        """Bytes of K and V that one cell takes."""
        _check_memory(n_ctx, self.bytes_per_cell)
        self.model = model
        self.n_batch = n_batch
        self.type_k, self.type_v = type_k, type_v
        self.flash_attn = _choose_flash_attn(flash_attn, type_v)
        self.csp: native.Csp | None = None
        self.n_window = 0
        self.n_past = 0
        """Position of the next token."""

        native.clear_log_errors()
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = n_ctx, n_batch, n_batch, 1
        params.n_threads = params.n_threads_batch = model.n_threads
        params.type_k, params.type_v = KV_TYPES[type_k], KV_TYPES[type_v]
        params.flash_attn_type = FLASH_ATTN[self.flash_attn]
        self._llama: Any = llama_cpp.llama_init_from_model(model.handle, params)
        if not self._llama:
            raise ContextError(
                f"no context of {n_ctx} cells, K {type_k}, V {type_v}, flash attention {self.flash_attn}: "
                f"{native.last_log_error()}"
            )
        self.n_ctx = int(llama_cpp.llama_n_ctx(self._llama))
        self.n_batch = int(llama_cpp.llama_n_batch(self._llama))  # llama.cpp lowers it to n_ctx
        try:
            if prune:
                self.n_window = min(n_window, self.n_ctx)
                self.csp = native.Csp.attach(self._llama, n_window=self.n_window)
                if softmax_n:
                    self.csp.set_softmax_n(softmax_n)
        except BaseException:
            self.close()
            raise

    @property
    def handle(self) -> Any:
        """The llama_context pointer."""
        return self._llama

    @property
    def _memory(self) -> Any:
        import llama_cpp

        return llama_cpp.llama_get_memory(self._llama)

    def decode_tokens(self, tokens: Sequence[int]) -> None:
        """Evaluate text tokens, at most n_batch; the logits of the last one can be sampled afterwards.

        Raises ContextError if no cells are free; nothing has been evaluated then.
        """
        import llama_cpp

        native.clear_log_errors()
        n = len(tokens)
        seq_id = ctypes.pointer(ctypes.c_int32(0))
        batch: Any = llama_cpp.llama_batch()
        batch.n_tokens = n
        batch.token = (ctypes.c_int32 * n)(*tokens)
        batch.pos = (ctypes.c_int32 * n)(*range(self.n_past, self.n_past + n))
        batch.n_seq_id = (ctypes.c_int32 * n)(*[1] * n)
        batch.seq_id = (ctypes.POINTER(ctypes.c_int32) * n)(*[seq_id] * n)
        batch.logits = (ctypes.c_int8 * n)(*[0] * (n - 1), 1)
        self._check(llama_cpp.llama_decode(self._llama, batch))
        self.n_past += n

    def decode_picture(
        self,
        part: PicturePart,
        embeddings: NDArray[np.float32],
        *,
        n_batch: int | None = None,
        before_batch: Callable[[int], None] | None = None,
    ) -> None:
        """Evaluate the embeddings of a picture, f32 [n_cell, n_embd_inp], as VisionModel.encode() makes them.

        n_batch: cells evaluated at once; default that of the context, also for pictures that are read in both
        directions. before_batch: called with the number of cells that are about to be filled.

        Raises ContextError if no cells are free, and what before_batch raises. Nothing has been evaluated then; where
        before_batch has evicted cells in the midst of the picture, the context is empty.
        """
        from llama_cpp import mtmd_cpp

        data = embeddings.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        n_past = ctypes.c_int32()
        if n_batch is None or mtmd_cpp.mtmd_decode_use_non_causal(self.model.mtmd_handle, part.chunk):
            n_batch = self.n_batch
        batches = iter([min(n_batch, part.n_cell - done) for done in range(0, part.n_cell, n_batch)])
        failed: list[BaseException] = []  # exceptions cannot pass through C

        def prepare_batch(*_: Any) -> int:
            try:
                if before_batch and (n := next(batches, 0)):
                    before_batch(n)
            except BaseException as error:
                failed.append(error)
            return len(failed)

        after_batch = mtmd_cpp.mtmd_helper_post_decode_callback(prepare_batch)
        native.clear_log_errors()
        try:
            status = prepare_batch() or mtmd_cpp.mtmd_helper_decode_image_chunk(
                self.model.mtmd_handle, self._llama, part.chunk, data, self.n_past, 0, n_batch,
                ctypes.byref(n_past), after_batch, None,
            )  # fmt: skip
            if failed:
                raise failed[0]
            self._check(status)
        except BaseException:
            if not self.truncate(self.n_past):
                self.clear()
            raise
        self.n_past += part.n_pos

    def _check(self, status: int) -> None:
        if status == 1:
            raise ContextError(f"the cache is full: {self.n_ctx} cells")
        if status != 0:
            raise NativeError(f"llama.cpp failed to evaluate: {native.last_log_error()}", status=status)

    @property
    def n_cell(self) -> int:
        """Cells in use; without pruning, an upper bound (positions)."""
        return self.csp.info().n_cell if self.csp else self.n_past

    def truncate(self, n_past: int) -> bool:
        """Forget everything from position n_past on. False, and nothing happens, if that cuts into pruned cells."""
        import llama_cpp

        if not llama_cpp.llama_memory_seq_rm(self._memory, 0, n_past, -1):
            return False
        self.n_past = n_past
        return True

    def clear(self) -> None:
        """Forget everything."""
        import llama_cpp

        llama_cpp.llama_memory_clear(self._memory, False)
        self.n_past = 0

    def observe(self, *, n_obs: int, softmax_n: float, with_scores: bool = True) -> Observation:
        """What the last n_obs queries looked at (n_window at most); `with_scores=False` gives zeros at no cost."""
        csp = self._csp()
        pos, tag = csp.cells()
        if with_scores:
            scores = csp.scores(min(n_obs, self.n_window), softmax_n)
        else:
            n_modality = csp.info().n_modality
            n_layer, n_head_kv, n_cell = tag.shape
            scores = np.zeros((n_layer, n_head_kv, n_modality, n_cell), np.float32)
        return Observation(scores, tag, pos)

    def keep(self, cells: NDArray[np.int32]) -> None:
        """Keep cells i32 [n_layer, n_head_kv, n_keep], see native.Csp.keep()."""
        self._csp().keep(cells)

    def cells(self) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """True position i32 and modality u8 of every cell, [n_layer, n_head_kv, n_cell]."""
        return self._csp().cells()

    def _csp(self) -> native.Csp:
        if self.csp is None:
            raise ModelError(f"{self.model.info.path}: the context was opened without pruning")
        return self.csp

    def close(self) -> None:
        """Free the context. A second call does nothing."""
        import llama_cpp

        if self.csp:
            self.csp.close()
        if self._llama:
            llama_cpp.llama_free(self._llama)
        self.csp = self._llama = None

    def __enter__(self) -> Context:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def bytes_per_cell(info: GgufInfo, type_k: str = "f16", type_v: str = "f16") -> int:
    """Bytes of K and V that one cell of a text model takes.

    Raises BudgetError for cache types that are unknown or do not fit the heads.
    """
    return kv_bytes_per_cell(info.n_layer, info.n_head_kv, info.head_dim_k, info.head_dim_v, type_k, type_v)


def _check_memory(n_ctx: int, bytes_per_cell: int) -> None:
    """A cache beyond the memory of the machine would not fail but be killed, when llama.cpp clears it."""
    if native.has_gpu() or not hasattr(os, "sysconf"):
        return
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if n_ctx * bytes_per_cell > memory:
        raise ContextError(
            f"a context of {n_ctx} cells takes {n_ctx * bytes_per_cell} bytes of KV cache, but the machine has "
            f"{memory} bytes of memory: lower the context size (-c)"
        )


def _choose_flash_attn(flash_attn: str, type_v: str) -> str:
    if flash_attn != "auto" or native.has_gpu():
        return flash_attn
    return "off" if type_v in ("f32", "f16", "bf16") else "on"
