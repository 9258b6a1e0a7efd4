"""Off means off: without a csp the logits are those of the unpatched library, bit for bit.

EDGE_CSP_UPSTREAM_PYTHON names an interpreter with the unpatched llama-cpp-python 0.3.36, built with the same options.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from edge_csp.native import Csp
from tests.native import dump_logits
from tests.native.conftest import MODELS, Open
from tests.oracle.random_models import make_model
from tests.oracle.runtime import Runtime

ALL_MODELS = MODELS | {
    "windows": {"arch": "gemma3", "n_layer": 6},
    "sinks": {"arch": "gpt-oss"},
    "hybrid": {"arch": "lfm2"},
}
UPSTREAM_PYTHON = os.environ.get("EDGE_CSP_UPSTREAM_PYTHON")
NAMES = [
    f"{model}-{cache}-{flash}-{n_ubatch}"
    for model in ALL_MODELS
    for cache, flash in dump_logits.SETTINGS
    for n_ubatch in dump_logits.UBATCHES
]


def dump(python: str, folder: Path, models: list[Path], path: str | None) -> None:
    folder.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = path
    command = [python, dump_logits.__file__, str(folder), *map(str, models)]
    subprocess.run(command, env=environment, check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def dumps(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of the logits of the unpatched library and of ours."""
    if not UPSTREAM_PYTHON:
        pytest.skip("EDGE_CSP_UPSTREAM_PYTHON is not set")
    folder = tmp_path_factory.mktemp("identity")
    models = [make_model(folder / f"{name}.gguf", **settings) for name, settings in ALL_MODELS.items()]
    dump(UPSTREAM_PYTHON, folder / "upstream", models, None)
    dump(sys.executable, folder / "ours", models, os.environ.get("PYTHONPATH"))
    return folder / "upstream", folder / "ours"


@pytest.mark.parametrize("name", NAMES)
def test_without_a_csp(dumps: tuple[Path, Path], name: str) -> None:
    upstream, ours = (np.load(folder / f"{name}.npy") for folder in dumps)
    assert upstream.dtype == ours.dtype
    assert upstream.std() > 0.1
    assert upstream.tobytes() == ours.tobytes()


def test_upstream_is_unpatched() -> None:
    if not UPSTREAM_PYTHON:
        pytest.skip("EDGE_CSP_UPSTREAM_PYTHON is not set")
    code = "from llama_cpp import __version__, llama_cpp; print(__version__, hasattr(llama_cpp._lib, 'llama_csp_init'))"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    shown = subprocess.run([UPSTREAM_PYTHON, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert shown.stdout.split() == ["0.3.36", "False"]


def test_settings_differ(dumps: tuple[Path, Path]) -> None:
    """Every cache type and attention was really used."""
    logits = {np.load(dumps[1] / f"mha-{cache}-{flash}-64.npy").tobytes() for cache, flash in dump_logits.SETTINGS}
    assert len(logits) == len(dump_logits.SETTINGS)


LAYOUTS = [("f16", "f16", False), ("f16", "f16", True), ("q8_0", "f16", False), ("q8_0", "q8_0", True)]


def decode_in_parts(runtime: Runtime) -> npt.NDArray[np.float32]:
    """A prompt in ubatches and single tokens: graphs are built anew, and used again."""
    tokens = np.random.default_rng(1).integers(0, 96, 80)
    return np.concatenate([runtime.decode(part) for part in (tokens[:70], *tokens[70:, None])])


@pytest.mark.parametrize("n_ubatch", [16, 64])
@pytest.mark.parametrize(("type_k", "type_v", "flash"), LAYOUTS)
def test_recording_changes_no_bit(
    model: Path, device: Open, type_k: str, type_v: str, flash: bool, n_ubatch: int
) -> None:
    """A csp that only records, before, within and after its life."""
    settings = {"type_k": type_k, "type_v": type_v, "flash_attn": flash, "n_ubatch": n_ubatch}
    with device(model, **settings) as runtime:
        expected = decode_in_parts(runtime)
        runtime.clear()
        csp = Csp.attach(runtime.ctx)
        csp.set_softmax_n(0.0)
        attached = decode_in_parts(runtime)
        assert csp.info().n_window == 32
        csp.close()
        runtime.clear()
        detached = decode_in_parts(runtime)
    assert attached.tobytes() == expected.tobytes()
    assert detached.tobytes() == expected.tobytes()


def test_attach_and_detach_within_a_sequence(model: Path, device: Open) -> None:
    tokens = np.random.default_rng(2).integers(0, 96, 60)
    with device(model) as runtime:
        expected = np.concatenate([runtime.decode(part) for part in np.split(tokens, 6)])
        runtime.clear()
        logits = [runtime.decode(tokens[:10])]
        for begin in (10, 30):
            csp = Csp.attach(runtime.ctx)
            logits.append(runtime.decode(tokens[begin : begin + 10]))
            assert csp.info().n_window == 10
            csp.close()
            logits.append(runtime.decode(tokens[begin + 10 : begin + 20]))
        logits.append(runtime.decode(tokens[50:]))
    assert np.concatenate(logits).tobytes() == expected.tobytes()
