"""What eviction costs: scores, select and keep beside one decode step and a plain memcpy of the moved bytes.

    python tools/bench_evict.py [--device CUDA0] [--json]

The model has the attention of a 7B LLaMA, 32 layers x 32 KV heads x 128 with Q4_0 weights, next to no feed-forward, and
4096 f16 cells. Its weights and the contents of the cache are random. --n-embd 256 leaves next to nothing of a decode
step but the attention over the cells. Needs 8 GB of memory and 1.3 GB in the folder for temporary files. With --device
weights and cache lie on that ggml device; memcpy is the host's all the same.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import numpy.typing as npt

from edge_csp.errors import NativeError
from edge_csp.native import Csp, find_device

N_LAYER, N_HEAD, HEAD_DIM = 32, 32, 128  # as many KV heads
N_FF, N_VOCAB = 32, 64
N_KV = N_HEAD * HEAD_DIM
N_WINDOW = 32
F16 = 1  # ggml_type

Bytes = npt.NDArray[np.uint8]


def write_model(path: Path, n_embd: int) -> None:
    """A llama model without a tokenizer; all layers have the same random weights."""
    generator = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(1 << 17)
    writer.add_block_count(N_LAYER)
    writer.add_embedding_length(n_embd)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(N_HEAD)
    writer.add_head_count_kv(N_HEAD)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(N_VOCAB)
    writer.add_tokenizer_model("none")

    def matrix(n_out: int, n_in: int) -> Bytes:
        """Q4_0: blocks of 32 weights, an f16 scale and 16 bytes."""
        blocks = generator.integers(0, 256, (n_out, n_in // 32, 18), np.uint8)
        blocks[..., :2] = np.array([0.2 / np.sqrt(n_in)], np.float16).view(np.uint8)
        return blocks.reshape(n_out, -1)

    norm = np.ones(n_embd, np.float32)
    layer: dict[str, npt.NDArray[Any]] = {
        "attn_norm.weight": norm,
        "attn_q.weight": matrix(N_KV, n_embd),
        "attn_k.weight": matrix(N_KV, n_embd),
        "attn_v.weight": matrix(N_KV, n_embd),
        "attn_output.weight": matrix(n_embd, N_KV),
        "ffn_norm.weight": norm,
        "ffn_gate.weight": matrix(N_FF, n_embd),
        "ffn_up.weight": matrix(N_FF, n_embd),
        "ffn_down.weight": matrix(n_embd, N_FF),
    }
    tensors = {"token_embd.weight": matrix(N_VOCAB, n_embd), "output_norm.weight": norm}
    tensors |= {f"blk.{il}.{name}": tensor for il in range(N_LAYER) for name, tensor in layer.items()}
    for name, tensor in tensors.items():
        kind = gguf.GGMLQuantizationType.Q4_0 if tensor.dtype == np.uint8 else None
        writer.add_tensor(name, tensor, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def sequence_state(ctx: Any, n_cell: int, v_trans: bool) -> Bytes:
    """As from llama_state_seq_get_data(), n_cell cells with random f16 rows: a full cache without evaluating tokens."""
    start = np.empty(llama_cpp.llama_state_seq_get_size(ctx, 0), np.uint8)
    llama_cpp.llama_state_seq_get_data(ctx, start.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)), start.size, 0)
    cells = np.zeros((n_cell, 3), np.int32)  # position, number of sequences, sequence
    cells[:, 0], cells[:, 1] = np.arange(n_cell), 1
    rows = np.random.default_rng(1).standard_normal((n_cell, N_KV), np.float32).astype(np.float16)
    row_head = np.array([F16, 2 * N_KV, 0], np.uint32)
    column_head = np.array([F16, 2, N_KV], np.uint32)
    v_head = column_head if v_trans else row_head
    parts = [start[:8], np.array([1, n_cell], "u4"), cells, np.array([v_trans, N_LAYER], "u4")]
    parts += [row_head, rows] * N_LAYER + [v_head, rows] * N_LAYER
    state = np.empty(sum(part.nbytes for part in parts), np.uint8)
    end = 0
    for part in parts:
        begin, end = end, end + part.nbytes
        state[begin:end] = part.reshape(-1).view(np.uint8)
    return state


@dataclass
class Bench:
    """A context filled with n_cell cells, and the measured times."""

    model: Any
    n_cell: int
    n_thread: int
    flash_attn: bool
    ms: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = self.n_cell
        params.n_ubatch = 512
        params.n_threads = params.n_threads_batch = self.n_thread
        params.flash_attn_type = int(self.flash_attn)
        params.type_k = params.type_v = F16
        self.ctx = llama_cpp.llama_init_from_model(self.model, params)
        if not self.ctx:
            raise SystemExit("no context: is there enough memory?")
        self.csp = Csp.attach(self.ctx, n_window=N_WINDOW)
        self.state = sequence_state(self.ctx, self.n_cell - N_WINDOW, v_trans=not self.flash_attn)

    def close(self) -> None:
        self.csp.close()
        llama_cpp.llama_free(self.ctx)

    def time(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        result = function(*args, **kwargs)
        self.ms.setdefault(name, []).append(1000 * (time.perf_counter() - begin))
        return result

    def decode(self, n_token: int) -> None:
        tokens = (ctypes.c_int32 * n_token)(*range(n_token))
        if llama_cpp.llama_decode(self.ctx, llama_cpp.llama_batch_get_one(tokens, n_token)) != 0:
            raise SystemExit("llama_decode failed")
        llama_cpp.llama_synchronize(self.ctx)

    def fill(self) -> None:
        """n_cell - 1 cells; the last ones are decoded, so that there is a window."""
        pointer = self.state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.ctx), False)
        if llama_cpp.llama_state_seq_set_data(self.ctx, pointer, self.state.size, 0) != self.state.size:
            raise SystemExit("the state of this llama.cpp has another format")
        self.decode(N_WINDOW - 1)

    def run(self, n_repeat: int) -> None:
        n_keep = self.n_cell // 2
        share = (n_keep - N_WINDOW) // 2
        lists = random_lists(self.n_cell, n_keep)
        moved = 2 * 2 * N_LAYER * N_KV * n_keep  # K and V, f16
        source, target = (np.full(moved, i, np.uint8) for i in (1, 2))
        for _ in range(n_repeat):
            self.fill()
            for _ in range(3):
                self.time("decode", self.decode, 1)
                llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(self.ctx), 0, self.n_cell - 1, -1)
            self.decode(1)
            scores = self.time("scores", self.csp.scores, N_WINDOW)
            self.time("select", self.csp.select, scores, k_self=share, k_cross=share, n_recent=N_WINDOW)
            self.time("memcpy", copy, source, target, self.n_thread)
            self.time("keep", self.csp.keep, lists)
            self.time("memcpy", copy, source, target, self.n_thread)

    def report(self) -> dict[str, Any]:
        median = {name: statistics.median(times) for name, times in self.ms.items()}
        return {
            "n_thread": self.n_thread,
            "flash_attn": self.flash_attn,
            "ms": {name: [min(times), median[name], max(times)] for name, times in self.ms.items()},
            "keep_per_memcpy": median["keep"] / median["memcpy"],
            "scores_per_decode": median["scores"] / median["decode"],
        }


def random_lists(n_cell: int, n_keep: int) -> npt.NDArray[np.int32]:
    """Other cells in every layer and head, the last one in all."""
    order = np.argsort(np.random.default_rng(2).random((N_LAYER, N_HEAD, n_cell - 1), np.float32), axis=-1)
    lists = np.full((N_LAYER, N_HEAD, n_keep), n_cell - 1, np.int32)
    lists[..., :-1] = np.sort(order[..., : n_keep - 1], axis=-1)
    return lists


def copy(source: Bytes, target: Bytes, n_thread: int) -> None:
    parts = list(zip(np.array_split(target, n_thread), np.array_split(source, n_thread), strict=True))
    with ThreadPoolExecutor(n_thread) as pool:  # numpy copies without the interpreter lock
        list(pool.map(lambda part: np.copyto(*part), parts))


def load_model(path: Path, device: str | None) -> Any:
    """On the CPU, or with all layers on the device."""
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0
    if device is not None:
        devices = (ctypes.c_void_p * 2)(find_device(device), None)
        params.devices = ctypes.cast(devices, ctypes.c_void_p)
        params.n_gpu_layers = N_LAYER + 1
    return llama_cpp.llama_model_load_from_file(str(path).encode(), params)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--repeat", type=int, default=5, help="repetitions (default: %(default)s)")
    parser.add_argument(
        "--cells", type=int, default=4096, help="size of the cache, a multiple of 256 (default: %(default)s)"
    )
    parser.add_argument("--n-embd", type=int, default=4096, help="width of the model (default: %(default)s)")
    parser.add_argument("--device", help="ggml device of weights and cache, as CUDA0 (default: the CPU)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads to measure")
    options = parser.parse_args()

    quiet = llama_cpp.llama_log_callback(lambda level, text, user_data: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    reports = []
    if not options.json:
        shape = f"{N_LAYER} layers x {N_HEAD} heads x {HEAD_DIM}, {options.cells} cells"
        print(f"{shape}, on {options.device or 'the CPU'}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_model(path, options.n_embd)
        try:
            model = load_model(path, options.device)
        except NativeError as error:
            raise SystemExit(f"--device: {error}") from None
        for flash_attn in (False, True):
            for n_thread in options.threads:
                bench = Bench(model, options.cells, n_thread, flash_attn)
                bench.run(options.repeat)
                bench.close()
                reports.append(bench.report())
                if not options.json:
                    print_report(reports[-1])
        llama_cpp.llama_model_free(model)
    if options.json:
        settings = {"n_layer": N_LAYER, "n_head_kv": N_HEAD, "head_dim": HEAD_DIM, "n_embd": options.n_embd}
        settings |= {"n_cell": options.cells, "n_window": N_WINDOW, "device": options.device or "CPU"}
        json.dump(settings | {"runs": reports}, sys.stdout, indent=1)
        print()


def print_report(report: dict[str, Any]) -> None:
    print(f"threads {report['n_thread']}, flash attention {'on' if report['flash_attn'] else 'off'}")
    notes = {
        "scores": f"{report['scores_per_decode']:.2f} decode steps (target: at most 3)",
        "keep": f"{report['keep_per_memcpy']:.2f} x memcpy (target: at most 2.5)",
    }
    for name, (low, median, high) in report["ms"].items():
        print(f"  {name:7} {median:8.1f} ms  ({low:.1f} .. {high:.1f})  {notes.get(name, '')}".rstrip(), flush=True)


if __name__ == "__main__":
    main()
