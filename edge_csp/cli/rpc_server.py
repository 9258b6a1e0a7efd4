"""`edge-csp rpc-server`: the devices of this machine for models on another one (--rpc)."""

from __future__ import annotations

import ipaddress
from functools import partial
from typing import Annotated

from typer import Option

from edge_csp.cli.options import Threads

WARNING = (
    "anybody who reaches {address} can use it, and read and change what it computes: the protocol is neither encrypted "
    "nor authenticated, and never fit for an open network"
)


_server = partial(Option, rich_help_panel="Server")


def command(
    host: Annotated[str, _server("--host", metavar="ADDRESS", help="IPv4 address to listen on.")] = "127.0.0.1",
    port: Annotated[int, _server("-p", "--port", metavar="N", min=1, max=65535, help="Port.")] = 50052,
    threads: Threads = -1,
) -> None:
    """Serve this machine's GPUs, or its CPU if there is none, to a model on another machine, until Ctrl-C.

    The other machine names this one with --rpc. One client is served at a time.
    """
    from edge_csp.cli.render import say
    from edge_csp.model import usable_cores
    from edge_csp.rpc import serve

    if not _is_loopback(host):
        say("warning: " + WARNING.format(address=f"{host}:{port}"))
    serve(host, port, threads if threads > 0 else usable_cores())


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
