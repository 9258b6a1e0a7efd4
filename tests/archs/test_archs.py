"""Every architecture is pruned correctly or refused with a reason, as docs/architectures.md says."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_csp.errors import NativeError
from edge_csp.native import TEXT, Csp
from tests.archs import sweep
from tests.archs.examine import BATCHES, Outcome, examine
from tests.archs.generate import CannotGenerate
from tests.oracle.random_models import make_model
from tools import write_arch_table


@pytest.fixture(scope="module")
def swept() -> sweep.Sweep:
    try:
        return sweep.run_sweep()
    except CannotGenerate as error:
        pytest.skip(str(error))


def test_no_wrong_result_and_no_crash(swept: sweep.Sweep) -> None:
    assert len(swept.outcomes) > 200
    assert swept.bad == []


def test_docs_are_up_to_date(swept: sweep.Sweep) -> None:
    written = write_arch_table.TARGET.read_text(encoding="utf-8")
    assert written == write_arch_table.text(swept), "run python -m tools.write_arch_table"


# --- the sweep itself: it must be able to fail ---


def test_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "c++"))
    with pytest.raises(CannotGenerate, match="no C\\+\\+ compiler"):
        sweep.run_sweep()
    monkeypatch.setenv("CXX", sys.executable)
    monkeypatch.delenv("EDGE_CSP_UPSTREAM", raising=False)
    with pytest.raises(CannotGenerate, match="EDGE_CSP_UPSTREAM"):
        sweep.run_sweep()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "llama-dense.gguf", "llama")


def other_cells(method: Callable[..., Any], csp: Csp, cells: np.ndarray) -> None:
    if cells.shape[2] < csp.info().n_cell:
        cells = cells.copy()
        row = cells[1, 1]
        row[:-1] = np.setdiff1d(np.arange(row[-1]), row[1:])[: len(row) - 1]  # of one head only
    method(csp, cells)


def one_cell_less(method: Callable[..., Any], csp: Csp, cells: np.ndarray) -> None:
    method(csp, cells[..., 1:])


def scores_of_ordinary_rows(method: Callable[..., Any], csp: Csp, n_obs: int, softmax_n: float) -> np.ndarray:
    return method(csp, n_obs, softmax_n + 0.01)


def scores_of_swapped_tags(method: Callable[..., Any], csp: Csp, n_obs: int, softmax_n: float) -> np.ndarray:
    return method(csp, n_obs, softmax_n)[:, :, [1, 0, 2]]


@pytest.mark.parametrize("flash", [False, True])
def test_pruned(llama: Path, flash: bool) -> None:
    assert examine(llama, flash) == Outcome("llama-dense", flash, "kv_cache", "pruned")


@pytest.mark.parametrize("flash", [False, True])
def test_windows_that_have_wrapped(tmp_path: Path, flash: bool) -> None:
    """More tokens than the sliding-window cache has cells (256): the models of the sweep are not trained on so many."""
    path = make_model(tmp_path / "gpt-oss-moe.gguf", "gpt-oss", n_layer=2)
    outcome = examine(path, flash, [(TEXT, 110), (TEXT, 110), (TEXT, 110), *BATCHES])
    assert outcome == Outcome("gpt-oss-moe", flash, "kv_cache_iswa", "pruned")


@pytest.mark.parametrize(
    ("name", "replacement", "reason"),
    [
        ("keep", other_cells, "keep of a subset: "),
        ("keep", one_cell_less, "keep of all cells: "),
        ("scores", scores_of_ordinary_rows, "scores: "),
        ("scores", scores_of_swapped_tags, "scores: "),
    ],
)
def test_wrong_results_are_found(
    llama: Path, monkeypatch: pytest.MonkeyPatch, name: str, replacement: Callable[..., Any], reason: str
) -> None:
    method = getattr(Csp, name)
    monkeypatch.setattr(Csp, name, lambda csp, *args: replacement(method, csp, *args))
    outcome = examine(llama, False)
    assert outcome.status == "wrong"
    assert outcome.reason.startswith(reason)


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (NativeError("this model or context cannot be pruned: ALiBi", status=-2), "refused", "ALiBi"),
        (NativeError("this model or context cannot be pruned: ", status=-2), "wrong", "refused without a reason"),
        (NativeError("no memory", status=-4), "wrong", "attach fails with status -4: no memory"),
    ],
)
def test_refusals_need_a_reason(
    llama: Path, monkeypatch: pytest.MonkeyPatch, error: NativeError, status: str, reason: str
) -> None:
    def refuse(*_args: Any, **_settings: Any) -> Csp:
        raise error

    monkeypatch.setattr(Csp, "attach", refuse)
    outcome = examine(llama, False)
    assert outcome.status == status
    assert outcome.reason.startswith(reason)


ABORTING = """
import os, sys
for name in sys.argv[1:]:
    if name == "b:1":
        sys.exit("GGML_ASSERT(false) failed")
    print('{"model": "%s", "flash": %s, "memory": "", "status": "pruned", "reason": ""}' %
          (name[:-2], "true" if name[-1] == "1" else "false"), flush=True)
"""


def test_a_crash_costs_one_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "WORKER", [sys.executable, "-c", ABORTING])
    outcomes = list(sweep.examine_all([Path("a"), Path("b"), Path("c")]))
    assert [(outcome.model, outcome.flash) for outcome in outcomes] == [(m, f) for m in "abc" for f in (False, True)]
    crashed = Outcome("b", True, "", "crashed", "exit status 1: GGML_ASSERT(false) failed")
    assert [outcome for outcome in outcomes if outcome.status != "pruned"] == [crashed]
    assert sweep.Sweep(outcomes, []).bad == ["b, flash attention on: crashed, exit status 1: GGML_ASSERT(false) failed"]
