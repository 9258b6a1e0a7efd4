"""llama.cpp's RPC servers: devices of other machines, which take layers of a model and their cells.

The protocol is neither encrypted nor authenticated, and a server serves one client at a time.

The client in llama.cpp ends the process (GGML_ABORT) where a connection fails. Before it may try, `Servers` makes the
first step of the protocol itself, so that a server that is not there is an error like any other. A server that goes
away later still takes the process with it: its connection is held by threads of llama.cpp, which offer no way out. What
can be done is to say so in one line.
"""

from __future__ import annotations

import ctypes
import signal
import socket
import struct
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edge_csp.errors import ModelError

__all__ = ["Servers", "serve"]

PROTOCOL = 7, 0
"""RPC_PROTO_MAJOR_VERSION and RPC_PROTO_MINOR_VERSION of ggml-rpc.h."""
TIMEOUT = 5.0
"""Seconds that a server may take to answer."""

_HELLO = 14  # RPC_CMD_HELLO
_N_CAPS = 24  # RPC_CONN_CAPS_SIZE
_CPU, _GPU, _IGPU = 0, 1, 2  # GGML_BACKEND_DEVICE_TYPE_*
_connected: Counter[str] = Counter()  # servers that models of this process hold


class Servers:
    """Servers that a model is spread over. They are not registered with llama.cpp, so other models do not see them.

    devices: ggml_backend_dev_t of all servers, then of the local GPUs, ended by NULL, as in llama_model_params.
    memory: bytes that these devices have together.
    """

    def __init__(self, endpoints: Sequence[str]) -> None:
        """endpoints: "host:port". Raises ModelError if one cannot be reached, or is no server of this protocol."""
        import llama_cpp

        self._endpoints = tuple(dict.fromkeys(endpoint.strip() for endpoint in endpoints))
        addresses = [parse_endpoint(endpoint) for endpoint in self._endpoints]
        for endpoint, address in zip(self._endpoints, addresses, strict=True):
            if not _connected[endpoint]:
                _check_server(endpoint, address)
        add_server = _function("ggml_backend_rpc_add_server", ctypes.c_void_p, ctypes.c_char_p)
        n_device = _function("ggml_backend_reg_dev_count", ctypes.c_size_t, ctypes.c_void_p)
        device = _function("ggml_backend_reg_dev_get", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
        found: list[int] = []
        for endpoint in self._endpoints:
            server = add_server(endpoint.encode())
            if not server:
                raise ModelError(f"RPC server {endpoint} offers no device")
            found += [device(server, i) for i in range(n_device(server))]
        found += local_devices(_GPU) or local_devices(_IGPU)
        if len(found) > (most := llama_cpp.llama_max_devices()):
            raise ModelError(f"the RPC servers and GPUs have {len(found)} devices; the limit is {most}")
        set_callback = _function("ggml_set_abort_callback", ctypes.c_void_p, type(_ABORT_CALLBACK))
        set_callback(_ABORT_CALLBACK)  # instead of a trace of the stack
        self.devices = (ctypes.c_void_p * (len(found) + 1))(*found, None)
        self.memory = sum(map(_total_memory, found))
        _connected.update(self._endpoints)

    def close(self) -> None:
        """Forget the servers, after the model has been freed. Call it once."""
        _connected.subtract(self._endpoints)


def _say_last_words(message: bytes) -> None:
    words = message.decode(errors="replace").strip()
    print(f"edge-csp: error: llama.cpp has to end this process: {words}", file=sys.stderr, flush=True)


_ABORT_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(_say_last_words)


def parse_endpoint(endpoint: str) -> tuple[str, int]:
    """Host and port of "host:port". Raises ModelError if it is not of this form."""
    host, _, port = endpoint.rpartition(":")
    if not host or ":" in host or not (port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16):
        raise ModelError(f"{endpoint!r} is no RPC server: write host:port, with a port from 1 to 65535")
    return host, int(port)


def _check_server(endpoint: str, address: tuple[str, int]) -> None:
    """Say hello as the client of llama.cpp does, which aborts where this raises ModelError."""
    try:
        host = socket.gethostbyname(address[0])  # IPv4 only, as llama.cpp
        with socket.create_connection((host, address[1]), TIMEOUT) as server:
            try:
                server.sendall(struct.pack(f"<BQ{_N_CAPS}x", _HELLO, _N_CAPS))
                answer = _receive(server, 8 + 4 + _N_CAPS)
            except TimeoutError:
                raise ModelError(
                    f"RPC server {endpoint} does not answer within {TIMEOUT:.0f} s: it serves one client at a time"
                ) from None
    except (OSError, UnicodeError) as error:
        raise ModelError(
            f"RPC server {endpoint} cannot be reached ({getattr(error, 'strerror', None) or error})"
        ) from error
    size, major, minor = struct.unpack_from("<QBB", answer) if len(answer) == 8 + 4 + _N_CAPS else (0, 0, 0)
    if size != 4 + _N_CAPS:
        raise ModelError(f"{endpoint} is no RPC server of llama.cpp, or one of another version")
    if major != PROTOCOL[0] or minor > PROTOCOL[1]:
        needed = ".".join(map(str, PROTOCOL))
        raise ModelError(f"RPC server {endpoint} speaks version {major}.{minor} of the protocol, needed is {needed}")


def _receive(connection: socket.socket, size: int) -> bytes:
    """`size` bytes; fewer if the connection ends before."""
    data = b""
    while len(data) < size and (more := connection.recv(size - len(data))):
        data += more
    return data


def _total_memory(device: int) -> int:
    get = _function("ggml_backend_dev_memory", None, ctypes.c_void_p, *[ctypes.POINTER(ctypes.c_size_t)] * 2)
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    get(device, ctypes.byref(free), ctypes.byref(total))
    return total.value


def serve(host: str, port: int, n_threads: int) -> None:
    """Serve the GPUs of this machine, or its CPU if it has none. Does not return; Ctrl-C ends the process.

    Raises ModelError if the address cannot be used.
    """
    start = _function(
        "ggml_backend_rpc_start_server",
        None,
        *(ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.POINTER(ctypes.c_void_p)),
    )
    try:
        host = socket.gethostbyname(host)
        with socket.socket() as probe:  # the reason, which llama.cpp does not give
            if sys.platform != "win32":
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise ModelError(f"{host}:{port} cannot be served ({error.strerror or error})") from error
    found = local_devices(_GPU) or local_devices(_IGPU) or local_devices(_CPU)
    devices = (ctypes.c_void_p * len(found))(*found)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own handler would wait for the call to return
    start(f"{host}:{port}".encode(), None, n_threads, len(found), devices)
    raise ModelError(f"{host}:{port} is not served any more")


def local_devices(kind: int) -> list[int]:
    """ggml_backend_dev_t of the devices of this machine that are of a GGML_BACKEND_DEVICE_TYPE."""
    get = _function("ggml_backend_dev_get", ctypes.c_void_p, ctypes.c_size_t)
    type_of = _function("ggml_backend_dev_type", ctypes.c_int, ctypes.c_void_p)
    devices = [get(i) for i in range(_function("ggml_backend_dev_count", ctypes.c_size_t)())]
    return [device for device in devices if type_of(device) == kind]


def _function(name: str, restype: Any, *argtypes: Any) -> Any:
    """A function of libggml or of the libraries beside it. Raises ModelError if llama.cpp was built without RPC."""
    from llama_cpp import _ggml

    libraries = [_ggml.libggml]
    if sys.platform == "win32":  # elsewhere libggml brings the others
        folder = Path(_ggml.__file__).parent / "lib"
        libraries += [ctypes.CDLL(str(folder / f"{part}.dll")) for part in ("ggml-base", "ggml-rpc")]
    for library in libraries:
        if hasattr(library, name):
            function = library[name]  # a new object: prototypes of other users stay as they are
            function.restype, function.argtypes = restype, argtypes
            return function
    raise ModelError(f"llama.cpp was built without RPC (GGML_RPC): {name} is missing")
