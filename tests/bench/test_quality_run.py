"""Runs of `edge-csp bench quality`, their files and reports."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from edge_csp import Session
from edge_csp.bench.quality import cache, downsample, records, report, run
from edge_csp.bench.quality.albums import AlbumSource
from edge_csp.cli import main
from edge_csp.errors import BenchError, EdgeCspError
from tests.bench.quality import N_PREDICT

TIMES = ("evict_s", "extra_s")


@pytest.fixture(scope="module")
def settings(demo_files: tuple[Path, Path]) -> run.Settings:
    models = (run.ModelFiles("demo", *demo_files),)
    source = AlbumSource(n_album=2, n_question=8, n_pictures=(2,))
    return run.Settings(models, source, ("full", "csp", "downsample"), ("20%",), n_predict=N_PREDICT)


@pytest.fixture(scope="module")
def whole(settings: run.Settings) -> list[dict[str, Any]]:
    return run.run(settings, None)


def timeless(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = [{name: value for name, value in row.items() if name not in TIMES} for row in found]
    return sorted(rows, key=records.key_of)


def lines(file: Path) -> list[dict[str, Any]]:
    return [row for row in map(json.loads, file.read_text(encoding="utf-8").splitlines()) if "settings" not in row]


def test_a_run_has_every_answer_once(settings: run.Settings, whole: list[dict[str, Any]]) -> None:
    assert len(whole) == 2 * (3 * 4 * 8 + 2 * 3)
    assert {records.key_of(row) for row in whole} == set(run.expected_keys(settings))
    assert len({records.key_of(row) for row in whole}) == len(whole)


def test_a_run_goes_on_where_it_was_stopped(
    settings: run.Settings, whole: list[dict[str, Any]], tmp_path: Path
) -> None:
    out, seen = tmp_path / "out.jsonl", list[tuple[int, int]]()
    assert len(run.run(settings, out, limit=17)) == 17
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(lines(out)[-1])[:40])
    few = replace(settings, protocols=("before",))
    assert len(run.run(few, out)) == 48
    everything = run.run(settings, out, on_progress=lambda done, n: seen.append((done, n)))
    assert timeless(everything) == timeless(whole) == timeless(lines(out))
    assert seen[0][0] >= 48
    assert seen[-1] == (len(whole), len(whole))
    before = out.read_bytes()
    assert len(run.run(few, out)) == 48
    assert lines(out) == [row for row in map(json.loads, before.decode().splitlines()) if "settings" not in row]


def test_more_policies_are_all_that_is_measured(
    settings: run.Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.jsonl"
    run.run(settings, out)
    chosen, answered, select, answer = list[str](), list[str](), Session.select, cache.answer
    monkeypatch.setattr(Session, "select", lambda self, n: chosen.append(self.pruning.policy.name) or select(self, n))
    monkeypatch.setattr(cache, "answer", lambda *given: answered.append("") or answer(*given))
    monkeypatch.setattr(downsample, "Shrunk", None)  # nothing is missing there
    more = run.run(replace(settings, policies=(*settings.policies, "streaming")), out)
    assert set(chosen) == {"streaming"}
    assert len(answered) == sum(row["policy"] == "streaming" for row in more) == len(more) - len(run.run(settings, out))


def test_parallel_is_serial(settings: run.Settings, whole: list[dict[str, Any]], tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    run.run(replace(settings, n_job=2), out, limit=20)
    assert len(lines(out)) == 20
    assert timeless(run.run(replace(settings, n_job=2), out)) == timeless(whole)


def test_another_run_needs_another_file(settings: run.Settings, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    run.run(replace(settings, protocols=("bounded",), policies=("full",)), out, limit=1)
    with pytest.raises(BenchError, match="seed 1, this run of 2"):
        run.run(replace(settings, source=replace(settings.source, seed=2)), out)
    with pytest.raises(BenchError, match="predict 12, this run of 3"):
        run.run(replace(settings, n_predict=3), out)
    out.write_text('{"answer": 1}\n', encoding="utf-8")
    with pytest.raises(BenchError, match=r"out\.jsonl, line 1 is no record"):
        run.run(settings, out)
    with pytest.raises(BenchError, match="cannot be written"):
        run.run(settings, tmp_path)


@pytest.mark.parametrize("n_job", [1, 2])
def test_what_fails_is_named(settings: run.Settings, demo_files: tuple[Path, Path], tmp_path: Path, n_job: int) -> None:
    (tmp_path / "text.gguf").write_bytes(demo_files[0].read_bytes())  # and nothing that reads pictures
    broken = replace(settings, models=(run.ModelFiles("text", tmp_path / "text.gguf"),), n_job=n_job)
    with pytest.raises(BenchError, match=r"^text, album \d of 2 pictures: .*has no mmproj"):
        run.run(broken, None)
    with pytest.raises(BenchError, match=r"missing\.gguf cannot be read"):
        run.run(replace(broken, models=(run.ModelFiles("x", tmp_path / "missing.gguf"),)), None)


def test_an_encoder_that_is_not_clear_is_told_at_once(
    settings: run.Settings, demo_files: tuple[Path, Path], tmp_path: Path
) -> None:
    """Not when the model's turn comes, which may be hours later."""
    for name in ("text", "mmproj-one", "mmproj-two"):
        (tmp_path / f"{name}.gguf").symlink_to(demo_files[name != "text"])
    models = (*settings.models, run.ModelFiles("text", tmp_path / "text.gguf"))
    with pytest.raises(EdgeCspError, match="2 mmproj files lie beside"):
        replace(settings, models=models)


