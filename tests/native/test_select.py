"""llama_csp_select is edge_csp.policy's CSP, cell for cell, and what the released code picks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_csp.errors import NativeError
from edge_csp.native import Csp
from edge_csp.policy import CspPolicy, Observation, kernels
from tests.oracle.random_models import make_model
from tests.oracle.runtime import Runtime
from tests.policy.test_csp import RECORDS, observation_of

N_CELL = 40
ODD = np.array([0, -0.0, 1e-45, 1e-38, 3e38, np.inf, -1, -np.inf, np.nan, 1, np.nextafter(np.float32(1), 2)], "f4")


@dataclass
class Cells:
    csp: Csp
    pos: npt.NDArray[np.int32]
    tag: npt.NDArray[np.uint8]


@pytest.fixture(scope="module", params=["whole", "pruned"])
def cells(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cells]:
    """40 cells of three modalities; pruned: every head has its own tags."""
    with Runtime(make_model(tmp_path_factory.mktemp("select") / "model.gguf", "llama", n_layer=2)) as runtime:
        csp = Csp.attach(runtime.ctx, n_modality=3)
        generator = np.random.default_rng(1)
        while runtime.n_past < (N_CELL if request.param == "whole" else 2 * N_CELL):
            csp.set_modality(int(generator.integers(3)))
            runtime.decode(generator.integers(0, 96, 5))
        if request.param == "pruned":
            order = np.argsort(generator.random((2, 2, 2 * N_CELL - 1)), axis=-1)[..., : N_CELL - 6]
            last = np.full((2, 2, 1), 2 * N_CELL - 1)
            csp.keep(np.sort(np.concatenate([order, last], axis=-1)).astype(np.int32))
            csp.set_modality(1)
            runtime.decode([1, 2, 3, 4, 5])
        yield Cells(csp, *csp.cells())
        csp.close()


@st.composite
def scores_of(draw: st.DrawFn) -> npt.NDArray[np.float32]:
    """[2, 2, 3, N_CELL]: ties, zeros, and what no score should be."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = (2, 2, 3, N_CELL)
    kind = draw(st.sampled_from(["ties", "sparse", "smooth", "odd"]))
    if kind == "odd":
        return generator.choice(ODD, shape)
    levels = {"ties": 3, "sparse": 2, "smooth": 1 << 20}[kind]
    density = 0.1 if kind == "sparse" else 0.8
    return (generator.integers(1, levels, shape) * (generator.random(shape) < density) / 7).astype(np.float32)


@settings(max_examples=300, deadline=None)
@given(
    scores=scores_of(),
    k_self=st.integers(0, 30),
    k_cross=st.integers(0, 30),
    n_recent=st.integers(1, 12),
    n_sink=st.integers(0, 4),
    pin=st.none() | st.integers(0, 2**32),
)
def test_equals_python(
    cells: Cells,
    scores: npt.NDArray[np.float32],
    k_self: int,
    k_cross: int,
    n_recent: int,
    n_sink: int,
    pin: int | None,
) -> None:
    shape = (2, 2, N_CELL)
    pinned = None if pin is None else np.random.default_rng(pin).random(shape) < 0.1
    protected = np.zeros(shape, np.bool_) if pinned is None else pinned.copy()
    protected[..., :n_sink] = protected[..., N_CELL - n_recent :] = True
    n_keep = min(N_CELL, k_self + k_cross + n_recent)
    arguments = {"k_self": k_self, "k_cross": k_cross, "n_recent": n_recent, "n_sink": n_sink, "pinned": pinned}
    if protected.sum(axis=-1).max() > n_keep:
        with pytest.raises(NativeError, match="recent, sink and pinned cells, but a budget of"):
            cells.csp.select(scores, **arguments)
        return
    observation = Observation(cells.tag, cells.pos, scores=scores)
    with np.errstate(over="ignore", invalid="ignore"):  # inf - inf, on purpose
        own, cross = observation.score_self, observation.score_cross
    keep = kernels.csp_select(own, cross, protected, k_self, k_cross, n_keep)
    assert np.array_equal(cells.csp.select(scores, **arguments), np.nonzero(keep)[-1].reshape(2, 2, n_keep))


@pytest.mark.parametrize("cross_ratio", [0, 0.1, 0.5, 0.9, 1])
def test_equals_the_policy(cells: Cells, cross_ratio: float) -> None:
    scores = np.random.default_rng(3).random((2, 2, 3, N_CELL), np.float32)
    policy = CspPolicy(cross_ratio, pool=1)
    protected = np.zeros((2, 2, N_CELL), np.bool_)
    protected[..., :2] = protected[..., -5:] = True
    k_self, k_cross = policy.shares(20 - 5)
    chosen = cells.csp.select(scores, k_self=k_self, k_cross=k_cross, n_recent=5, n_sink=2)
    assert np.array_equal(chosen, policy.select(Observation(cells.tag, cells.pos, scores=scores), 20, protected))


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: f"{path.parts[-3]}-{path.stem}")
def test_picks_of_the_released_code(tmp_path: Path, path: Path) -> None:
    """A model of one layer with as many KV heads as were recorded, and a cache with the recorded modalities."""
    with np.load(path) as file:
        record = dict(file)
    observation = observation_of(record)
    _, n_head, n_cell = observation.shape
    recent, k_self, k_cross = (int(record[name]) for name in ("n_recent", "k_self", "k_cross"))
    model = make_model(tmp_path / "model.gguf", "llama", n_layer=1, n_head=n_head, n_head_kv=n_head, head_dim=16)
    with Runtime(model, n_ctx=-(-n_cell // 256) * 256, n_ubatch=512) as runtime:
        csp = Csp.attach(runtime.ctx, n_modality=2)
        modality = record["modality"].astype(int)
        for run in np.split(modality, np.flatnonzero(np.diff(modality)) + 1):
            csp.set_modality(int(run[0]))
            runtime.decode(np.zeros(len(run)))
        assert np.array_equal(csp.cells()[1], observation.tag)
        chosen = csp.select(observation.scores, k_self=k_self, k_cross=k_cross, n_recent=recent)
        csp.close()
    assert chosen.shape == (1, n_head, k_self + k_cross + recent)
    own, cross = observation.score_self[0], observation.score_cross[0]
    n_past = n_cell - recent
    for head in range(n_head):
        picked = [
            [cell for cell in record[name][head].tolist() if score[head, cell] > 0]
            for name, score in (("kept_self", own), ("kept_cross", cross))
        ]
        past = {*chosen[0, head, : k_self + k_cross].tolist()}
        assert len(past) == k_self + k_cross
        assert chosen[0, head, k_self + k_cross :].tolist() == [*range(n_past, n_cell)]
        assert {*picked[0], *picked[1]} <= past
        if not {*picked[0]} & {*picked[1]}:
            assert past == {*picked[0], *picked[1]}
