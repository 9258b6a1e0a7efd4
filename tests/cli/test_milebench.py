"""`bench milebench` from end to end: a small set in the official layout, the embedded model, pictures of its album."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_csp.bench.milebench import runner
from edge_csp.cli import bench_milebench, main
from edge_csp.session import Session

ALBUM = Path(__file__).parents[2] / "edge_csp/demo/album"
OPTIONS = ["-m", "demo", "-t", "1", "-n", "6", "--embedding-cache", "off", "--budget", "20%"]
PUBLISHED = ["sample_id", "image", "question", "gt_response", "gen_model_id", "pred_response", "gen_kwargs"]
Run = Callable[..., tuple[int, list[str]]]


def write_set(data_dir: Path, name: str, kind: str, samples: list[dict[str, Any]]) -> None:
    (data_dir / name / "images").mkdir(parents=True)
    for file in ALBUM.glob("*.png"):
        shutil.copy(file, data_dir / name / "images")
    data = [
        {
            "sample_id": number,
            "task_instruction_id": 0,
            "response": sample.pop("response", "a red 7"),
            "task_instance": sample,
        }
        for number, sample in enumerate(samples)
    ]
    content = {"meta_data": {"question_type": kind, "task_instruction": ["Look at the pictures."]}, "data": data}
    (data_dir / name / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """Three sets: two pictures to compare, choices about three, and a text that is too long."""
    folder = tmp_path / "MileBench"
    pairs = [(f"{i:02}.png", f"{i + 1:02}.png") for i in range(1, 6)]
    changes = [{"context": "{image#1}{image#2}What has changed?", "images_path": pair} for pair in pairs]
    write_set(folder, "CLEVR-Change", "open-ended", changes)
    context = "This is Nan. {image#1} This is Roy. {image#2}{image#3}What is in picture 2?"
    choice = {"context": context, "choice_list": ["a red 7", "a blue 3"], "images_path": ["01.png", "02.png", "03.png"]}
    write_set(folder, "DocVQA", "multi-choice", [dict(choice) for _ in range(3)])
    needle = {"context": "The code is 4. " * 100 + "What is the code?", "images_path": [], "response": "4"}
    write_set(folder, "TextNeedleInAHaystack", "open-ended", [needle])
    return folder


@pytest.fixture
def run(data_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run the command on the three sets; the exit status and the lines on stderr."""

    def run(*arguments: object, out: str = "out") -> tuple[int, list[str]]:
        sets = ["--dataset", "CLEVR-Change,DocVQA,TextNeedleInAHaystack", "--out", tmp_path / out]
        status = main(["bench", "milebench", str(data_dir), *OPTIONS, *map(str, [*sets, *arguments])])
        return status, capfd.readouterr().err.splitlines()

    return run


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def answers(folder: Path) -> list[Any]:
    """What is in pred.jsonl, without times."""
    return [json.loads(line) for line in (folder / "pred.jsonl").read_text(encoding="utf-8").splitlines()]


def test_defaults_are_those_of_the_runner() -> None:
    for name in ("MAX_PROMPT", "N_PREDICT", "TEMPLATE_ROOM"):
        assert getattr(bench_milebench, name) == getattr(runner, name)


def test_files_are_the_published_ones(run: Run, tmp_path: Path, data_dir: Path) -> None:
    status, said = run("--max-prompt", "300")
    assert (status, len(said)) == (0, 3)
    out = tmp_path / "out"
    found = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}
    names = "pred.json", "pred.jsonl", "eval.json", "eval_score.json"
    sets = "CLEVR-Change", "DocVQA", "TextNeedleInAHaystack"
    extracted = "DocVQA/pred_with_extracted.json"
    assert found == {"settings.json", extracted} | {f"{one}/{name}" for one in sets for name in names}

    changes = read(out / "CLEVR-Change/pred.json")
    assert [list(one) for one in changes] == [PUBLISHED] * 5
    assert changes[1]["question"] == "Look at the pictures.\n<ImageHere><ImageHere>What has changed?"
    assert changes[1]["image"] == [str(data_dir / f"CLEVR-Change/images/{name}.png") for name in ("02", "03")]
    assert changes[1]["gen_kwargs"] == {"max_new_tokens": 6, "do_sample": False}
    assert all(one["pred_response"] == one["pred_response"].strip() != "" for one in changes)
    for one in answers(out / "CLEVR-Change"):
        assert one["n_kept"] == one["n_cell"] // 5  # the budget

    choice = read(out / extracted)[0]
    assert choice["question"].endswith("\nChoice list: \nA. a red 7\nB. a blue 3\nYour answer is: ")
    assert (choice["choice_list"], choice["image_quantity_level"]) == (["a red 7", "a blue 3"], "Few")
    assert choice["result"] == (choice["extracted"] == "A")
    assert read(out / "DocVQA/eval.json")["image_quantity_level-Result"]["Few"] == [3 * choice["result"], 3]

    needle = read(out / "TextNeedleInAHaystack/pred.json")[0]
    text = "The code is 4. " * 100 + "What is the code?"
    assert text.endswith(needle["question"].removeprefix("Look at the pictures.\n"))
    assert 200 < len(needle["question"]) < len(text)


