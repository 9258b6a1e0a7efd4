"""`demo`: runs, and its numbers add up. With the embedded model, its answers have to stay right."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edge_csp.cli import demo, main, options

HAS_DEMO = (options.DEMO / "demo-text-f16.gguf").exists()


@pytest.fixture
def album(tmp_path: Path, demo_files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model and an album of three pictures."""
    for file, name in zip(demo_files, ("demo-text-f16.gguf", "demo-mmproj-f16.gguf"), strict=True):
        shutil.copy(file, tmp_path / name)
    (tmp_path / "album").mkdir()
    random = np.random.default_rng(0)
    content: list[dict[str, str]] = []
    for number in (1, 2, 3):
        Image.fromarray(random.integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / "album" / f"{number}.png")
        content += [{"type": "text", "text": "This is Max."}, {"type": "image", "image": f"{number}.png"}]
    questions = [{"q": "What is in picture 1?", "a": "a dog"}, {"q": "Who is in picture 2?", "a": "Max"}]
    data = {"messages": [{"role": "user", "content": content}], "questions": questions}
    (tmp_path / "album" / "album.json").write_text(json.dumps(data), encoding="utf-8")
    monkeypatch.setattr(options, "DEMO", tmp_path)
    return tmp_path


@pytest.mark.usefixtures("album")
def test_numbers_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "-t", "1", "--budget", "30%", "--min-cells", "0", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["n_question"], result["pictures_encoded"], result["budget"]) == (2, 3, "30%")
    for question in result["questions"]:
        full, pruned = question["full"], question["pruned"]
        assert full["kept"] == full["cells"] == pruned["cells"]
        assert pruned["kept"] == pruned["cells"] * 3 // 10
        for side in (full, pruned):
            assert side["bytes_kept"] == side["kept"] * side["bytes_per_cell"]
            in_pictures = sum(picture["kept"] for picture in side["pictures"])
            assert in_pictures + side["text"]["kept"] == pytest.approx(side["kept"])


@pytest.mark.usefixtures("album")
def test_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "-t", "1"]) == 0
    shown = capsys.readouterr()
    assert demo.WHAT_IT_IS in shown.err
    assert "answers right with the full cache, " in shown.out.splitlines()[-1]
    table = shown.out[shown.out.index("Cells at") :].split("\n\n")[0]
    rows = {line.split()[0]: line.split() for line in table.splitlines()[2:]}
    kept = [float(rows[name][3]) for name in ("1", "2", "3")]
    assert sum(kept) == pytest.approx(float(rows["pictures"][2]))
    assert float(rows["pictures"][2]) + float(rows["text"][2]) == pytest.approx(float(rows["all"][2]))


def test_missing_files(album: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (album / "album" / "album.json").write_text("{}", encoding="utf-8")
    assert main(["demo", "-t", "1"]) == 1
    assert "the embedded album is damaged" in capsys.readouterr().err
    shutil.rmtree(album / "album")
    assert main(["demo", "-t", "1"]) == 1
    assert "the embedded album is not installed" in capsys.readouterr().err
    (album / "demo-mmproj-f16.gguf").unlink()
    assert main(["demo", "-t", "1"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["run", "-m", "demo", "-p", "hi"]) == 1
    assert "the embedded model is not installed" in capsys.readouterr().err


@pytest.mark.skipif(not HAS_DEMO, reason="the embedded model is not there")
def test_embedded_model_stays_right(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "-t", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["right_full"] >= 0.9 * result["n_question"]
    assert result["right_pruned"] >= result["right_full"] - 0.1 * result["n_question"]
