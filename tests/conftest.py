"""Models that several groups of tests use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def demo_files() -> tuple[Path, Path]:
    """The embedded model and its mmproj."""
    folder = ROOT / "edge_csp" / "demo"
    return folder / "demo-text-f16.gguf", folder / "demo-mmproj-f16.gguf"


@pytest.fixture(autouse=True, scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Nothing that is tested writes into the cache folder of who runs the tests."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGE_CSP_CACHE_DIR", str(folder))
        yield folder