def test_interrupted_run_goes_on(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(out="whole")[0] == 0
    prefill, asked = Session.prefill, list[str]()

    def interrupted(self: Session, *arguments: Any, **settings: Any) -> Any:
        if len(asked) == 7:
            raise KeyboardInterrupt
        asked.append("")
        return prefill(self, *arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "prefill", interrupted)
        assert run()[0] == 130
    file = tmp_path / "out/DocVQA/pred.jsonl"
    before = file.read_bytes()
    assert before.count(b"\n") == 2
    file.write_bytes(before + before[:40])  # as if it had been killed while writing

    asked.clear()
    with monkeypatch.context() as patch:
        patch.setattr(Session, "prefill", lambda *a, **s: asked.append("") or prefill(*a, **s))
        status, said = run()
    assert (status, len(asked)) == (0, 2)
    assert said[1] == f"edge-csp: error: {file}: the last line was cut off, its sample has no answer"
    assert file.read_bytes().startswith(before)
    for one in (tmp_path / "whole").rglob("*.json*"):
        assert (tmp_path / "out" / one.relative_to(tmp_path / "whole")).read_bytes() == one.read_bytes(), one

    status, said = run("--budget", "30%")
    assert status == 1
    assert said[-1] == (
        f"edge-csp: error: {tmp_path / 'out'} holds answers made with budget '20%', not '30%': "
        "give another folder with --out, or delete that one"
    )
    capfd.readouterr()
    assert main(["bench", "milebench-score", str(tmp_path / "out")]) == 0  # also from the lines alone


def test_what_is_damaged_is_left_out(run: Run, tmp_path: Path, data_dir: Path) -> None:
    images = data_dir / "CLEVR-Change/images"
    (images / "02.png").unlink()
    whole = (images / "05.png").read_bytes()
    (images / "05.png").write_bytes(whole[:200])
    (data_dir / "DocVQA/DocVQA.json").write_text("{", encoding="utf-8")
    status, said = run("--dataset", "CLEVR-Change,DocVQA,TQA,TextNeedleInAHaystack")
    assert status == 1
    expected = [
        ("sample 0 is left out", images / "02.png"),
        ("sample 1 is left out", images / "02.png"),
        ("sample 3 is left out", images / "05.png"),
        ("sample 4 is left out", images / "05.png"),
        ("CLEVR-Change: ", "from 1 answers"),
        (data_dir / "DocVQA/DocVQA.json", "cannot be read"),
        (data_dir / "TQA/TQA.json", "cannot be read"),
        ("TextNeedleInAHaystack: ", "from 1 answers"),
        ("6 left out", "see above"),
    ]
    assert len(said) == len(expected)
    for line, words in zip(said, expected, strict=True):
        assert all(str(word) in line for word in words), line

    (images / "05.png").write_bytes(whole)
    shutil.copy(images / "01.png", images / "02.png")
    status, said = run("--dataset", "CLEVR-Change")
    assert (status, len(said)) == (0, 1)
    assert [one["sample_id"] for one in answers(tmp_path / "out/CLEVR-Change")] == [2, 0, 1, 3, 4]
    assert [one["sample_id"] for one in read(tmp_path / "out/CLEVR-Change/pred.json")] == [0, 1, 2, 3, 4]


def test_limit_and_bounded_cache(run: Run, tmp_path: Path) -> None:
    status, said = run("--limit", "1", "--cells", "192", "--max-prompt", "400")
    assert (status, len(said)) == (0, 3)
    for name in ("CLEVR-Change", "DocVQA", "TextNeedleInAHaystack"):
        (found,) = answers(tmp_path / "out" / name)
        assert found["n_kept"] <= 192


def test_score_only(run: Run, tmp_path: Path, data_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("--limit", "2")[0] == 0
    out, scored = tmp_path / "out", tmp_path / "scored"
    (out / "DocVQA/pred.jsonl").unlink()
    assert main(["bench", "milebench-score", str(out), "--out", str(scored)]) == 0
    assert "DocVQA" in capfd.readouterr().out
    for name in ("eval.json", "eval_score.json", "pred_with_extracted.json"):
        expected = read(out / "DocVQA" / name)
        if name == "pred_with_extracted.json":
            for one in expected:
                one["image"] = [str(data_dir / "DocVQA/images" / image) for image in one["image"]]
        assert read(scored / "DocVQA" / name) == expected
    arguments = ["bench", "milebench-score", str(out), "--data-dir", str(data_dir), "--out", str(scored)]
    assert main(arguments) == 1
    assert f"{out / 'CLEVR-Change'}: 3 samples of the set have no prediction" in capfd.readouterr().err
    assert read(scored / "DocVQA/pred_with_extracted.json") == read(out / "DocVQA/pred_with_extracted.json")


def test_usage(run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str], demo_files: tuple[Path, Path]) -> None:
    for arguments, words in (
        (["--dataset", "ALFRED,none"], "dataset 'none' is unknown"),
        (["-c", "512"], "a context of 512 cells is too small for prompts of 4096 tokens"),
        (["--cells", "20%"], "has no prompt yet to be a share of"),
    ):
        status, said = run(*arguments)
        assert status == 1
        assert words in said[-1]
    assert not (tmp_path / "out").exists()
    alone = shutil.copy(demo_files[0], tmp_path / "alone.gguf")
    status, said = run("-m", alone)
    assert (status, said[-1].startswith("edge-csp: error: ")) == (1, True)
    assert "has no mmproj (--mmproj): it cannot read pictures" in said[-1]
    assert main(["bench", "milebench", str(tmp_path / "nothing"), "-m", "demo"]) == 1
    assert "nothing is no folder" in capfd.readouterr().err
    assert main(["bench", "milebench-score", str(tmp_path)]) == 1
    assert "holds no predictions" in capfd.readouterr().err
