"""Bad input, each through the real program: one clear line on stderr, a failing status, no traceback, no abort."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.cli.conftest import Cli
from tests.oracle.random_models import make_model

Refused = Callable[..., None]


@pytest.fixture
def refused(cli: Cli) -> Refused:
    """Check that a command fails with one line that has all of the words."""

    def check(*arguments: object, words: tuple[object, ...], status: int = 1, stdin: str = "") -> None:
        result = cli(*arguments, stdin=stdin)
        assert result.returncode == status, result.stderr
        assert result.stdout == ""
        lines = result.stderr.splitlines()
        assert len(lines) == 1, result.stderr
        assert re.match(r"edge-csp: error: \S", lines[0])
        for word in words:
            assert str(word) in lines[0]

    return check


def ask(model: list[str], *arguments: object) -> list[object]:
    return ["run", "-p", "What is this?", *model, *arguments]


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_missing_file(refused: Refused, tmp_path: Path) -> None:
    refused("run", "-p", "hi", "-m", tmp_path / "no.gguf", words=(tmp_path / "no.gguf", "no such file"))


def test_truncated_gguf(refused: Refused, tmp_path: Path, demo_files: tuple[Path, Path]) -> None:
    content = demo_files[0].read_bytes()
    for name, size in (("head.gguf", 1000), ("data.gguf", len(content) * 3 // 4)):
        (tmp_path / name).write_bytes(content[:size])
        refused("run", "-p", "hi", "-m", tmp_path / name, words=(name, "cut off"))


def test_text_file(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "notes.gguf").write_text("Dear diary\n", encoding="utf-8")
    refused("run", "-p", "hi", "-m", tmp_path / "notes.gguf", words=("notes.gguf", "not a GGUF file"))


def test_mmproj_and_model_exchanged(refused: Refused, demo_files: tuple[Path, Path]) -> None:
    text, mmproj = demo_files
    refused("run", "-p", "hi", "-m", mmproj, words=(mmproj, "mmproj"))
    refused("run", "-p", "hi", "-m", mmproj, "--mmproj", text, words=(mmproj, text, "exchange them"))
    refused("run", "-p", "hi", "-m", text, "--mmproj", text, words=(text, "not an mmproj"))


def test_mmproj_of_another_model(refused: Refused, tmp_path: Path, demo_files: tuple[Path, Path]) -> None:
    other = make_model(tmp_path / "other.gguf", "llama", n_layer=1, n_head=3, n_head_kv=1, head_dim=16)
    words = ("it is the mmproj of another model", demo_files[1], other)
    refused("run", "-p", "hi", "-m", other, "--mmproj", demo_files[1], words=words)


def test_pictures_that_are_none(refused: Refused, model: list[str], tmp_path: Path) -> None:
    jpeg, empty, huge = tmp_path / "cut.jpg", tmp_path / "empty.png", tmp_path / "huge.png"
    Image.effect_noise((200, 200), 50).convert("RGB").save(jpeg)
    jpeg.write_bytes(jpeg.read_bytes()[:2000])
    empty.touch()
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    huge.write_bytes(b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b""))
    refused(*ask(model, "--image", jpeg), words=(jpeg, "damaged or cut off"))
    refused(*ask(model, "--image", empty), words=(empty, "empty (0 bytes)"))
    refused(*ask(model, "--image", huge), words=(huge, "2500000000 pixels", "the limit is"))
    huge.write_bytes(huge.read_bytes()[:33])
    refused(*ask(model, "--image", huge), words=(huge, "PNG without its data"))
    refused(*ask(model, "--image", tmp_path / "no.png"), words=("no.png", "no such file"))
    refused("chat", *model, "--image", empty, words=(empty, "empty (0 bytes)"))


@pytest.mark.parametrize("budget", ["0", "-1", "200%", "nan"])
def test_budget(refused: Refused, model: list[str], budget: str) -> None:
    refused(*ask(model, "--budget", budget), words=(f"budget {budget!r}",))
    refused("chat", *model, "--budget", budget, words=(f"budget {budget!r}",))
    refused("demo", "--budget", budget, words=(f"budget {budget!r}",))


def test_prompt_longer_than_the_context(refused: Refused, model: list[str]) -> None:
    words = ("the prompt needs", "the context has 256", "-c")
    refused("run", *model, "-c", 256, "--policy", "full", stdin="What is this? " * 200, words=words)


def test_unknown_repository_offline(refused: Refused) -> None:
    refused("run", "-p", "hi", "-hf", "nobody/nothing", "--offline", words=("nobody/nothing", "not in the cache"))
    refused("run", "-p", "hi", "-hf", "nothing", "--offline", words=("nothing", "user/repo"))


def test_no_model(refused: Refused) -> None:
    for command in (["run", "-p", "hi"], ["chat"]):
        refused(*command, words=("-m", "-hf", "edge-csp demo"))
    refused("run", "-p", "hi", "-m", "a.gguf", "-hf", "a/b", words=("both -m and -hf",))


def test_settings_out_of_range(refused: Refused, model: list[str]) -> None:
    for option, value, word in (
        ("--policy", "best", "blend, blend+, csp, full, h2o"),
        ("--cross-ratio", "0.5", "policy blend does not know cross_ratio"),
        ("--softmax-n", "-1", "softmax_n"),
        ("--n-recent", "-1", "n_recent"),
        ("--min-cells", "-1", "min_cells"),
        ("--temp", "nan", "temperature"),
        ("-ctk", "q9", "K cache type"),
        ("-fa", "maybe", "flash attention"),
        ("-j", "{", "JSON"),
        ("--grammar-file", "/no/such/file", "cannot be read"),
    ):
        refused(*ask(model, option, value), words=(word,))
    refused(*ask(model, "--policy", "random", "--cross-ratio", "0.5"), words=("cross_ratio",))
    refused(*ask(model, "--policy", "no.such.module:Policy"), words=("no.such.module:Policy", "cannot be loaded"))
    refused(*ask(model, "--policy", "csp", "--policy-set", "pool=two"), words=("pool", "'two'", "a whole number"))


def test_wrong_usage(refused: Refused, model: list[str]) -> None:
    refused(*ask(model, "--frobnicate"), words=("--frobnicate",), status=2)
    refused(*ask(model, "-b", "0"), words=("-b",), status=2)
    refused(*ask(model, "-ngl", "many"), words=("-ngl",), status=2)
    refused("talk", words=("talk",), status=2)
    refused("info", words=("FILE",), status=2)


def test_a_text_model_takes_no_pictures(
    refused: Refused, demo_files: tuple[Path, Path], pictures: list[Path], tmp_path: Path
) -> None:
    alone = tmp_path / "alone.gguf"
    alone.write_bytes(demo_files[0].read_bytes())
    words = (alone, "has no mmproj")
    refused("run", "-p", "hi", "-m", alone, "--image", pictures[0], words=words)
    refused("chat", "-m", alone, "--image", pictures[0], words=words)
