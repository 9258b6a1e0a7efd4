"""Writes docs/cli.md from the commands themselves: `python tools/write_cli_docs.py`. A test fails when it differs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import typer

from edge_csp.cli import app
from edge_csp.cli.chat import COMMANDS, KEYS

TARGET = Path(__file__).parents[1] / "docs" / "cli.md"
HEAD = """\
# Command line

<!-- Written by tools/write_cli_docs.py; change the commands instead. -->

`edge-csp chat`, `run`, `demo`, `map`, `plan`, `info`, `rpc-server` and `bench speed`, `quality`, `milebench` and
`milebench-score`, or `python -m edge_csp …`. Names are llama.cpp's where it has one.

- Results go to stdout; notes, progress and errors to stderr. Progress bars appear only in a terminal.
- Exit status: 0, 1 after an error (one line on stderr), 2 for wrong usage, 130 after Ctrl-C.
- `HF_TOKEN` and `HF_HOME` work as in every program that uses huggingface_hub. `EDGE_CSP_LOG=1` shows the log of
  llama.cpp, `EDGE_CSP_DEBUG=1` the traceback of an unexpected error.
"""


def text() -> str:
    """What docs/cli.md has to be."""
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    seen: dict[str, str] = {}
    return HEAD + "".join(_command(name, command, seen) for name, command in _leaves(commands))


def _leaves(commands: dict[str, Any], parent: str = "") -> Iterator[tuple[str, Any]]:
    """Names and commands, those of groups in their place."""
    for name, command in commands.items():
        if hasattr(command, "commands"):
            yield from _leaves(command.commands, f"{parent}{name} ")
        else:
            yield parent + name, command


def _command(name: str, command: Any, seen: dict[str, str]) -> str:
    """Section of a command. seen: tables of options that are in the text already, and the command they are of."""
    arguments = [parameter.metavar for parameter in command.params if parameter.param_type_name == "argument"]
    lines = [f"\n## {' '.join(['edge-csp', name, '[OPTIONS]', *arguments])}\n", " ".join(str(command.help).split())]
    if name == "chat":
        lines += ["", "| in a chat | |", "|---|---|"]
        lines += [f"| `/{f'{word} {argument}'.strip()}` | {does} |" for word, (argument, does, _) in COMMANDS.items()]
        lines += ["| `/exit`, `/quit` | End the chat. |", "", KEYS]
    options = [parameter for parameter in command.params if parameter.param_type_name == "option"]
    known: list[str] = []
    for panel, group in groupby(options, lambda option: option.rich_help_panel or "Output"):
        table = [f"| {panel} | default | |", "|---|---|---|", *(_option(option) for option in group)]
        first = seen.setdefault("\n".join(table), name)
        if first == name:
            lines += ["", *table]
        else:
            known.append(panel)
    if known:
        lines += ["", f"Options of the groups {', '.join(known)}: as above."]
    return "\n".join(lines) + "\n"


def _option(option: Any) -> str:
    names = ", ".join(f"`{name}`" for name in sorted(option.opts, key=lambda name: name.startswith("--")))
    value = "" if option.is_flag else f" {option.metavar}"
    default = "" if option.is_flag or option.default in (None, []) or option.multiple else f"{option.default}"
    return (
        f"| {names}{value} | {default} | {option.help} |".replace("on|off|auto", r"on\|off\|auto")
        .replace("wall|cpu", r"wall\|cpu")
        .replace("N|all", r"N\|all")
    )


def main() -> int:
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(text(), encoding="utf-8")
    print(f"wrote {TARGET}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
