"""Models that several groups of tests use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).parent.parent

# examples are the same in every run; HYPOTHESIS_PROFILE=long: many, at random; short: few, where all is slow
settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("short", max_examples=20, derandomize=True, deadline=None)
settings.register_profile("long", max_examples=2000, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


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
