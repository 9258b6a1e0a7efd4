"""`--cells`: what `run` and `chat` say and do with a bounded cache."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.cli.conftest import Cli


def test_run_in_a_bounded_cache(cli: Cli, model: list[str], pictures: list[Path]) -> None:
    images = [argument for path in pictures for argument in ("--image", path)]
    result = cli("run", "-p", "What is in picture 1?", *images, "--cells", "200", "--json", *model)
    assert result.returncode == 0, result.stderr
    got = json.loads(result.stdout)
    assert got["cells"] > 8 * 64
    assert got["kept"] <= got["cells_max"] == 200
    assert got["budget"] is None
    assert f"the cache of 200 cells was full while reading: evicted {got['evicted']}" in result.stderr or (
        "full while reading" in result.stderr and got["evicted"] > 0
    )


def test_a_share_of_the_prompt(cli: Cli, model: list[str], pictures: list[Path]) -> None:
    images = [argument for path in pictures[:4] for argument in ("--image", path)]
    question = ["run", "-p", "What is in picture 1?", *images, "--json", *model]
    whole = json.loads(cli(*question, "--budget", "100%").stdout)
    half = json.loads(cli(*question, "--cells", "50%").stdout)
    assert half["cells_max"] == (whole["cells"] - whole["times"]["n_generated"]) // 2
    assert half["cells"] == whole["cells"]


def test_chat_pins_and_tells(cli: Cli, model: list[str], pictures: list[Path]) -> None:
    script = [f'/image "{pictures[0]}"', "What is in picture 1?", "/pin 1", "/pin 2", "/pin turn 7", "/pin", "/budget"]
    for path in pictures[1:]:
        script += [f'/image "{path}"', "Which digit is in picture 1?"]
    script += ["/images", "/stats", "/unpin 1", "/pin turn", "/pin system"]
    result = cli("chat", *model, "--cells", "220", stdin="\n".join(script))
    assert result.returncode == 0, result.stderr
    errors = [line for line in result.stderr.splitlines() if "error" in line]
    assert [error.split("error: ")[1][:20] for error in errors] == [
        "there is no picture ", "there is no turn 7: ", "/pin needs the numbe", "there is no turn 0: ",
    ]  # fmt: skip
    assert re.search(r"picture 1\.png \(pinned\) +64 +64\.0 +100\.0%", result.stdout)
    assert "budget all that fits" in result.stdout
    assert "bounded to 220 cells of" in result.stdout
    assert "flash attention" in result.stdout
    assert result.stderr.count("the cache of 220 cells was full while reading") >= 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--cells", "8"], "a cache of 8 has 8 cells: it takes at least 16"),
        (["--cells", "lots"], "budget 'lots' is not a number"),
        (["--cells", "64", "--policy", "full"], "policy full keeps everything"),
        (["--past-trained", "never"], "past_trained is 'never': use continue or stop"),
    ],
)
def test_bad_bounds(cli: Cli, model: list[str], arguments: list[str], words: str) -> None:
    result = cli("run", "-p", "Hello", *model, *arguments)
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert words in result.stderr
    assert result.stdout == ""


def test_a_chat_has_no_prompt_to_be_a_share_of(cli: Cli, model: list[str]) -> None:
    result = cli("chat", *model, "--cells", "50%")
    assert (result.returncode, len(result.stderr.splitlines())) == (1, 1)
    assert "no prompt" in result.stderr


def test_demo_in_a_bounded_cache(cli: Cli) -> None:
    result = json.loads(cli("demo", "--cells", "40%", "--budget", "100%", "--json").stdout)
    first = result["questions"][0]
    assert first["pruned"]["kept"] < 0.5 * first["full"]["kept"]
