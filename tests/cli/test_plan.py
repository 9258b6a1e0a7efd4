"""`edge-csp plan`: the tables, the JSON, and what is wrong, each through the real program."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Cli
from tests.oracle.random_models import make_model


def test_tables(cli: Cli) -> None:
    result = cli("plan", "-m", "demo", "--images", 40, "--budget", "20%")
    assert (result.returncode, result.stderr) == (0, "")
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["40", "pictures", "of", "64x64", "64", "2560", "2.5", "MiB"] in rows
    assert ["text", "1152", "1.1", "MiB"] in rows  # 512 and 16 per picture
    assert ["the", "whole", "conversation", "3712", "3.6", "MiB"] in rows
    assert ["kept", "742", "742.0", "KiB"] in rows
    assert ["-c", "3840", "--cells", "990"] in rows
    assert ["KV", "cache", "3.8", "MiB", "1.0", "MiB"] in rows
    assert any(row[:1] == ["peak"] for row in rows)


def test_json_adds_up(cli: Cli) -> None:
    options = ["--images", 3, "--text-tokens", 100, "-b", 128, "-ctk", "q8_0", "--cells", 200, "--no-mmap"]
    plan = json.loads(cli("plan", "-m", "demo", *options, "--json").stdout)
    assert (plan["n_cell"], plan["n_kept"], plan["mapped"]) == (3 * 64 + 100, 200, False)
    assert plan["bytes_per_cell"] == 4 * 2 * (34 + 64)  # layers, KV heads, K and V of a head
    assert (plan["bounded"]["n_cell"], plan["bounded"]["n_ctx"]) == (200, 256)
    assert plan["whole"]["kv"] == 512 * plan["bytes_per_cell"]
    outside = sum(plan[name] for name in ("weights", "repacked", "encoder", "embeddings", "logits"))
    for cache in (plan["whole"], plan["bounded"]):
        inside = sum(cache[name] for name in ("kv", "compute", "work", "ring", "scores"))
        assert cache["peak"] > plan["loading"] >= plan["weights"] + plan["repacked"]
        assert cache["peak"] == outside + plan["picture"]["scratch"] + inside


def test_notes(cli: Cli) -> None:
    result = cli("plan", "-m", "demo", "--images", 100, "-c", 2048)
    assert result.returncode == 0
    assert result.stderr.splitlines() == [
        "the conversation takes 8512 positions, but the model was trained on 4096",
        "the conversation needs 8512 cells, but the context has 2048: raise -c, or give --cells 2270",
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-m", "no.gguf"], ("no.gguf", "no such file")),
        (["-m", "demo", "--budget", "10B"], ("budget 10B", "1024 bytes")),
        (["-m", "demo", "--budget", "0"], ("budget '0'",)),
        (["-m", "demo", "--cells", "nan"], ("budget 'nan'",)),
        (["-m", "demo", "--cells", "3"], ("a cache of 3", "at least 16")),
        (["-m", "demo", "--images", "1", "--image-size", "64"], ("picture size '64'", "640x480")),
        (["-m", "demo", "--images", "1", "--image-size", "64x99999"], ("64x99999", "4096")),
        (["-m", "demo", "--images", "100000000"], ("8000000512 cells", "2147483647")),
        (["-m", "demo", "-ctv", "q9"], ("V cache type", "q9")),
        (["-m", "demo", "-fa", "off", "-ctv", "q8_0"], ("V q8_0", "flash_attn")),
        ([], ("-m", "-hf")),
    ],
)
def test_refused(cli: Cli, options: list[str], words: tuple[str, ...]) -> None:
    result = cli("plan", *options)
    assert (result.returncode, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("edge-csp: error: ")
    for word in words:
        assert word in line


def test_a_text_model_has_no_pictures(cli: Cli, tmp_path: Path) -> None:
    path = make_model(tmp_path / "text.gguf", "llama")
    assert cli("plan", "-m", path).returncode == 0
    result = cli("plan", "-m", path, "--images", 2)
    assert result.returncode == 1
    assert f"{path} has no mmproj: it cannot read pictures" in result.stderr
