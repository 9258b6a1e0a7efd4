"""Albums for real language weights with eyes."""

from __future__ import annotations

from pathlib import Path

from edge_csp.bench.quality.albums import album_files, read_album
from tools.zoo.__main__ import main


def test_albums_are_those_that_the_benchmark_reads(tmp_path: Path) -> None:
    assert main(["--out", str(tmp_path), "albums", "--albums", "3"]) == 0
    albums = [read_album(file) for file in album_files(tmp_path / "albums")]
    assert [(album.n_picture, len(album.questions)) for album in albums] == [(3, 4)] * 3
    question = albums[0].questions[0]
    assert question.is_right(f"I think it is {question.accepted[0]}!")
    assert not question.is_right("I do not know.")
    assert main(["--out", str(tmp_path / "again"), "albums", "--albums", "3"]) == 0
    for file in (tmp_path / "albums").rglob("*"):
        if file.is_file():
            assert file.read_bytes() == (tmp_path / "again" / file.relative_to(tmp_path)).read_bytes()
