"""The check of the defaults says yes on the embedded model, and no where answers fall apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import check_defaults


def test_the_embedded_model(
    demo_files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check_defaults, "TURNS", check_defaults.TURNS[:3])
    monkeypatch.setattr(check_defaults, "SIZES", (5, 300))
    monkeypatch.setattr("sys.argv", ["check_defaults", str(demo_files[0])])
    assert check_defaults.main() == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{demo_files[0].name}: 3 of 3 turns bit for bit those of a plain context; at 20 %, ")
    assert "of 2 answers are other ones, 0 fall apart" in said


def test_runs_of_one_token() -> None:
    assert check_defaults.longest_run([]) == 0
    assert check_defaults.longest_run([1, 2, 2, 2, 1, 2]) == 3
