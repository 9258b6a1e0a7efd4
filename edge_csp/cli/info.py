"""`edge-csp info`: what GGUF files say about themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def command(
    files: Annotated[list[Path], typer.Argument(metavar="FILE…", help="GGUF files.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list, one object per file.")] = False,
) -> None:
    """Show what is in GGUF files: kind, size, layers, bytes per cell of the KV cache."""
    from dataclasses import asdict

    from edge_csp.cli.render import rows_table, say_error, stdout
    from edge_csp.errors import EdgeCspError
    from edge_csp.metadata import GgufInfo, describe, read_info

    found: list[GgufInfo] = []
    for file in files:
        try:
            found.append(read_info(file))
        except EdgeCspError as error:
            say_error(error)
    if as_json:
        print(json.dumps([{**asdict(info), "path": str(info.path)} for info in found], indent=1))
    else:
        for info in found:
            stdout().print(rows_table(describe(info)))
    if len(found) < len(files):
        raise typer.Exit(1)
