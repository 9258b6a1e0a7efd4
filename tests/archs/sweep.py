"""All models of upstream's architecture test, examined in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.archs.examine import Outcome
from tests.archs.generate import generate_models

ROOT = Path(__file__).parents[2]
WORKER = [sys.executable, "-m", "tests.archs.examine"]
N_BATCH = 32  # outcomes per process: about three seconds
TIMEOUT = 120


@dataclass(frozen=True)
class Sweep:
    outcomes: list[Outcome]  # of every model without and with flash attention
    left_out: list[str]  # architectures that upstream's test writes no model of

    @property
    def bad(self) -> list[str]:
        """Lines about wrong results and crashes."""
        return [
            f"{outcome.model}, flash attention {'on' if outcome.flash else 'off'}: {outcome.status}, {outcome.reason}"
            for outcome in self.outcomes
            if outcome.status not in ("pruned", "refused")
        ]


def run_sweep() -> Sweep:
    """Write the models (900 MB for a while), examine them, remove them. About half a minute."""
    with tempfile.TemporaryDirectory() as folder:
        models, left_out = generate_models(Path(folder))
        return Sweep(list(examine_all(models)), left_out)


def examine_all(models: list[Path]) -> Iterator[Outcome]:
    """A process that crashes or hangs costs the outcome that it was at; the next process goes on behind it."""
    environment = os.environ | {"GGML_NO_BACKTRACE": "1"}  # written by a debugger, where there is one
    todo = [(path, flash) for path in models for flash in (False, True)]
    while todo:
        batch = todo[:N_BATCH]
        command = [*WORKER, *(f"{path}:{int(flash)}" for path, flash in batch)]
        try:
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=TIMEOUT)
            output, ending = done.stdout, f"exit status {done.returncode}: {_last_line(done.stderr)}"
        except subprocess.TimeoutExpired as error:
            output, ending = error.stdout or b"", f"no end after {TIMEOUT} s"
        outcomes = [Outcome(**json.loads(line)) for line in output.splitlines() if line.startswith(b"{")]
        yield from outcomes
        todo = todo[len(outcomes) :]
        if len(outcomes) < len(batch):
            path, flash = todo.pop(0)
            yield Outcome(path.stem, flash, "", "crashed", ending)


def _last_line(text: bytes) -> str:
    lines = text.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""
