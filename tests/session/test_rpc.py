"""Models spread over RPC servers; servers that are not there, are busy, or are something else."""

from __future__ import annotations

import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import llama_cpp
import pytest

from edge_csp import Context, Pruning, Sampling, Session, VisionModel, parse_budget, rpc
from edge_csp.cli.demo import Album, read_album
from edge_csp.errors import ContextError, ModelError
from tests.rpc_server import free_port, rpc_server, wait_for

Files = tuple[Path, Path]


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[str, str]]:
    with rpc_server() as first, rpc_server() as second:
        yield first, second


@pytest.fixture(scope="module")
def album(demo_files: Files) -> Album:
    return read_album(demo_files[0].parent / "album")


def answers(model: VisionModel, album: Album) -> list[tuple[str, int, int]]:
    """Answers to questions one after the other, the album before them, and the cells before and after eviction."""
    found = []
    with Context(model, n_ctx=2048) as context:
        session = Session(context, pruning=Pruning(parse_budget("20%")), sampling=Sampling(temperature=0))
        session.messages = list(album.messages)
        for question, _ in album.questions[:4]:
            answer = "".join(session.ask(question, n_predict=32))
            found.append((answer, session.n_token, context.n_cell))
        assert session.counters.n_evicted > 0
    return found


def test_two_servers_answer_as_the_cpu_does(demo_files: Files, servers: tuple[str, str], album: Album) -> None:
    with VisionModel(*demo_files, n_threads=1) as model:
        assert not model.offloaded
        expected = answers(model, album)
    assert expected[0][0] == album.questions[0][1]
    assert expected[0][2] < 0.25 * expected[0][1]
    for _ in range(2):  # servers are free again when a model is closed
        with VisionModel(*demo_files, n_threads=1, rpc=servers) as model:
            assert model.offloaded
            assert answers(model, album) == expected


SPREAD = """
import sys
from edge_csp import Context, VisionModel
with VisionModel(sys.argv[1], n_threads=1, n_gpu_layers=int(sys.argv[3]), rpc=sys.argv[2].split(",")) as model:
    Context(model, n_ctx=256).close()
"""


@pytest.mark.parametrize(("n_gpu_layers", "n_local"), [(-1, 0), (4, 1)])
def test_layers_lie_on_both(demo_files: Files, servers: tuple[str, str], n_gpu_layers: int, n_local: int) -> None:
    command = [sys.executable, "-c", SPREAD, str(demo_files[0]), ",".join(servers), str(n_gpu_layers)]
    log = subprocess.run(command, stderr=subprocess.PIPE, encoding="utf-8", check=True, env=_with_log()).stderr
    devices = re.findall(r"llama_kv_cache: layer +\d+: dev = (\w+)", log)
    assert len(devices) == 4
    assert sorted(set(devices) - {"CPU"}) == ["RPC0", "RPC1"]
    assert devices.count("CPU") == n_local
    for what in ("model", "KV"):
        sizes = dict(re.findall(rf"RPC0\[([\d.:]+)\] {what} buffer size = +([\d.]+) MiB", log))
        assert set(sizes) == set(servers)
        assert all(float(size) > 0 for size in sizes.values())


def _with_log() -> dict[str, str]:

    return {**os.environ, "EDGE_CSP_LOG": "1"}


def test_a_server_in_use_by_this_process_can_be_used_again(demo_files: Files, servers: tuple[str, str]) -> None:
    with (
        VisionModel(demo_files[0], n_threads=1, rpc=servers[:1]),
        VisionModel(demo_files[0], n_threads=1, rpc=[servers[0], servers[0]]) as model,
        Context(model, n_ctx=64) as context,
    ):
        context.decode_tokens([1, 2, 3])


def test_other_models_do_not_use_the_servers(demo_files: Files, servers: tuple[str, str]) -> None:
    with VisionModel(demo_files[0], n_threads=1, rpc=servers), VisionModel(demo_files[0], n_threads=1) as model:
        assert not model.offloaded
        with Context(model, n_ctx=64) as context:
            assert context.flash_attn == "off"


def test_memory_of_the_servers_counts(
    demo_files: Files, servers: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        VisionModel(demo_files[0], n_threads=1) as local,
        VisionModel(demo_files[0], n_threads=1, rpc=servers) as spread,
    ):
        monkeypatch.setattr("edge_csp.context.os.sysconf", lambda _: 16)  # a machine of 256 bytes
        with pytest.raises(ContextError, match="64 cells takes 65536 bytes of KV cache, but there are 256 bytes"):
            Context(local, n_ctx=64)
        Context(spread, n_ctx=64).close()
        with pytest.raises(ContextError, match="1000000000 cells takes"):
            Context(spread, n_ctx=10**9)


# --- what is no server ---


