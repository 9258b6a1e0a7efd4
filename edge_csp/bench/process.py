"""The parent's end of worker.py: start a worker with our library or the unpatched one, and ask it for one thing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import astuple, dataclass
from functools import partial
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any

import edge_csp
from edge_csp.bench.models import BenchModel
from edge_csp.bench.runtime import N_UBATCH, Setting
from edge_csp.errors import BenchError

_BORROW = """
import sys, types
package = types.ModuleType("edge_csp")
package.__path__ = [sys.argv[1]]
sys.modules["edge_csp"] = package
from edge_csp.bench.worker import main
main()
"""
"""Run the worker in a Python that has not edge-csp, without the packages that lie beside edge-csp."""


class Worker:
    """A process with one model. Its methods raise BenchError with the reason if it refuses, or if it died."""

    def __init__(
        self,
        model: BenchModel,
        *,
        n_thread: int,
        n_gpu_layers: int = -1,
        clock: str = "wall",
        python: str | None = None,
        use_mmap: bool = True,
    ) -> None:
        """python: an interpreter with the unpatched llama-cpp-python; default is this one, with ours."""
        self.name = "unpatched" if python else "ours"
        environment = dict(os.environ)
        if python:
            command = [python, "-c", _BORROW, str(Path(edge_csp.__file__).parent)]
            environment.pop("PYTHONPATH", None)
        else:
            command = [sys.executable, "-m", "edge_csp.bench.worker"]
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        try:
            self._process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8"
            )
        except OSError as error:
            raise BenchError(f"{command[0]} cannot be run ({error.strerror or error})") from error
        try:
            library = self.ask(
                "load",
                path=str(model.path),
                n_thread=n_thread,
                n_gpu_layers=n_gpu_layers,
                clock=clock,
                use_mmap=use_mmap,
            )
            self.version, self.system = str(library["llama_cpp"]), str(library["system"])
            if python and library["is_ours"]:
                raise BenchError(f"{python} has the patched llama-cpp-python; an unpatched one was asked for")
        except BaseException:
            self.close()
            raise

    def ask(self, do: str, **arguments: Any) -> Any:
        """Let the worker do something and wait for it, see worker.Commands."""
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise BenchError("the worker has no pipes")
        try:
            stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            status = self._process.wait()
            words = f"killed by {signal.Signals(-status).name}; out of memory?" if status < 0 else f"status {status}"
            raise BenchError(f"the {self.name} worker ended during {do} ({words})")
        answer = json.loads(line)
        if "error" in answer:
            raise BenchError(f"{do} ({self.name}): {answer['error']}")
        return answer["result"]

    def memory(self) -> int:
        """Resident bytes of the worker."""
        return int(self.ask("memory")["now"])

    def close(self) -> None:
        """End the process. A second call does nothing."""
        if self._process.stdin:
            with suppress(BrokenPipeError):  # what a dead worker has not read
                self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._process.kill()
        self.close()


@dataclass(frozen=True)
class Workers:
    """ours: a process with our library. plain: where unpruned contexts live: the unpatched library, or ours too."""

    ours: Worker
    plain: Worker


@contextmanager
def workers(
    model: BenchModel, *, n_thread: int, n_gpu_layers: int = -1, clock: str = "wall", upstream_python: str | None = None
) -> Iterator[Workers]:
    """Processes with the model, with our library and, where there is one, the unpatched one."""
    with ExitStack() as stack:
        start = partial(Worker, model, n_thread=n_thread, n_gpu_layers=n_gpu_layers, clock=clock)
        ours = plain = stack.enter_context(start())
        if upstream_python:
            plain = stack.enter_context(start(python=upstream_python))
        yield Workers(ours, plain)


class RemoteCache:
    """A context in a worker, see runtime.Cache and pruned.PrunedCache."""

    _numbers = count()

    def __init__(
        self,
        worker: Worker,
        n_ctx: int,
        setting: Setting,
        *,
        records: bool = False,
        cells: int | None = None,
        n_ubatch: int = N_UBATCH,
    ) -> None:
        """records: the window is recorded, so that cells can be evicted. cells: bound of make_room()."""
        self._worker, self._name = worker, str(next(self._numbers))
        self.n_ctx: int = self._ask(
            "open", n_ctx=n_ctx, setting=astuple(setting), n_ubatch=n_ubatch, records=records, cells=cells
        )

    def _ask(self, do: str, **arguments: Any) -> Any:
        return self._worker.ask(do, name=self._name, **arguments)

    def fill(self, n_cell: int) -> None:
        self._ask("fill", n_cell=n_cell)

    def decode(self, n_token: int) -> float:
        """Milliseconds to evaluate random tokens."""
        return float(self._ask("decode", n_token=n_token))

    def step(self) -> float:
        """Milliseconds to evaluate one token, which is forgotten again."""
        return float(self._ask("step"))

    def evict(self, n_keep: int, policy: str = "csp") -> dict[str, float]:
        """Milliseconds of scores, select and keep."""
        return dict(self._ask("evict", n_keep=n_keep, policy=policy))

    def make_room(self, n_token: int) -> float:
        """Milliseconds to evict so that n_token cells are free."""
        return float(self._ask("make_room", n_token=n_token))

    @property
    def n_batch(self) -> int:
        """Tokens to evaluate at once in a bounded cache."""
        return int(self._ask("n_batch"))

    def clear(self) -> None:
        self._ask("clear")

    def close(self) -> None:
        """Free it. A second call does nothing."""
        self._ask("close")
