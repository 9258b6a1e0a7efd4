"""How the program ends: Ctrl-C, a closed pipe, errors that should not happen."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from edge_csp import metadata
from edge_csp.cli import main

ENDLESS = ["-n", "-1", "-c", "60000", "--grammar", 'root ::= "a" root']


def start(model: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """An answer that is being printed."""
    command = [sys.executable, "-m", "edge_csp", "run", "-p", "Hello", *model, *ENDLESS]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    assert process.stdout is not None
    assert process.stdout.read(10) == b"aaaaaaaaaa"
    return process


def test_ctrl_c(model: list[str], environment: dict[str, str]) -> None:
    with start(model, environment) as process:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 130
        assert len(errors.splitlines()) <= 1  # older versions of click end the line


def test_closed_pipe(model: list[str], environment: dict[str, str]) -> None:
    with start(model, environment) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        errors = process.stderr.read()
        assert process.wait(timeout=60) == 1
        assert errors == b""


def test_unexpected_error(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_path: object) -> None:
        raise ValueError("two\nlines")

    monkeypatch.setattr(metadata, "read_info", fail)
    monkeypatch.delenv("EDGE_CSP_DEBUG", raising=False)
    assert main(["info", "a.gguf"]) == 1
    expected = "edge-csp: error: unexpected ValueError: two lines (EDGE_CSP_DEBUG=1 shows where)\n"
    assert capsys.readouterr().err == expected
    monkeypatch.setenv("EDGE_CSP_DEBUG", "1")
    with pytest.raises(ValueError, match="two"):
        main(["info", "a.gguf"])
