"""Models and devices of the native tests. Every test that takes `device` also runs with all layers on an RPC server,
whose cache is not in host memory: the stand-in for a GPU. EDGE_CSP_TEST_DEVICE adds a device by its name, as CUDA0.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_csp.native import find_device
from tests.oracle.random_models import make_model
from tests.oracle.runtime import Runtime
from tests.rpc_server import rpc_server

MODELS: dict[str, dict[str, Any]] = {
    "mha": {"arch": "llama", "n_head_kv": 4},
    "gqa": {"arch": "llama"},
    "mrope": {"arch": "qwen2vl"},
}

DEVICES = ["cpu", "rpc", *filter(None, [os.environ.get("EDGE_CSP_TEST_DEVICE")])]

Open = Callable[..., Runtime]


@pytest.fixture(scope="session", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / f"{request.param}.gguf", **MODELS[request.param])


@pytest.fixture(scope="session")
def gqa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "gqa.gguf", **MODELS["gqa"])


@pytest.fixture(scope="session")
def rpc_device() -> Iterator[int]:
    """A ggml_backend_dev_t on a server on loopback."""
    with rpc_server() as endpoint:
        yield add_server(endpoint)


def add_server(endpoint: str) -> int:
    from llama_cpp import _ggml

    ggml = _ggml.libggml
    ggml.ggml_backend_rpc_add_server.restype = ctypes.c_void_p
    ggml.ggml_backend_reg_dev_get.restype = ctypes.c_void_p
    ggml.ggml_backend_reg_dev_get.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    registry = ggml.ggml_backend_rpc_add_server(endpoint.encode())
    device = ggml.ggml_backend_reg_dev_get(registry, 0)
    assert device
    return int(device)


def open_on(device: int) -> Open:
    """Opens models with all layers on a ggml_backend_dev_t."""
    devices = (ctypes.c_void_p * 2)(device, None)
    pointer = ctypes.cast(devices, ctypes.c_void_p)

    def open_there(path: Path, **settings: Any) -> Runtime:
        runtime = Runtime(path, model_params={"devices": pointer, "n_gpu_layers": 99}, **settings)
        runtime.keepalive = devices  # type: ignore[attr-defined]
        return runtime

    return open_there


@pytest.fixture(scope="session")
def on_server(rpc_device: int) -> Open:
    """Opens a model on the RPC server."""
    return open_on(rpc_device)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Open:
    """Opens a model on the device: `device(path, type_k="f16", …)`, see Runtime."""
    if request.param == "cpu":
        return Runtime
    if request.param == "rpc":
        open_there: Open = request.getfixturevalue("on_server")
        return open_there
    return open_on(find_device(request.param))
