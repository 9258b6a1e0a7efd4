"""What llama.cpp sends to an RPC server: every graph, node by node. Independent of our code, and it misses nothing."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

GRAPH_COMPUTE = 10  # enum rpc_cmd of ggml-rpc.cpp

RPC_TENSOR = np.dtype(  # struct rpc_tensor, packed
    [
        ("id", "<u8"),
        ("type", "<u4"),
        ("buffer", "<u8"),
        ("ne", "<u4", 4),
        ("nb", "<u4", 4),
        ("op", "<u4"),
        ("op_params", "<i4", 16),
        ("flags", "<i4"),
        ("src", "<u8", 10),
        ("view_src", "<u8"),
        ("view_offs", "<u8"),
        ("data", "<u8"),
        ("name", "S64"),
        ("use_count", "<i4"),
    ]
)


@dataclass(frozen=True)
class Tensor:
    """A tensor without its data; enums are ggml's numbers."""

    op: int
    type: int
    ne: tuple[int, ...]
    nb: tuple[int, ...]
    op_params: bytes
    name: str


@dataclass(frozen=True)
class Node:
    """A tensor that is computed, and what it is computed from: None where an operand in between is left out."""

    tensor: Tensor
    src: tuple[Tensor | None, ...]


class RpcTap:
    """A relay in front of an RPC server that reads what passes."""

    def __init__(self, endpoint: str) -> None:
        self._server = endpoint
        self._nodes: list[Node] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def take(self) -> list[Node]:
        """The nodes sent since the last call: those of all calls that had to wait for an answer of the server."""
        nodes, self._nodes = self._nodes, []
        return nodes

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        host, port = self._server.split(":")
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection((host, int(port)))
                threading.Thread(target=self._relay, args=(client, server), daemon=True).start()

    def _relay(self, client: socket.socket, server: socket.socket) -> None:
        with client, server:  # closed here, when neither thread uses them any more
            for connection in (client, server):  # small messages go at once
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            answers = threading.Thread(target=_copy, args=(server, client), daemon=True)
            answers.start()
            with suppress(OSError, EOFError):
                self._relay_requests(client, server)
            _hang_up(client, server)
            answers.join()

    def _relay_requests(self, client: socket.socket, server: socket.socket) -> None:
        """| command (1 byte) | size (8 bytes) | data |"""
        while True:
            head = _receive(client, 9)
            command, size = struct.unpack("<BQ", head)
            data = _receive(client, size)
            if command == GRAPH_COMPUTE:
                self._nodes += parse_graph(data)
            server.sendall(head + data)


def parse_graph(data: bytes) -> list[Node]:
    """| device (4 bytes) | n_nodes (4) | ids of the nodes (8 each) | n_tensors (4) | tensors |"""
    (n_node,) = struct.unpack_from("<I", data, 4)
    ids = np.frombuffer(data, "<u8", n_node, 8)
    offset = 8 + 8 * n_node
    (n_tensor,) = struct.unpack_from("<I", data, offset)
    raw = np.frombuffer(data, RPC_TENSOR, n_tensor, offset + 4)
    assert len(data) == offset + 4 + raw.nbytes, "the RPC protocol has changed"
    tensors = {int(t["id"]): (_tensor(t), t["src"]) for t in raw}
    return [Node(tensors[i][0], tuple(tensors[int(s)][0] if s else None for s in tensors[i][1])) for i in map(int, ids)]


def _tensor(t: npt.NDArray[np.void]) -> Tensor:
    ne, nb = (tuple(int(n) for n in t[field]) for field in ("ne", "nb"))
    return Tensor(int(t["op"]), int(t["type"]), ne, nb, t["op_params"].tobytes(), bytes(t["name"]).decode())


def _receive(source: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = source.recv(min(size - len(data), 1 << 20))
        if not part:
            raise EOFError
        data += part
    return bytes(data)


def _copy(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while part := source.recv(1 << 20):
            target.sendall(part)
    _hang_up(source, target)


def _hang_up(*connections: socket.socket) -> None:
    for connection in connections:
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def rpc_tap(endpoint: str) -> Iterator[RpcTap]:
    tap = RpcTap(endpoint)
    try:
        yield tap
    finally:
        tap.close()
