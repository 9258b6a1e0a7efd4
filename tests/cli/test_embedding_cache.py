"""--embedding-cache: what the commands keep on disk, and where."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Cli


def chat(environment: dict[str, str], model: list[str], pictures: list[Path], *options: str, folder: Path) -> str:
    """The rest of /stats about pictures, and what went to stderr."""
    command = [sys.executable, "-m", "edge_csp", "chat", *model[: model.index("--embedding-cache")], *options]
    lines = f"/image {' '.join(repr(str(picture)) for picture in pictures)}\nWhat is in picture 1?\n/stats\n"
    result = subprocess.run(
        command,
        input=lines,
        capture_output=True,
        encoding="utf-8",
        env=environment | {"EDGE_CSP_CACHE_DIR": str(folder)},
        timeout=120,
        check=True,
    )
    found = re.search(r"pictures\s+(\d+ encoded, .*)", result.stdout)
    assert found, result.stdout
    notices = [line for line in result.stderr.splitlines() if "embedding cache" in line]
    return "\n".join([found[1].strip(), *notices])


def test_pictures_are_encoded_once_ever(
    environment: dict[str, str], model: list[str], pictures: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    first, second = "3 encoded, 0 from memory, 0 from disk", "1 encoded, 0 from memory, 2 from disk"
    assert chat(environment, model, pictures[:3], "--embedding-cache", "off", folder=folder) == first
    assert not folder.exists()
    assert chat(environment, model, pictures[:3], folder=folder) == first
    assert chat(environment, model, pictures[1:4], folder=folder) == second
    size = sum(file.stat().st_size for file in (folder / "embeddings").iterdir())
    assert 4 * 64 * 128 * 4 < size < 4 * 64 * 128 * 4 + 1000
    assert chat(environment, model, pictures[4:8], "--embedding-cache", "80KB", folder=folder).startswith("4 encoded")
    assert sum(file.stat().st_size for file in (folder / "embeddings").iterdir()) <= 80_000


def test_a_folder_that_cannot_be_used_is_one_notice(
    environment: dict[str, str], model: list[str], pictures: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"")
    stats, notice = chat(environment, model, pictures[:3], folder=tmp_path / "file").splitlines()
    assert stats == "3 encoded, 0 from memory, 0 from disk"
    assert str(tmp_path / "file") in notice


@pytest.mark.parametrize("size", ["2", "20%", "-1", "", "2 parsecs"])
def test_sizes_that_are_none(cli: Cli, model: list[str], size: str) -> None:
    result = cli("run", "-p", "hi", *model, "--embedding-cache", size)
    assert result.returncode == 1
    assert re.fullmatch(r"edge-csp: error: --embedding-cache .*write 2GiB, 500MB or off\n", result.stderr)
