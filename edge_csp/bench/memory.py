"""Memory of a process that reads a long prompt in a bounded cache, beside caches that hold all of it, or never more."""

from __future__ import annotations

from dataclasses import dataclass

from edge_csp.bench.alternate import does_not_fit
from edge_csp.bench.decode import bytes_per_cell
from edge_csp.bench.models import BenchModel
from edge_csp.bench.prefill import fill_bounded
from edge_csp.bench.process import RemoteCache, Worker
from edge_csp.bench.runtime import Setting


@dataclass(frozen=True)
class Memory:
    """Bytes by which a fresh process grows, from the loaded and used model on.

    bounded: a prompt of n_token tokens in `cells` cells; most: at the highest. plain: a cache of `cells` cells without
    csp, filled once. unbounded: a cache of n_token cells is made, None where it does not fit. cell_bytes: of one cell.
    Growth is more than the cells: buffers for what a batch computes, windows, scores.
    """

    n_token: int
    cells: int
    n_ubatch: int
    cell_bytes: int
    bounded: int
    bounded_most: int
    plain: int
    unbounded: int | None

    @property
    def per_cells(self) -> float:
        """Growth of the bounded process in bytes of its cells."""
        return self.bounded / (self.cells * self.cell_bytes)


def measure_memory(
    model: BenchModel, n_token: int, cells: int, *, n_thread: int, n_gpu_layers: int, n_ubatch: int
) -> Memory:
    """Every variant in a process of its own, which reads the weights into memory first."""

    def process() -> Worker:
        worker = Worker(model, n_thread=n_thread, n_gpu_layers=n_gpu_layers, use_mmap=False)
        first = RemoteCache(worker, 256, Setting())
        first.decode(32)
        first.close()
        return worker

    with process() as worker:
        before = worker.memory()
        cache = RemoteCache(worker, cells, Setting(), records=True, cells=cells, n_ubatch=n_ubatch)
        fill_bounded(cache, n_token)
        bounded = worker.memory() - before
        bounded_most = int(worker.ask("memory")["most"]) - before
    with process() as worker:
        before = worker.memory()
        cache = RemoteCache(worker, cells, Setting(), n_ubatch=n_ubatch)
        for begin in range(0, cells, n_ubatch):
            cache.decode(min(n_ubatch, cells - begin))
        plain = worker.memory() - before
    cell_bytes, unbounded = bytes_per_cell(model, Setting()), None
    with process() as worker:
        before = worker.memory()
        if not does_not_fit(n_token, cell_bytes):
            RemoteCache(worker, n_token, Setting(), n_ubatch=n_ubatch)
            unbounded = worker.memory() - before
    return Memory(n_token, cells, n_ubatch, cell_bytes, bounded, bounded_most, plain, unbounded)
