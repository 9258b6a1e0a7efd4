"""RPC servers on loopback, started with ctypes alone: the stand-in for GPUs and for other machines."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

SERVER = """
import ctypes, sys
import llama_cpp._ggml
ggml = llama_cpp._ggml.libggml
ggml.ggml_backend_dev_by_type.restype = ctypes.c_void_p
cpu = ctypes.c_void_p(ggml.ggml_backend_dev_by_type(0))
ggml.ggml_backend_rpc_start_server.argtypes = [
    ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.POINTER(ctypes.c_void_p)]
ggml.ggml_backend_rpc_start_server(sys.argv[1].encode(), None, 1, 1, ctypes.byref(cpu))
"""


@contextmanager
def rpc_server() -> Iterator[str]:
    """A server of this machine's CPU, in a process of its own; yields its "host:port"."""
    port = free_port()
    endpoint = f"127.0.0.1:{port}"
    command = [sys.executable, "-c", SERVER, endpoint]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(server, port)
        yield endpoint
    finally:
        server.kill()
        server.wait()


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(server: subprocess.Popen[bytes], port: int) -> None:
    """Wait until a server accepts connections."""
    deadline = time.monotonic() + 30
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the RPC server did not start") from None
            time.sleep(0.05)
