"""Options: their names, their defaults, and the documents made from them."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from dataclasses import fields

import pytest

from edge_csp.cli import main, options
from edge_csp.context import Context
from edge_csp.policy import POLICIES
from edge_csp.pruning import Pruning
from edge_csp.sampling import Sampling
from tests.cli.conftest import Cli
from tools import write_cli_docs


def test_defaults_are_those_of_the_classes() -> None:
    assert options.SamplingOptions().sampling() == Sampling()
    pruning = options.PruningOptions().pruning()
    for field in fields(Pruning):
        if field.name != "budget":
            assert getattr(pruning, field.name) == getattr(Pruning(), field.name)
    parameters = inspect.signature(Context).parameters
    for name, value in options.ContextOptions().settings().items():
        assert parameters[name].default == value


def test_every_policy_is_in_the_help() -> None:
    assert all(name in write_cli_docs.text() for name in POLICIES)


def test_docs_are_up_to_date() -> None:
    written = write_cli_docs.TARGET.read_text(encoding="utf-8")
    assert written == write_cli_docs.text(), "run python tools/write_cli_docs.py"


@pytest.mark.parametrize(
    "command", [[], ["chat"], ["run"], ["demo"], ["map"], ["info"], ["bench", "speed"], ["bench", "milebench"]]
)
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "Usage:" in shown
    words = {(): ["help"], ("info",): ["help"], ("bench", "speed"): ["budget", "cells", "upstream-python"]}
    assert all(f"--{word}" in shown for word in words.get(tuple(command), ["budget", "ctx-size"]))


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "Usage:" in capsys.readouterr().out


def test_version(cli: Cli) -> None:
    assert cli("--version").stdout.startswith("edge-csp 0.")


def test_names_of_several_letters_behind_one_dash(capsys: pytest.CaptureFixture[str]) -> None:
    """-ngl is not -n with "gl", -ctk not -c, -sys not -s; -c256 and -n -1 work as everywhere."""
    cache = ["-c256", "-ctk", "q8_0", "-ctv", "q8_0", "-fa", "on"]
    assert main(["run", "-p", "hi", "-ngl", "3", "-n", "-1", *cache, "-s7", "-sys", "hello", "-hf", "wrong"]) == 1
    assert "'wrong' is not of the form user/repo" in capsys.readouterr().err


def test_help_imports_nothing_slow() -> None:
    program = (
        "import sys; from edge_csp.cli import main; main(['run', '--help'])\n"
        "print({name for name in ('numpy', 'llama_cpp', 'PIL', 'jinja2', 'prompt_toolkit') if name in sys.modules})"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, encoding="utf-8", env=os.environ, check=True
    )
    assert result.stdout.splitlines()[-1] == "set()"