def test_settings_that_make_no_sense(settings: run.Settings) -> None:
    for change, words in (
        ({"protocols": ("never",)}, "never"),
        ({"policies": ()}, "no policy"),
        ({"policies": ("csp", "csp")}, "twice"),
        ({"models": settings.models * 2}, "twice"),
        ({"budgets": ("200%",)}, "200%"),
    ):
        with pytest.raises(EdgeCspError, match=words):
            replace(settings, **change)


# --- what comes out ---


def test_report_and_marks(settings: run.Settings, whole: list[dict[str, Any]]) -> None:
    found = report.Summaries(settings, whole, "csp")
    text = report.markdown(found)
    assert "edge-csp bench quality -m demo --policy full --policy csp --policy downsample" in text
    for protocol in report.REPORTED:
        assert f"\n`{protocol}`: " in text
    assert text.splitlines()[2] == "<!-- Written by `edge-csp bench quality`; do not edit. -->"
    assert "## Where `csp` is behind" in text
    assert "llama-cpp-python 0.3.36" in text
    assert "/" not in text.split("## Answers")[0]  # no paths of this machine
    forged = [row | {"right": row["policy"] != "csp"} for row in whole]
    assert not report.Summaries(settings, forged, "csp").ahead()  # the others have more cells
    forged = [row | ({"n_cell": row["n_budget"]} if row["policy"] == "downsample" else {}) for row in forged]
    ahead = report.Summaries(settings, forged, "csp").ahead()
    assert {(one.policy, one.protocol) for one in ahead} == {
        ("downsample", protocol) for protocol in report.REPORTED if protocol != "bounded"
    }
    text = report.markdown(report.Summaries(settings, forged, "csp"))
    rows = [line for line in text.splitlines() if line.startswith("| `csp`") and "<br>" in line]
    assert [report.BEHIND in row for row in rows] == [protocol != "bounded" for protocol in report.REPORTED]
    assert sum(report.AHEAD in line for line in text.splitlines() if line.startswith("| `downsample`")) == len(rows) - 1
    assert "| before | 20% | `downsample` | " in text.split("## Where `csp` is behind")[1].split("## Cells")[0]
    assert "Nowhere" in report.markdown(report.Summaries(settings, whole, "full"))


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["bench", "quality", "--pictures", "2,3", "--albums", "1", "--questions", "2", "--budget", "20%"]
    out, file = tmp_path / "out.jsonl", tmp_path / "quality.md"
    more = ["--policy", "full", "--policy", "csp:pool=1", "--against", "csp:pool=1"]
    assert main([*quick, *more, "--out", str(out), "--report", str(file)]) == 0
    assert "csp:pool=1" in capsys.readouterr().out
    text = file.read_text(encoding="utf-8")
    assert "## Pictures 2" in text
    assert "## Pictures 3" in text
    assert "--pictures 2,3" in text
    assert len(lines(out)) == 2 * (2 * (2 * 4) + 3 + 5)


def test_the_command_names_files(
    settings: run.Settings, whole: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No folders of this machine, but those that lie below where it was run."""
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    found = report.Summaries(settings, whole, None)
    files = run.ModelFiles("a", Path("models/a.gguf")), run.ModelFiles("b", tmp_path / "b.gguf")
    found.settings = replace(settings, models=files)
    assert report.command(found).startswith("edge-csp bench quality -m models/a.gguf -m b --policy")


def test_plot(settings: run.Settings, whole: list[dict[str, Any]], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report.write_plot(tmp_path / "quality.png", report.Summaries(settings, whole, None))
    with Image.open(tmp_path / "quality.png") as drawn:
        assert drawn.size[0] > 1000
    with pytest.raises(BenchError, match="cannot be written"):
        report.write_plot(tmp_path / "missing" / "quality.png", report.Summaries(settings, whole, None))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--pictures", "many"], "'many'"),
        (["--against", "csp", "--policy", "full"], "none of the policies full"),
        (["--mmproj", "a.gguf", "--mmproj", "b.gguf"], "2 --mmproj were given for 1 models"),
        (["--policy", "nonsense"], "nonsense"),
        (["-m", "missing.gguf"], "missing.gguf"),
        (["--folder", "missing"], "missing"),
    ],
)
def test_errors_take_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "quality", *arguments]) == 1
    error = capsys.readouterr().err.strip()
    assert words in error
    assert "\n" not in error
