"""A sequence of a llama_context: evaluate tokens and pictures, observe the cells, keep some of them."""

from __future__ import annotations

import copy
import ctypes
import os
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_csp import native
from edge_csp.budget import kv_bytes_per_cell
from edge_csp.errors import ContextError, ModelError, NativeError
from edge_csp.metadata import GgufInfo
from edge_csp.model import PicturePart, VisionModel
from edge_csp.policy import Observation, Span

KV_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "iq4_nl": 20, "bf16": 30}
"""Cache types by their ggml number."""
FLASH_ATTN = {"auto": -1, "off": 0, "on": 1}
CELL_PAD = 256
"""llama.cpp rounds the size of a cache up to a multiple of this."""
OBSERVED_CELLS = 1 << 18
"""Cells of all heads that are observed together: their scores take 3 MiB."""


@dataclass
class _Native:
    """What the sequences of a context share."""

    llama: Any
    csp: native.Csp | None = None


class Context:
    """The KV cache of one conversation. Not thread-safe; close it before its model."""

    def __init__(
        self,
        model: VisionModel,
        *,
        n_ctx: int = 4096,
        n_batch: int = 512,
        n_seq: int = 1,
        type_k: str = "f16",
        type_v: str = "f16",
        flash_attn: str = "auto",
        n_window: int = 32,
        softmax_n: float = 0.0,
        prune: bool = True,
    ) -> None:
        """Allocate a cache of n_ctx cells (0: the context the model was trained on).

        n_batch: tokens evaluated at once. n_seq: conversations that get a cache of n_ctx cells each and share the rest
        of the memory, see `sequences`. flash_attn: "on", "off" or "auto"; "auto" is off where the cache is in host
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
        if not 1 <= n_seq <= llama_cpp.llama_max_parallel_sequences():
            most = llama_cpp.llama_max_parallel_sequences()
            raise ContextError(f"{n_seq} sequences were asked for; a context has 1 to {most}")
        if not model.no_alloc:
            _check_memory(n_ctx * n_seq, self.bytes_per_cell, model.offload_memory)
        self.model = model
        self.n_batch = n_batch
        self.type_k, self.type_v = type_k, type_v
        self.flash_attn = _choose_flash_attn(flash_attn, type_v, model.offloaded)
        self.seq_id = 0
        self.n_seq = n_seq
        self.n_window = 0
        self.n_past = 0
        """Position of the next token."""
        self._kept: NDArray[np.int32] | None = None  # numbers of the tokens in the kept cells, see cell_numbers()

        native.clear_log_errors()
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.kv_unified = n_ctx * n_seq, n_seq, False
        params.n_batch = params.n_ubatch = n_batch
        params.n_threads = params.n_threads_batch = model.n_threads
        params.type_k, params.type_v = KV_TYPES[type_k], KV_TYPES[type_v]
        params.flash_attn_type = FLASH_ATTN[self.flash_attn]
        self._native = _Native(llama_cpp.llama_init_from_model(model.handle, params))
        if not self.handle:
            raise ContextError(
                f"no context of {n_ctx} cells, K {type_k}, V {type_v}, flash attention {self.flash_attn}: "
                f"{native.last_log_error()}"
            )
        self.n_ctx = int(llama_cpp.llama_n_ctx_seq(self.handle))
        self.n_batch = int(llama_cpp.llama_n_batch(self.handle))  # llama.cpp lowers it to n_ctx
        try:
            if prune:
                self.n_window = min(n_window, self.n_ctx)
                self._native.csp = native.Csp.attach(self.handle, n_window=self.n_window)
                if softmax_n:
                    self._native.csp.set_softmax_n(softmax_n)
        except BaseException:
            self.close()
            raise

    @property
    def handle(self) -> Any:
        """The llama_context pointer."""
        return self._native.llama

    @property
    def csp(self) -> native.Csp | None:
        """None where the context was opened without pruning."""
        return self._native.csp

    def sequences(self) -> list[Context]:
        """A context for each of the n_seq sequences, this one first. They are used from one thread, in any order, and
        end with this one. The logits are those of the sequence that was evaluated last.
        """
        others = [copy.copy(self) for _ in range(1, self.n_seq)]
        for seq_id, other in enumerate(others, start=1):
            other.seq_id, other.n_past = seq_id, 0
        return [self, *others]

    @property
    def _memory(self) -> Any:
        import llama_cpp

        return llama_cpp.llama_get_memory(self.handle)

    def decode_tokens(self, tokens: Sequence[int], *, all_logits: bool = False) -> None:
        """Evaluate text tokens, at most n_batch; the logits of the last one can be sampled afterwards. all_logits: of
        every token, for what reads them itself.

        Raises ContextError if no cells are free; nothing has been evaluated then.
        """
        import llama_cpp

        native.clear_log_errors()
        n = len(tokens)
        seq_id = ctypes.pointer(ctypes.c_int32(self.seq_id))
        batch: Any = llama_cpp.llama_batch()
        batch.n_tokens = n
        batch.token = (ctypes.c_int32 * n)(*tokens)
        batch.pos = (ctypes.c_int32 * n)(*range(self.n_past, self.n_past + n))
        batch.n_seq_id = (ctypes.c_int32 * n)(*[1] * n)
        batch.seq_id = (ctypes.POINTER(ctypes.c_int32) * n)(*[seq_id] * n)
        batch.logits = (ctypes.c_int8 * n)(*[int(all_logits)] * (n - 1), 1)
        self._check(llama_cpp.llama_decode(self.handle, batch))
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
                self.model.mtmd_handle, self.handle, part.chunk, data, self.n_past, self.seq_id, n_batch,
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
        return self.csp.info(seq_id=self.seq_id).n_cell if self.csp else self.n_past

    def logits(self) -> NDArray[np.float32] | None:
        """A copy of those after the last token, f32 [n_vocab]; None if there are none, after a picture say."""
        logits = self._logits()
        return None if logits is None else logits.copy()

    def set_logits(self, logits: NDArray[np.float32]) -> None:
        """Put logits() in the place of those after the last token, for what samples next."""
        now = self._logits()
        if now is not None:
            now[:] = logits

    def _logits(self) -> NDArray[np.float32] | None:
        import llama_cpp

        pointer = llama_cpp.llama_get_logits_ith(self.handle, -1)
        return np.ctypeslib.as_array(pointer, (self.model.n_vocab,)) if pointer else None

    @property
    def takes_back(self) -> bool:
        """True if truncate() works behind pruned cells; recurrent states go one way only."""
        import llama_cpp

        model = self.model.handle
        return not (llama_cpp.llama_model_is_recurrent(model) or llama_cpp.llama_model_is_hybrid(model))

    def truncate(self, n_past: int) -> bool:
        """Forget everything from position n_past on. False, and nothing happens, if that cuts into pruned cells."""
        import llama_cpp

        if not llama_cpp.llama_memory_seq_rm(self._memory, self.seq_id, n_past, -1):
            return False
        self.n_past = n_past
        return True

    def clear(self) -> None:
        """Forget everything of this sequence."""
        import llama_cpp

        llama_cpp.llama_memory_seq_rm(self._memory, self.seq_id, -1, -1)
        self.n_past = 0

    @property
    def n_head_kv(self) -> int:
        """KV heads of a layer of the cache."""
        return self._csp().info(seq_id=self.seq_id).n_head_kv

    def layer_groups(self) -> list[range]:
        """Layers to observe together, so that what is observed takes some megabytes, however large the cache is."""
        info = self._csp().info(seq_id=self.seq_id)
        n = max(1, OBSERVED_CELLS // max(1, info.n_head_kv * info.n_cell))
        return [range(i, min(i + n, info.n_layer)) for i in range(0, info.n_layer, n)]

    def observe(
        self,
        layers: range | None = None,
        *,
        needs: Set[str] = frozenset({"scores"}),
        n_obs: int,
        softmax_n: float,
        spans: Sequence[Span] = (),
        **measured: NDArray[np.float32],
    ) -> Observation:
        """The cells of some layers (default: all), and what `needs` names.

        n_obs: queries whose scores are wanted, n_window at most. spans: of the whole conversation. measured: what is
        already known.
        """
        csp = self._csp()
        layers = layers or range(csp.info(seq_id=self.seq_id).n_layer)
        pos, tag = csp.cells(layers=layers, seq_id=self.seq_id)
        if "scores" in needs and "scores" not in measured:
            measured["scores"] = csp.scores(min(n_obs, self.n_window), softmax_n, layers=layers, seq_id=self.seq_id)
        for name in needs & {"key_norm", "value_norm"}:
            measured[name] = csp.norms(name[0], layers=layers, seq_id=self.seq_id)
        if "keys" in needs:
            measured["keys"] = np.stack([self.rows(layer, "k") for layer in layers])
        found: dict[str, Any] = {"first_layer": layers.start, **measured}
        if spans:
            number = self.cell_numbers(layers)
            begins = np.cumsum([0, *(span.n_cell for span in spans[:-1])], dtype=np.int32)
            span = np.searchsorted(begins, number, side="right").astype(np.int32) - np.int32(1)
            found |= {"spans": spans, "span": span, "offset": number - begins[span]}
        return Observation(tag, pos, **found)

    def rows(self, layer: int, kind: str) -> NDArray[np.float32]:
        """K ("k", with the rotation of its positions) or V ("v") of a layer, f32 [n_head_kv, n_cell, head_dim]."""
        info = self.model.info
        head_dim = info.head_dim_k if kind == "k" else info.head_dim_v
        return self._csp().rows(layer, kind, head_dim, seq_id=self.seq_id)

    def set_rows(self, layer: int, kind: str, rows: NDArray[np.float32]) -> None:
        """Write what rows() reads, rounded to the type of the cache."""
        self._csp().set_rows(layer, kind, rows, seq_id=self.seq_id)

    def scores(self, n_query: int, softmax_n: float) -> NDArray[np.float32]:
        """Attention that the cells of all layers got from the last queries (n_window at most), by modality of the
        query, f32 [n_layer, n_head_kv, n_modality, n_cell].
        """
        csp, n_query = self._csp(), min(n_query, self.n_window)
        return np.concatenate(
            [csp.scores(n_query, softmax_n, layers=layers, seq_id=self.seq_id) for layers in self.layer_groups()]
        )

    def mass(self, n_query: int, softmax_n: float) -> NDArray[np.float32]:
        """Attention that the cells got from the last queries (n_window at most), f32 [n_layer, n_head_kv, n_cell]."""
        csp = self._csp()
        n_query = min(n_query, self.n_window)
        groups = [csp.scores(n_query, softmax_n, layers=layers, seq_id=self.seq_id) for layers in self.layer_groups()]
        return np.concatenate([scores.sum(axis=2) for scores in groups])

    def keep(self, cells: NDArray[np.int32]) -> None:
        """Keep cells i32 [n_layer, n_head_kv, n_keep], see native.Csp.keep()."""
        numbers = self.cell_numbers()
        self._csp().keep(cells, seq_id=self.seq_id)
        self._kept = np.take_along_axis(numbers, cells, axis=-1)
        native.trim_heap()

    def cells(self, layers: range | None = None) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """True position i32 and modality u8 of every cell, [n_layer, n_head_kv, n_cell]; `layers`: of these, not of
        all.
        """
        return self._csp().cells(layers=layers, seq_id=self.seq_id)

    def cell_numbers(self, layers: range | None = None) -> NDArray[np.int32]:
        """Which of all tokens and picture cells of the conversation, counted from 0, is in every cell, i32 [n_layer,
        n_head_kv, n_cell]; `layers`: of these, not of all.

        Positions tell the same, but for M-RoPE models, where all cells of a picture have one.
        """
        info = self._csp().info(seq_id=self.seq_id)
        layers = layers or range(info.n_layer)
        shape = len(layers), info.n_head_kv
        if self._kept is None or not info.n_kept:
            return np.broadcast_to(np.arange(info.n_cell, dtype=np.int32), (*shape, info.n_cell))
        begin = int(self._kept[0, 0, -1]) + 1  # the last cell before an eviction is always kept
        new = np.arange(begin, begin + info.n_cell - info.n_kept, dtype=np.int32)
        kept = self._kept[layers.start : layers.stop]
        return np.concatenate([kept, np.broadcast_to(new, (*shape, new.size))], axis=-1)

    def _csp(self) -> native.Csp:
        if self.csp is None:
            raise ModelError(f"{self.model.info.path}: the context was opened without pruning")
        return self.csp

    def close(self) -> None:
        """Free the context, with all sequences. A second call does nothing."""
        import llama_cpp

        if self.csp:
            self.csp.close()
        if self.handle:
            llama_cpp.llama_free(self.handle)
        self._native.csp = self._native.llama = None

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


def _check_memory(n_ctx: int, bytes_per_cell: int, offload_memory: int | None) -> None:
    """A cache beyond all memory would not fail but be killed, when llama.cpp clears it."""
    if offload_memory is None or not hasattr(os, "sysconf"):
        return
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") + offload_memory
    if n_ctx * bytes_per_cell > memory:
        raise ContextError(
            f"a context of {n_ctx} cells takes {n_ctx * bytes_per_cell} bytes of KV cache, but there are "
            f"{memory} bytes of memory: lower the context size (-c)"
        )


def _choose_flash_attn(flash_attn: str, type_v: str, offloaded: bool) -> str:
    if flash_attn != "auto" or offloaded:
        return flash_attn
    return "off" if type_v in ("f32", "f16", "bf16") else "on"
