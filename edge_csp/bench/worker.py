"""A process that holds a model and contexts, and does one thing at a time for process.Worker: JSON lines in and out.

A line in is {"do": method of Commands, …arguments}; a line out is {"result": …}, or {"error": text}.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

from edge_csp.bench.runtime import Cache, Model, Setting
from edge_csp.errors import BenchError, EdgeCspError


class Commands:
    """What a worker can do. Caches have names."""

    def __init__(self) -> None:
        self._model: Model | None = None
        self._vision: Any = None  # the same model, as ours
        self._caches: dict[str, Cache] = {}

    def load(
        self, path: str, n_thread: int, n_gpu_layers: int, clock: str = "wall", use_mmap: bool = True
    ) -> dict[str, Any]:
        """Load a model; tells the library."""
        import llama_cpp

        is_ours = hasattr(llama_cpp.llama_cpp._lib, "llama_csp_init")
        settings: dict[str, Any] = {"n_gpu_layers": n_gpu_layers, "use_mmap": use_mmap}
        if is_ours:
            from edge_csp.model import VisionModel

            self._vision = VisionModel(path, n_threads=n_thread, **settings)
            settings["handle"] = self._vision.handle
        self._model = Model(path, n_thread=n_thread, clock=clock, **settings)
        return {
            "llama_cpp": str(llama_cpp.__version__),
            "is_ours": is_ours,
            "system": llama_cpp.llama_print_system_info().decode(),
        }

    def open(
        self, name: str, n_ctx: int, setting: list[Any], n_ubatch: int, records: bool = False, cells: int | None = None
    ) -> int:
        """Make a context, recording its window or not; returns its cells. cells: bound of make_room()."""
        if self._model is None:
            raise BenchError("no model is loaded")
        self.close(name)
        cache: Cache
        if records:
            from edge_csp.bench.pruned import PrunedCache

            cache = PrunedCache(self._vision, self._model, n_ctx, Setting(*setting), n_ubatch=n_ubatch, cells=cells)
        else:
            cache = Cache(self._model, n_ctx, Setting(*setting), n_ubatch=n_ubatch)
        self._caches[name] = cache
        return cache.n_ctx

    def _pruned(self, name: str) -> Any:
        from edge_csp.bench.pruned import PrunedCache

        cache = self._caches[name]
        if not isinstance(cache, PrunedCache):
            raise BenchError(f"context {name} records no window: it cannot evict")
        return cache

    def fill(self, name: str, n_cell: int) -> None:
        self._caches[name].fill(n_cell)

    def decode(self, name: str, n_token: int) -> float:
        return self._caches[name].decode(n_token)

    def step(self, name: str) -> float:
        return self._caches[name].step()

    def evict(self, name: str, n_keep: int, policy: str) -> dict[str, float]:
        """Milliseconds of scores, select and keep."""
        times: dict[str, float] = self._pruned(name).evict(n_keep, policy)
        return times

    def make_room(self, name: str, n_token: int) -> float:
        """Evict so that n_token cells can be filled; milliseconds."""
        return float(self._pruned(name).make_room(n_token))

    def n_batch(self, name: str) -> int:
        """Tokens to evaluate at once in a bounded cache."""
        return int(self._pruned(name).n_batch)

    def clear(self, name: str) -> None:
        self._caches[name].clear()

    def close(self, name: str) -> None:
        """Free a context, if there is one of this name."""
        if cache := self._caches.pop(name, None):
            cache.close()

    def memory(self) -> dict[str, int]:
        """Bytes of this process in memory now, and at most so far."""
        return memory()


def memory() -> dict[str, int]:
    """Resident bytes of this process: now, and the most so far."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            fields = dict(line.split(":", 1) for line in file if ":" in line)
        return {name: 1024 * int(fields[key].split()[0]) for name, key in (("now", "VmRSS"), ("most", "VmHWM"))}
    except OSError:
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return {"now": most, "most": most}


def main() -> None:
    """Serve until stdin ends. Answers go to the stdout that the process began with; libraries cannot write there."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends its workers
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    commands = Commands()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"result": getattr(commands, request.pop("do"))(**request)}
        except EdgeCspError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
