"""`run` and `info`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.cli.conftest import Cli

ANY_SIZE = ["--min-cells", "0"]


def test_answer_on_stdout_notes_on_stderr(cli: Cli, model: list[str], pictures: list[Path], tmp_path: Path) -> None:
    grey = tmp_path / "grey.png"
    Image.open(pictures[0]).convert("L").save(grey)
    result = cli("run", "-p", "What is in picture 1?", "--image", grey, *model)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
    assert "\x1b" not in result.stdout + result.stderr
    note, kept = result.stderr.splitlines()
    assert note == f"{grey}: greyscale converted to RGB"
    assert kept.startswith("kept ")


@pytest.mark.parametrize("policy", ["csp", "snapkv", "streaming", "random", "full"])
def test_json_adds_up(cli: Cli, model: list[str], pictures: list[Path], policy: str) -> None:
    images = [argument for path in pictures[:3] for argument in ("--image", path)]
    result = cli(
        "run",
        "-p",
        "What is in picture 1?",
        *images,
        "--budget",
        "40%",
        *ANY_SIZE,
        "--policy",
        policy,
        "--json",
        *model,
    )
    got = json.loads(result.stdout)
    n_answer = got["times"]["n_generated"]
    n_prompt = got["cells"] - n_answer
    assert got["kept"] - n_answer == (n_prompt if policy == "full" else n_prompt * 2 // 5)
    assert [Path(picture["name"]) for picture in got["pictures"]] == pictures[:3]
    for what in ("cells", "kept"):
        assert sum(picture[what] for picture in got["pictures"]) == pytest.approx(got["image"][what])
        assert got["image"][what] + got["text"][what] == pytest.approx(got[what])
    assert got["bytes_kept"] == got["kept"] * got["bytes_per_cell"]
    assert (got["policy"], got["budget"]) == (policy, "40%")
    assert got["finish_reason"] in ("stop", "length")
    assert got["times"]["n_generated"] <= 8


def test_a_policy_of_the_user(cli: Cli, model: list[str], pictures: list[Path], tmp_path: Path) -> None:
    """It is asked, with its settings, for every layer."""
    (tmp_path / "mine.py").write_text(MINE, encoding="utf-8")
    policy = f"{tmp_path / 'mine.py'}:Mine"
    ask = ["run", "-p", "What is in picture 1?", "--image", pictures[0], "--budget", "40%", *ANY_SIZE, *model]
    ask += ["--policy", policy]
    result = cli(*ask, "--policy-set", "seen=a word", "--json")
    assert json.loads(result.stdout)["policy"] == policy
    assert "a word, layer 3" in result.stderr
    assert "Traceback" not in result.stderr
    result = cli(*ask, "--policy-set", "wrong=on")
    assert result.returncode == 1
    assert "policy mine broke its contract: layer 0, head 0 keeps" in result.stderr


MINE = """
import sys
from dataclasses import dataclass
from typing import ClassVar

from edge_csp.policy import StreamingPolicy

@dataclass(frozen=True)
class Mine(StreamingPolicy):
    name: ClassVar[str] = "mine"
    seen: str = ""
    wrong: bool = False

    def pick(self, observation, n_keep, protected):
        for il in range(observation.shape[0]):
            print(f"{self.seen}, layer {observation.first_layer + il}", file=sys.stderr)
        return super().pick(observation, n_keep + self.wrong, protected)
"""


def test_seed_repeats_an_answer(cli: Cli, model: list[str]) -> None:
    hot = ["run", "-p", "Hello", *model, "--temp", "5", "--top-k", "0", "--top-p", "1", "--min-p", "0", "--json"]
    first = json.loads(cli(*hot).stdout)
    second = json.loads(cli(*hot, "-s", first["seed"]).stdout)
    assert first["answer"] == second["answer"]


def test_prompt_from_stdin(cli: Cli, model: list[str]) -> None:
    expected = cli("run", "-p", "What is in picture 1?", *model).stdout
    assert cli("run", *model, stdin="What is in picture 1?\n").stdout == expected
    assert cli("run", "-p", "-", *model, stdin="What is in picture 1?\n").stdout == expected
    assert "the prompt is empty" in cli("run", *model).stderr


def test_grammar_and_length(cli: Cli, model: list[str], tmp_path: Path) -> None:
    (tmp_path / "a.gbnf").write_text('root ::= "a" root', encoding="utf-8")
    for arguments in (["--grammar-file", tmp_path / "a.gbnf"], ["--grammar", 'root ::= "a" root']):
        assert cli("run", "-p", "Hello", *model, *arguments, "-n", 3).stdout == "aaa\n"


def test_info(cli: Cli, demo_files: tuple[Path, Path]) -> None:
    result = cli("info", *demo_files)
    assert result.returncode == 0
    for word in ("a text model", "KV heads", "projector", "bytes per cell"):
        assert word in result.stdout
    result = cli("info", "--json", *demo_files)
    assert [info["kind"] for info in json.loads(result.stdout)] == ["text", "mmproj"]
    result = cli("info", demo_files[0], "/no/such.gguf")
    assert (result.returncode, result.stderr) == (1, "edge-csp: error: /no/such.gguf: no such file\n")
    assert "a text model" in result.stdout
