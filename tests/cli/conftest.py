"""Fixtures of the command-line tests: the real program, in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
Cli = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(autouse=True, scope="session")
def ctrl_c() -> Iterator[None]:
    """Ctrl-C works in the tests and what they start, also where they run in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Nothing from the hub or the home of who runs the tests; text of the same width everywhere."""
    home = tmp_path_factory.mktemp("home")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "EDGE_CSP_", "NO_COLOR"))}
    paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return kept | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUTF8": "1",
        "EDGE_CSP_CACHE_DIR": str(home / "cache"),
        "HF_HOME": str(home / "hub"),
        "HF_HUB_OFFLINE": "1",
        "XDG_DATA_HOME": str(home),
        "COLUMNS": "120",
    }


@pytest.fixture(scope="session")
def cli(environment: dict[str, str]) -> Cli:
    """Run `edge-csp` with arguments and a text on stdin."""

    def run(*arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "edge_csp", *map(str, arguments)]
        return subprocess.run(
            command, input=stdin, capture_output=True, encoding="utf-8", env=environment, timeout=120, check=False
        )

    return run


@pytest.fixture(scope="session")
def model(demo_files: tuple[Path, Path]) -> list[str]:
    """Options: the model to test with, one thread, greedy, short answers, nothing on disk."""
    text, mmproj = map(str, demo_files)
    return ["-m", text, "--mmproj", mmproj, "-t", "1", "--temp", "0", "-n", "8", "--embedding-cache", "off"]


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Eight different pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    paths = [folder / f"picture {number}.png" for number in range(1, 9)]
    for path in paths:
        Image.fromarray(random.integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    return paths
