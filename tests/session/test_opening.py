"""A model whose cache cannot be pruned runs as it does without us, unless pruning is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edge_csp import open_session
from edge_csp.errors import NativeError, PolicyError
from tests.oracle.random_models import make_model


@pytest.fixture(scope="module")
def mamba(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "mamba.gguf", "mamba", n_layer=2)


def test_it_runs_unpruned(mamba: Path) -> None:
    notices: list[str] = []
    with open_session(mamba, on_notice=notices.append) as session:
        assert session.context.csp is None
        session.context.decode_tokens([1, 2, 3])
        assert session.context.n_past == 3
    assert len(notices) == 1
    assert "the model's memory holds no KV cache" in notices[0]
    assert "runs unpruned" in notices[0]


@pytest.mark.parametrize("asked", [{"budget": "20%"}, {"cells": "64"}, {"softmax_n": 1.0}])
def test_what_is_asked_for_is_refused(mamba: Path, asked: dict[str, Any]) -> None:
    with pytest.raises(NativeError, match="holds no KV cache"), open_session(mamba, **asked):
        pass


def test_a_rehearsal_needs_a_cache_that_takes_things_back(tmp_path: Path) -> None:
    hybrid = make_model(tmp_path / "lfm2.gguf", "lfm2", n_layer=4)
    with (
        pytest.raises(PolicyError, match=r"rehearses, .* cache of .*lfm2\.gguf"),
        open_session(hybrid, policy="blend+"),
    ):
        pass
    with open_session(hybrid) as session:
        assert session.context.csp is not None
