"""Models that several groups of tests use."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def demo_files() -> tuple[Path, Path]:
    """The embedded model and its mmproj."""
    folder = ROOT / "edge_csp" / "demo"
    return folder / "demo-text-f16.gguf", folder / "demo-mmproj-f16.gguf"