@contextmanager
def listener(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """Something on a port that treats one client in its own way."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            client, _ = server.accept()
            with client:
                client.recv(100)
                answer(client)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        thread.join()


def hello(major: int, minor: int, size: int = 28) -> bytes:
    return struct.pack("<QBBBB24x", size, major, minor, 0, 0)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"", "is no RPC server"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "is no RPC server"),
        (hello(7, 0)[:-1], "is no RPC server"),
        (hello(7, 0, size=4), "is no RPC server"),
        (hello(6, 0), r"speaks version 6\.0 of the protocol, needed is 7\.0"),
        (hello(7, 1), r"speaks version 7\.1 of the protocol"),
    ],
)
def test_something_else_on_the_port(demo_files: Files, answer: bytes, words: str) -> None:
    with (
        listener(lambda client: client.sendall(answer)) as endpoint,
        pytest.raises(ModelError, match=f"{endpoint}.*{words}"),
    ):
        VisionModel(*demo_files, rpc=[endpoint])


def test_a_busy_server(demo_files: Files, servers: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "TIMEOUT", 0.2)
    host, port = servers[1].split(":")
    with (
        socket.create_connection((host, int(port))),  # another client, which has said nothing yet
        pytest.raises(ModelError, match=f"{servers[1]} does not answer.*one client at a time"),
    ):
        VisionModel(*demo_files, rpc=servers)


@pytest.mark.parametrize(
    "endpoint", ["", "localhost", "localhost:", ":50052", "localhost:0", "a:b", "::1:5", "h:65536"]
)
def test_malformed_endpoints(demo_files: Files, endpoint: str) -> None:
    with pytest.raises(ModelError, match=f"'{endpoint}' is no RPC server: write host:port"):
        VisionModel(*demo_files, rpc=[endpoint])


def test_nobody_there(demo_files: Files, servers: tuple[str, str]) -> None:
    gone = f"127.0.0.1:{free_port()}"
    with pytest.raises(ModelError, match=f"RPC server {gone} cannot be reached"):
        VisionModel(*demo_files, rpc=[servers[0], gone])
    with pytest.raises(ModelError, match=r"RPC server no\.such\.host\.invalid:1 cannot be reached"):
        VisionModel(*demo_files, rpc=["no.such.host.invalid:1"])


def test_version_of_the_protocol_is_that_of_the_header() -> None:
    header = (Path(llama_cpp.__file__).parent / "include" / "ggml-rpc.h").read_text(encoding="utf-8")
    found = [int(re.findall(rf"RPC_PROTO_{part}_VERSION +(\d+)", header)[0]) for part in ("MAJOR", "MINOR")]
    assert tuple(found) == rpc.PROTOCOL


VANISH = """
import sys
from edge_csp import Context, Session, VisionModel
with VisionModel(sys.argv[1], n_threads=1, rpc=[sys.argv[2]]) as model, Context(model, n_ctx=256) as context:
    answer = Session(context).ask("What?")
    next(answer)
    print("answering", flush=True)
    sys.stdin.readline()
    list(answer)
"""


def test_a_server_that_vanishes_ends_the_process_with_one_line(demo_files: Files) -> None:
    """What llama.cpp leaves us: if this fails because an error can be caught, tell so in rpc.py and in the docs."""
    with ExitStack() as stack:
        endpoint = stack.enter_context(rpc_server())
        command = [sys.executable, "-c", VANISH, str(demo_files[0]), endpoint]
        client = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert client.stdout is not None
        assert client.stdout.readline().startswith(b"answering")
        stack.close()
        _, errors = client.communicate(b"\n", timeout=60)
    assert client.returncode != 0
    if sys.platform != "win32":
        assert client.returncode == -signal.SIGABRT
    lines = errors.decode().splitlines()
    assert [line for line in lines if line.startswith("edge-csp: error: llama.cpp has to end this process")] == lines[
        :1
    ]


# --- the command ---


def test_command(demo_files: Files) -> None:
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "edge_csp", "rpc-server", "--port", str(port), "-t", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        wait_for(server, port)
        command = [sys.executable, "-m", "edge_csp", "rpc-server", "--port", str(port)]
        second = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=60, check=False)
        assert second.returncode == 1
        assert re.fullmatch(rf"edge-csp: error: 127\.0\.0\.1:{port} cannot be served \(.+\)\n", second.stderr)
        command = [sys.executable, "-m", "edge_csp", "run", "-m", str(demo_files[0]), "--rpc", f"127.0.0.1:{port}"]
        command += ["-p", "What?", "-n", "2", "-t", "1", "--embedding-cache", "off"]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
    finally:
        if sys.platform == "win32":
            server.kill()
        else:
            server.send_signal(signal.SIGINT)
    output, errors = server.communicate(timeout=30)
    assert b"CPU" in output
    assert errors == b""
