"""What eviction costs: scores, select and keep beside one decode step and a plain memcpy of the moved bytes.

    python tools/bench_evict.py [--json]

The model has the attention of a 7B LLaMA, 32 layers x 32 KV heads x 128 with Q4_0 weights, next to no feed-forward, and
4096 f16 cells. Its weights and the contents of the cache are random. --n-embd 256 leaves next to nothing of a decode
step but the attention over the cells. Needs 8 GB of memory and 1.3 GB in the folder for temporary files.
"""

from __future__ import annotations

import argparse
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

import numpy as np
import numpy.typing as npt

from edge_csp.bench.models import Shape, write_model
from edge_csp.bench.runtime import Cache, Model, Setting
from edge_csp.errors import NativeError
from edge_csp.native import Csp

N_LAYER, N_HEAD, HEAD_DIM = 32, 32, 128  # as many KV heads
N_FF, N_VOCAB = 32, 64
N_KV = N_HEAD * HEAD_DIM
N_WINDOW = 32

Bytes = npt.NDArray[np.uint8]


@dataclass
class Bench:
    """A context filled with n_cell cells, and the measured times."""

    model: Model
    n_cell: int
    flash_attn: bool
    ms: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.cache = Cache(self.model, self.n_cell, Setting(flash_attn=self.flash_attn))
        self.cache.n_decode = N_WINDOW - 1  # so that there is a window
        self.csp = Csp.attach(self.cache.ctx, n_window=N_WINDOW)

    def close(self) -> None:
        self.csp.close()
        self.cache.close()

    def time(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        result = function(*args, **kwargs)
        self.ms.setdefault(name, []).append(1000 * (time.perf_counter() - begin))
        return result

    def run(self, n_repeat: int) -> None:
        n_keep = self.n_cell // 2
        share = (n_keep - N_WINDOW) // 2
        lists = random_lists(self.n_cell, n_keep)
        moved = 2 * 2 * N_LAYER * N_KV * n_keep  # K and V, f16
        source, target = (np.full(moved, i, np.uint8) for i in (1, 2))
        for _ in range(n_repeat):
            self.cache.fill(self.n_cell - 1)
            self.ms.setdefault("decode", []).extend(self.cache.step() for _ in range(3))
            self.cache.decode(1)
            scores = self.time("scores", self.csp.scores, N_WINDOW)
            self.time("select", self.csp.select, scores, k_self=share, k_cross=share, n_recent=N_WINDOW)
            self.time("memcpy", copy, source, target, self.model.n_thread)
            self.time("keep", self.csp.keep, lists)
            self.time("memcpy", copy, source, target, self.model.n_thread)

    def report(self) -> dict[str, Any]:
        median = {name: statistics.median(times) for name, times in self.ms.items()}
        return {
            "n_thread": self.model.n_thread,
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

    shape = Shape("a 7B LLaMA's attention", N_LAYER, options.n_embd, N_FF, N_HEAD, N_HEAD, HEAD_DIM, N_VOCAB, tied=True)
    reports = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_model(path, shape)
        handle = None
        if not options.json:
            sizes = f"{N_LAYER} layers x {N_HEAD} heads x {HEAD_DIM}, {options.cells} cells"
            print(f"{sizes}, on {options.device or 'the CPU'}")
        for flash_attn in (False, True):
            for n_thread in options.threads:
                try:
                    model = Model(path, n_thread=n_thread, n_gpu_layers=0, device=options.device, handle=handle)
                except NativeError as error:
                    raise SystemExit(f"--device: {error}") from None
                handle = model.handle
                bench = Bench(model, options.cells, flash_attn)
                bench.run(options.repeat)
                bench.close()
                reports.append(bench.report())
                if not options.json:
                    print_report(reports[-1])
    if options.json:
        result = {"n_layer": N_LAYER, "n_head_kv": N_HEAD, "head_dim": HEAD_DIM, "n_embd": options.n_embd}
        result |= {"n_cell": options.cells, "n_window": N_WINDOW, "device": options.device or "CPU"}
        json.dump(result | {"runs": reports}, sys.stdout, indent=1)
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
