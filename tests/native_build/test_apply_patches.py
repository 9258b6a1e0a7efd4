"""The patch applier accepts exact matches only, and says in one line what does not match."""

from __future__ import annotations

from pathlib import Path

import pytest
from apply_patches import PatchError, apply_patches, parse_patch, tree_hash

SOURCE = "one\ntwo\nthree\nfour\nfive\nsix\n"
INSERT = "--- a/src/f.cpp\n+++ b/src/f.cpp\n@@ -2,2 +2,3 @@ any text\n two\n+NEW\n three\n"


def patched(tmp_path: Path, *patches: str, source: str = SOURCE) -> str:
    paths = []
    for i, patch in enumerate(patches):
        paths.append(tmp_path / f"{i:03}.patch")
        paths[-1].write_bytes(patch.encode())
    return apply_patches({"src/f.cpp": source.encode()}.__getitem__, paths)["src/f.cpp"].decode()


def test_insert(tmp_path: Path) -> None:
    assert patched(tmp_path, INSERT) == SOURCE.replace("two\n", "two\nNEW\n")


def test_replace_delete_and_several_hunks(tmp_path: Path) -> None:
    patch = INSERT + "@@ -5,2 +6,2 @@\n-five\n+FIVE\n six\n"
    assert patched(tmp_path, patch) == "one\ntwo\nNEW\nthree\nfour\nFIVE\nsix\n"
    assert patched(tmp_path, INSERT.replace("@@ -2,2 +2,3 @@", "@@ -2,2 +2,2 @@").replace(" three", "-three"))


def test_moved_hunk_carries_the_next_one_along(tmp_path: Path) -> None:
    source = "zero\nzero\n" + SOURCE + "five\nsix\n"  # the second hunk would be ambiguous without its line number
    patch = INSERT + "@@ -5,2 +6,2 @@\n-five\n+FIVE\n six\n"
    assert patched(tmp_path, patch, source=source) == "zero\nzero\none\ntwo\nNEW\nthree\nfour\nFIVE\nsix\nfive\nsix\n"


def test_stated_line_wins_over_equal_places(tmp_path: Path) -> None:
    assert patched(tmp_path, INSERT, source=SOURCE * 2) == SOURCE.replace("two\n", "two\nNEW\n") + SOURCE


def test_patches_build_on_each_other(tmp_path: Path) -> None:
    second = "--- a/src/f.cpp\n+++ b/src/f.cpp\n@@ -3,1 +3,2 @@\n NEW\n+NEWER\n"
    assert patched(tmp_path, INSERT, second) == SOURCE.replace("two\n", "two\nNEW\nNEWER\n")
    with pytest.raises(PatchError, match=r"^001\.patch: src/f\.cpp:2: hunk matches 0 places, need exactly 1$"):
        patched(tmp_path, INSERT, INSERT)


@pytest.mark.parametrize(("patch_end", "source_end"), [("\r\n", "\n"), ("\n", "\r\n"), ("\r\n", "\r\n")])
def test_line_ends_of_windows(tmp_path: Path, patch_end: str, source_end: str) -> None:
    result = patched(tmp_path, INSERT.replace("\n", patch_end), source=SOURCE.replace("\n", source_end))
    assert result == SOURCE.replace("two\n", "two\nNEW\n").replace("\n", source_end)


def test_empty_context_line_may_have_lost_its_space(tmp_path: Path) -> None:
    patch = "--- a/src/f.cpp\t2026-01-01\n+++ b/src/f.cpp\t2026-01-01\n@@ -1,2 +1,3 @@\n one\n+NEW\n\n"
    assert patched(tmp_path, patch, source="one\n\ntwo\n") == "one\nNEW\n\ntwo\n"


def test_no_newline_at_the_end_of_the_file_stays(tmp_path: Path) -> None:
    assert patched(tmp_path, INSERT, source=SOURCE[:-1]) == SOURCE.replace("two\n", "two\nNEW\n")[:-1]


@pytest.mark.parametrize(
    ("source", "places"),
    [(SOURCE.replace("three", "Three"), 0), ("zero\n" + SOURCE * 2, 2), (SOURCE.replace("two", "two "), 0)],
)
def test_inexact_or_ambiguous_hunk(tmp_path: Path, source: str, places: int) -> None:
    with pytest.raises(PatchError, match=rf"^000\.patch: src/f\.cpp:2: hunk matches {places} places, need exactly 1$"):
        patched(tmp_path, INSERT, source=source)


def test_unknown_file(tmp_path: Path) -> None:
    with pytest.raises(PatchError, match=r"^000\.patch: src/g\.cpp: no such file in the source$"):
        patched(tmp_path, INSERT.replace("src/f.cpp", "src/g.cpp"))


@pytest.mark.parametrize(
    ("patch", "line"),
    [
        ("", None),
        ("--- a/x\n+++ b/x\n", None),
        ("--- /dev/null\n+++ b/x\n@@ -0,0 +1 @@\n+new\n", 1),
        ("--- a/x\n+++ b/y\n@@ -1 +1 @@\n-x\n+y\n", 1),
        ("--- a/x\n+++ b/x\n@@ -1,2 +1 @@\n-x\n+y\n", 6),
        ("--- a/x\n+++ b/x\n@@ -1,2 +1 @@\n x\n+y\n-z\n", 6),
        ("--- a/x\n+++ b/x\n@@ -1,1 +1,1 @@\n-x\n+y\n+z\n", 6),
        ("--- a/x\n+++ b/x\n@@ -3,0 +4,1 @@\n+y\n", 4),
        ("--- a/x\n+++ b/x\n@@ -1 +1 @@\n-x\n\\ No newline at end of file\n+y\n", 5),
        ("@@ -1 +1 @@\n-x\n+y\n", 1),
        ("--- a/x\n+++ b/x\n@@ one @@\n-x\n+y\n", 3),
        (INSERT + INSERT, 7),
    ],
)
def test_malformed_patch_names_its_line(patch: str, line: int | None) -> None:
    with pytest.raises(PatchError, match=rf"^p\.patch:{line}: .+$" if line else r"^p\.patch: no hunks$"):
        parse_patch(patch, "p.patch")


def test_tree_hash_is_of_paths_and_contents() -> None:
    files = {"a": b"1\n2\n", "b": b"3\n"}
    assert tree_hash(files) == tree_hash({"b": b"3\n", "a": b"1\r\n2\r\n"})
    assert len({tree_hash(files), tree_hash({"a": b"1\n2\n"}), tree_hash({"a": b"3\n", "b": b"1\n2\n"})}) == 3
