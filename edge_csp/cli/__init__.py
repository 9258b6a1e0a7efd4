"""The command line: parse, call, print. What it starts lives in the modules below it.

Nothing slow is imported before a command needs it: `edge-csp --help` loads neither numpy nor llama.cpp.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from edge_csp import __version__
from edge_csp.cli import bench, chat, demo, info, map, plan, rpc_server, run
from edge_csp.errors import EdgeCspError

app = typer.Typer(
    name="edge-csp",
    help="Vision-language models on small machines, with a KV cache that keeps only the cells that matter.",
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module, name in (
    (chat, "chat"),
    (run, "run"),
    (demo, "demo"),
    (map, "map"),
    (plan, "plan"),
    (info, "info"),
    (rpc_server, "rpc-server"),
):
    app.command(name, help=module.command.__doc__)(module.command)
app.add_typer(bench.app, name="bench")


@app.callback()
def _start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the versions and exit.")] = False,
) -> None:
    if version:
        print(f"edge-csp {__version__}, llama-cpp-python {_fork_version()}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status: 0, 1 (an error), 2 (wrong usage) or 130 (Ctrl-C).

    Errors are one line on stderr. EDGE_CSP_DEBUG=1 lets errors that should not happen end with their traceback.
    """
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # no traceback for a character that a terminal does not have
    try:
        status = app(args=arguments, prog_name="edge-csp", standalone_mode=False)
        sys.stdout.flush()
        return int(status or 0)
    except (KeyboardInterrupt, typer.Abort):  # older versions of click make the one of the other
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at exit
        return 1
    except EdgeCspError as error:
        return _fail(str(error), 1)
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error of click, whichever click typer brings
            return _fail(f"{error.format_message()} (see edge-csp --help)", 2)
        if os.environ.get("EDGE_CSP_DEBUG") == "1":
            raise
        words = EdgeCspError(f"{type(error).__name__}: {error}")
        return _fail(f"unexpected {words} (EDGE_CSP_DEBUG=1 shows where)", 1)


def _fail(message: str, status: int) -> int:
    print(f"edge-csp: error: {' '.join(message.split())}", file=sys.stderr)
    return status


def _fork_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("llama-cpp-python")
    except PackageNotFoundError:
        return "is not installed"
