"""`map` and `/map`: pictures, bars, and what they refuse."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edge_csp import Picture, load_picture, open_session
from edge_csp.cli import main, map
from edge_csp.errors import EdgeCspError
from edge_csp.overlay import DARKEST
from tests.cli.conftest import Cli
from tests.oracle.random_mmproj import make_mmproj

BAR = re.compile(r"^(.+?)  +([\d.]+) +(\d+) +([\d.]+%|-) *[━╸ ]*$", re.MULTILINE)


def bars(out: str) -> dict[str, tuple[float, int]]:
    return {name.strip(): (float(kept), int(n_cell)) for name, kept, n_cell, _ in BAR.findall(out)}


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(float)


def test_embedded_album(cli: Cli, tmp_path: Path) -> None:
    result = cli("map", "-t", "1", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "wrote 13 pictures" in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"kept.png", *(f"kept-{i:02}.png" for i in range(1, 13))}
    found = bars(result.stdout)
    assert [found[f"{i} {i:02}.png"][1] for i in range(1, 13)] == [64] * 12
    assert {"turn 1, text", "turn 2, text"} < set(found)
    n_kept, n_cell = (sum(row[i] for row in found.values()) for i in (0, 1))
    assert n_kept == pytest.approx(n_cell // 5, abs=0.5)
    assert pixels(tmp_path / "kept.png").shape == (3 * 260 + 4, 4 * 260 + 4, 3)


def test_pictures_of_the_user_and_layers(cli: Cli, model: list[str], pictures: list[Path], tmp_path: Path) -> None:
    given = [option for path in pictures[:2] for option in ("--image", path)]
    options = [*model[: model.index("--temp")], "--embedding-cache", "off", *given, "-p", "What is in picture 1?"]
    result = cli("map", *options, "--budget", "40%", "--out", tmp_path, "--layer", "all")
    assert result.returncode == 0, result.stderr
    layers = [f"-layer-{il:02}" for il in range(4)]
    names = {f"kept-{number}{layer}.png" for number in ("01", "02") for layer in ("", *layers)} | {"kept.png"}
    assert {path.name for path in tmp_path.iterdir()} == names
    settings = {"n_threads": 1, "n_gpu_layers": 0, "budget": "40%"}
    with open_session(model[1], model[3], **settings) as session:
        loaded = [load_picture(path) for path in pictures[:2]]
        parts = [{"type": "image", "picture": picture} for picture in loaded]
        session.prefill([{"role": "user", "content": [*parts, {"type": "text", "text": "What is in picture 1?"}]}])
        session.prune()
        maps = session.kept_patches()
    for picture, one in zip(loaded, maps, strict=True):
        check(tmp_path / f"kept-{one.number:02}.png", picture, one.share.mean(axis=0))
        for il in range(4):
            check(tmp_path / f"kept-{one.number:02}-layer-{il:02}.png", picture, one.share[il])


def check(path: Path, picture: Picture, share: np.ndarray) -> None:
    """An overlay of 64x64 pixels, four times as large, has the light of the shares in the middle of every pixel."""
    middle = pixels(path)[2::4, 2::4]
    light = np.kron(share, np.ones((8, 8)))[..., None] * (1 - DARKEST) + DARKEST
    np.testing.assert_allclose(middle, picture.rgb * light, atol=0.51)


def test_chat(cli: Cli, model: list[str], pictures: list[Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "kept-01.png").write_bytes(b"a holiday")
    script = ["/map", str(pictures[0]), "What is in picture 1?", f"/map {tmp_path / 'a b'}", f"/map {other}"]
    script += [f"/image {str(pictures[1])!r}", "What is in picture 2?", f'/map "{tmp_path / "a b"}"', "/undo"]
    script += [f"/map {tmp_path / 'undone'}"]
    result = cli("chat", *model, "--budget", "50%", stdin="\n".join(script))
    assert result.returncode == 0, result.stderr
    first, second = (line for line in result.stderr.splitlines() if "error" in line)
    assert "there are no pictures in the conversation" in first
    assert "kept-01.png exists and was not written by `edge-csp map`" in second
    assert (other / "kept-01.png").read_bytes() == b"a holiday"
    assert len(list(other.iterdir())) == 1
    assert {path.name for path in (tmp_path / "a b").iterdir()} == {"kept.png", "kept-01.png", "kept-02.png"}
    assert {path.name for path in (tmp_path / "undone").iterdir()} == {"kept.png", "kept-01.png"}
    assert result.stdout.count("turn 1, text") == 3
    assert result.stdout.count("turn 2, text") == 1


def test_tiles(tmp_path: Path, demo_files: tuple[Path, Path]) -> None:
    """A picture that is read in tiles has two overlays: all of it, and the tiles put together."""
    mmproj = make_mmproj(tmp_path / "mmproj.gguf", "internvl", n_layer=1)
    picture = load_picture(Image.new("RGB", (256, 128), "white"))
    with open_session(demo_files[0], mmproj, budget="30%", n_threads=1) as session:
        list(session.ask("Who?", [picture], n_predict=1))
        maps = session.kept_patches()
        assert [one.part for one in maps] == list(range(9))
        map.write_maps(session, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"kept.png", "kept-01.png", "kept-01-tiles.png"}
    drawn = pixels(tmp_path / "out" / "kept-01-tiles.png")
    height, width, _ = drawn.shape
    for row, column in np.ndindex(8, 16):
        share = maps[4 * (row // 4) + column // 4].share.mean(axis=0)[row % 4, column % 4]
        pixel = drawn[int((row + 0.5) * height / 8), int((column + 0.5) * width / 16)]
        assert pixel == pytest.approx(np.full(3, 255 * (DARKEST + (1 - DARKEST) * share)), abs=0.51)


def test_no_map_of_cells_that_are_no_grid(tmp_path: Path, demo_files: tuple[Path, Path]) -> None:
    with open_session(*demo_files, budget="30%", n_threads=1) as session:
        list(session.ask("Who?", [load_picture(Image.new("RGB", (64, 64)), name="a.png")], n_predict=1))
        for item in session._items:
            object.__setattr__(item, "size", (0, 0))
        with pytest.raises(EdgeCspError, match="there is no map of this picture"):
            map.write_maps(session, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-m", "demo", "-p", "hi"], "no picture: give one with --image"),
        (["--layer", "4"], "--layer '4': the cache has the layers 0 to 3"),
        (["--layer", "-1"], "--layer '-1': the cache has the layers 0 to 3"),
        (["--layer", "some"], "or write `all`"),
        (["--image", "no.png", "-p", "hi"], "no.png: no such file"),
        (["--image", "PICTURE", "-p", "hi"], "no model: give a GGUF file with -m"),
        (["--out", "PICTURE"], "cannot be written"),
        (["--budget", "0"], "budget"),
    ],
)
def test_errors(
    arguments: list[str], words: str, pictures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(pictures[0]) if argument == "PICTURE" else argument for argument in arguments]
    out = [] if "--out" in given else ["--out", str(tmp_path / "out")]
    assert main(["map", "-t", "1", *out, *given]) == 1
    shown = capsys.readouterr()
    assert words in shown.err
    assert shown.err.count("\n") == 1
    assert shown.out == ""
    assert not (tmp_path / "out").exists()


def test_nothing_is_evicted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given in (["--budget", "100%"], ["--policy", "full"]):
        assert main(["map", "-t", "1", "--out", str(tmp_path), *given]) == 0
        found = bars(capsys.readouterr().out).values()
        assert len(found) == 14
        assert all(kept == n_cell for kept, n_cell in found)
