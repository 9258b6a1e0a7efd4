"""`edge-csp bench speed` from end to end on a tiny shape. No times are judged here."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_csp import VisionModel, native
from edge_csp.bench import alternate, models, overhead, report
from edge_csp.bench.process import RemoteCache, Worker
from edge_csp.bench.pruned import PrunedCache
from edge_csp.bench.runtime import SETTINGS, Model, Setting
from edge_csp.cli import main
from edge_csp.errors import BenchError

UPSTREAM_PYTHON = os.environ.get("EDGE_CSP_UPSTREAM_PYTHON")
QUICK = [
    "--cells",
    "256,512",
    "--prefill-tokens",
    "1024",
    "--prefill-cells",
    "512",
    "--memory-cells",
    "512",
    "--repeat",
    "2",
]


@pytest.fixture(autouse=True)
def _short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead, "BLOCK_MS", 1)
    monkeypatch.delenv("EDGE_CSP_UPSTREAM_PYTHON", raising=False)


def speed(*arguments: str, folder: Path) -> dict[str, Any]:
    file = folder / "speed.json"
    assert main(["bench", "speed", *QUICK, "--json", str(file), *arguments]) == 0
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def keys(value: Any) -> Any:
    """The names in a JSON object; lists by their first element, times by name."""
    if isinstance(value, dict):
        if {"median", "ms"} <= value.keys():
            return "times"
        if {"median", "low", "high"} <= value.keys():
            return "ratio"
        return {name: keys(one) for name, one in value.items()}
    if isinstance(value, list):
        return [keys(value[0])] if value else []
    return type(value).__name__


def test_every_section(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = speed("-m", "tiny", folder=tmp_path)
    assert found["schema"] == report.SCHEMA == 2
    (model,) = found["models"]
    names = [str(setting) for setting in SETTINGS]
    point, point_512 = model["decode"]
    assert sorted(point["looked_at"]) == sorted(names)
    assert set(point["unpruned"]) <= set(point["pruned"]) == set(point["small"]) == set(point["bounded"])
    assert "f16, FA off" in point["pruned"]
    assert (point_512["n_cell"], point_512["n_keep"]) == (512, 102)
    shown = keys(
        {**model, "decode": [{**point, "looked_at": {}, "unpruned": {}, "pruned": {}, "bounded": {}, "small": {}}]}
    )
    steps = dict.fromkeys(("scores", "select", "keep", "total"), "times")
    assert shown == {
        "name": "str",
        "deviations": ["str"],
        "cell_bytes": "int",
        "libraries": {"ours": "str", "unpruned": "str", "cpu": "str"},
        "decode": [
            {
                "n_cell": "int",
                "n_keep": "int",
                "looked_at": {},
                "unpruned": {},
                "pruned": {},
                "bounded": {},
                "small": {},
                "left_out": [],
                "best_unpruned": "str",
                "best_pruned": "str",
                "gain": "float",
                "gain_bounded": "float",
                "per_potential": "float",
                "per_potential_bounded": "float",
            }
        ],
        "overhead": {
            "n_cell": "int",
            "n_batch": "int",
            "baseline": "str",
            "decode_recording": "ratio",
            "prefill_recording": "ratio",
            "decode_detached": "NoneType",
            "prefill_detached": "NoneType",
        },
        "prefill": {
            "n_token": "int",
            "cells": "int",
            "setting": "str",
            "looked_at": dict.fromkeys(names, "times"),
            "unbounded": "times",
            "bounded": "times",
            "evicting": "times",
            "unbounded_batches": ["float"],
            "bounded_batches": ["float"],
            "gain": "float",
        },
        "memory": {
            "n_token": "int",
            "cells": "int",
            "n_ubatch": "int",
            "cell_bytes": "int",
            "bounded": "int",
            "bounded_most": "int",
            "plain": "int",
            "unbounded": "int",
            "per_cells": "float",
        },
        "eviction": [
            {
                "n_cell": "int",
                "n_keep": "int",
                "decode": "times",
                "policies": {"blend": steps | {"to_csp": "ratio"}, "csp": steps | {"to_csp": "NoneType"}},
                "decode_steps": {"blend": "float", "csp": "float"},
            }
        ],
        "turns": {"n_cell": "int", "n_keep": "int", "going_on": "times", "again": "times", "share": "float"},
        "picture_turns": "NoneType",
    }
    out = capsys.readouterr().out
    assert all(
        word in out
        for word in ("unpruned f16, FA off", "never more cells", "bounded is faster", "csp takes", "blend, times csp")
    )
    assert f"{point_512['gain']:.2f} x" in out


def test_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """New pictures go through the encoder, known ones do not."""
    found = speed("-m", "demo", "--only", "turns", folder=tmp_path)
    turns = found["models"][0]["picture_turns"]
    assert turns["n_encoded"] == [8, 0, 0]
    assert "encoder runs" in capsys.readouterr().out
    assert found["models"][0]["decode"] == []


def test_pruned_contexts_are_pruned() -> None:
    """An evicted cache reads few cells, decodes at the true positions, and bounded ones hold long prompts."""
    with models.opened("tiny") as model, Worker(model, n_thread=1) as worker:
        cache = RemoteCache(worker, 512, Setting(), records=True)
        cache.fill(512)
        with pytest.raises(BenchError, match="full"):
            cache.step()
        assert set(cache.evict(100, "blend")) == {"scores", "select", "keep"}
        assert cache.step() > 0
        bounded = RemoteCache(worker, 512, Setting(), records=True, cells=512)
        for _ in range(10):
            bounded.make_room(bounded.n_batch)
            bounded.decode(bounded.n_batch)
        plain = RemoteCache(worker, 512, Setting())
        with pytest.raises(BenchError, match="records no window"):
            plain.evict(10)


def test_evictions_are_of_a_conversation_with_pictures() -> None:
    """Spans and tags are those of text and pictures in turns, and policies choose from them what they should."""
    with models.opened("tiny") as model, VisionModel(model.path, n_threads=1) as vision:
        cache = PrunedCache(vision, Model(model.path, handle=vision.handle), 2048, Setting())
        cache.fill(1500)
        cache.decode(5)
        spans = cache._layout().spans
        assert [span.n_cell for span in spans] == [252, 576, 32, 576, 32 + 32 + 5]
        assert [span.is_picture for span in spans] == [False, True, False, True, False]
        _, tags = cache._context.cells()
        is_picture = np.repeat([span.is_picture for span in spans], [span.n_cell for span in spans])
        assert (tags == np.where(is_picture, native.IMAGE, native.TEXT)).all()
        for policy in ("blend", "lookm:merge=average", "csp:n_obs=16"):
            cache.fill(1500)
            before = cache._context.rows(0, "k")
            times = cache.evict(300, policy)
            assert min(times.values()) > 0
            assert cache._context.n_cell == 300
            _, tags = cache._context.cells()
            n_text = int((tags[0, 0] == native.TEXT).sum())
            assert n_text == 300 if policy.startswith("lookm") else 32 < n_text < 250
            rows = before[0, cache._context.cell_numbers()[0, 0]]
            assert np.array_equal(rows, cache._context.rows(0, "k")[0]) == (not policy.startswith("lookm"))
        cache.close()


def test_policies_take_turns(tmp_path: Path) -> None:
    more = "--policy", "h2o", "--policy", "csp:pool=1"
    found = speed("-m", "tiny", "--only", "eviction", *more, folder=tmp_path)
    assert found["settings"]["policies"] == ["h2o", "csp:pool=1"]
    (model,) = found["models"]
    for point in model["eviction"]:
        assert list(point["policies"]) == ["h2o", "csp:pool=1"]
        assert all(len(steps["total"]["ms"]) == 2 for steps in point["policies"].values())
        assert all(steps["to_csp"] is None for steps in point["policies"].values())


def test_a_dead_worker_is_named() -> None:
    with models.opened("tiny") as model, Worker(model, n_thread=1) as worker:
        worker._process.send_signal(signal.SIGKILL)
        with pytest.raises(BenchError, match="SIGKILL; out of memory"):
            worker.ask("memory")


@pytest.mark.skipif(not UPSTREAM_PYTHON, reason="EDGE_CSP_UPSTREAM_PYTHON is not set")
def test_unpatched_library(tmp_path: Path) -> None:
    found = speed("-m", "tiny", "--only", "overhead,decode", "--upstream-python", str(UPSTREAM_PYTHON), folder=tmp_path)
    (model,) = found["models"]
    assert model["libraries"]["unpruned"] == "0.3.36"
    assert model["overhead"]["baseline"] == "unpatched library"
    assert model["overhead"]["decode_detached"]["n_pair"] > 0


def test_patched_python_is_not_unpatched() -> None:
    with models.opened("tiny") as model, pytest.raises(BenchError, match="has the patched"):
        Worker(model, n_thread=1, python=sys.executable)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-m", "70b"], "'70b' is neither a file nor one of the shapes 7b, 3b"),
        (["-m", "tiny", "--layers", "3"], "3 layers were asked for, the shape tiny has 1 to 2"),
        (["--only", "decode,speed"], "section 'speed' is unknown: use decode, overhead"),
        (["--cells", "1000"], "1000 cells cannot be measured: llama.cpp has multiples of 256"),
        (["--cells", "many"], "cells 'many' are not whole numbers"),
        (["--clock", "sun"], "clock 'sun' is unknown: use wall or cpu"),
        (["--clock", "cpu", "-t", "2"], "it needs one thread, not 2"),
        (["--budget", "0"], "keeps nothing"),
        (["--policy", "nonsense"], "nonsense"),
        (["--policy", "csp", "--policy", "csp"], "policy csp is there twice"),
        (["--policy", "downsample"], "downsample evicts nothing"),
        (["--policy", "full"], "full evicts nothing"),
        (["-m", "tiny", "--upstream-python", "/nowhere/python"], "/nowhere/python cannot be run"),
    ],
)
def test_errors(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "speed", *arguments]) == 1
    err = capsys.readouterr().err
    assert words in err
    assert "unexpected" not in err


def test_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "can_plot", lambda: False)
    speed("-m", "tiny", "--only", "eviction", "--plot", str(tmp_path / "speed.png"), folder=tmp_path)
    assert "no plot: matplotlib is not installed" in capsys.readouterr().err
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    speed("-m", "tiny", "--only", "decode,prefill", "--plot", str(tmp_path / "speed.png"), folder=tmp_path)
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_paired_ratio() -> None:
    """Drift that meets both variants alike does not matter; other blocks than pairs make the interval wide."""
    base = np.linspace(1, 5, 40)
    same = alternate.paired_ratio([[(float(ms), float(1.02 * ms)) for ms in base]] * 3)
    assert same.n_pair == 120
    assert np.allclose([same.median, same.low, same.high], 1.02)
    apart = alternate.paired_ratio([[(1.0, ratio)] * 20 for ratio in (0.9, 1.0, 1.1)])
    assert (apart.low, apart.median, apart.high) == (0.9, 1.0, 1.1)


def test_layers_scale_the_vocabulary() -> None:
    with models.opened("135m", 3) as model:
        assert (model.info.n_layer, model.info.n_vocab) == (3, 4896)
        assert "scaled: 3 of 30 layers, 4896 of 49152 tokens in the vocabulary" in model.deviations


def test_what_does_not_fit_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alternate, "free_memory", lambda: 512 * 256)  # 512 cells of f16
    found = speed("-m", "tiny", "--only", "decode,eviction,prefill,memory", folder=tmp_path)
    (model,) = found["models"]
    assert [point["n_cell"] for point in model["decode"]] == [256, 512]
    assert any(line.startswith("f16, FA off: 512 cells x 256 bytes") for line in model["decode"][1]["left_out"])
    assert [point["n_cell"] for point in model["eviction"]] == [256]
    assert model["memory"]["unbounded"] is None
    assert "512 cells x 256 bytes = 0.0 GiB, free are 0.0 GiB" in capsys.readouterr().err
