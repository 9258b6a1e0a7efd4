"""Devices by the names that ggml gives them."""

from __future__ import annotations

import ctypes

import pytest
from llama_cpp import _ggml

from edge_csp.errors import NativeError
from edge_csp.native import find_device


def test_find_device() -> None:
    _ggml.libggml.ggml_backend_dev_by_type.restype = ctypes.c_void_p
    assert find_device("CPU") == _ggml.libggml.ggml_backend_dev_by_type(0)
    with pytest.raises(NativeError, match=r"^no device is called 'CUDA99': this llama\.cpp sees .*CPU"):
        find_device("CUDA99")
