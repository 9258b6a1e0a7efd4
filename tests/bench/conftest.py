"""The embedded model, and an album drawn for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_csp import VisionModel
from edge_csp.bench.quality.albums import (
    Album,
    draw_album,
)


@pytest.fixture(scope="module")
def model(demo_files: tuple[Path, Path]) -> Iterator[VisionModel]:
    with VisionModel(*demo_files, n_threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def album() -> Album:
    return draw_album(0, 4, 8, seed=1)
