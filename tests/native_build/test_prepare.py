"""From a source package to a build directory: checked, patched, rewritten only where something changed."""

from __future__ import annotations

import hashlib
import io
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import prepare
import pytest

ROOT = Path(__file__).parents[2]
PATCH = "--- a/src/f.cpp\n+++ b/src/f.cpp\n@@ -1,1 +1,2 @@\n int f;\n+int g;\n"
FILES = {
    "LICENSE.md": "MIT\n",
    "README.md": "not wanted\n",
    "llama_cpp/__init__.py": f'__version__ = "{prepare.UPSTREAM_VERSION}"\n',
    "vendor/llama.cpp/CMakeLists.txt": "project(llama.cpp)\n",
    "vendor/llama.cpp/src/f.cpp": "int f;\n",
    "vendor/llama.cpp/src/h.cpp": "int h;\n",
    "vendor/llama.cpp/tools/ui/page.html": "not wanted\n",
}


@pytest.fixture
def patches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "patches"
    folder.mkdir()
    (folder / "001.patch").write_text(PATCH)
    monkeypatch.setattr(prepare, "PATCHES", folder)
    return folder


@pytest.fixture
def sdist(tmp_path: Path, patches: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    path = tmp_path / prepare.SDIST
    with tarfile.open(path, "w:gz") as archive:
        for name, text in FILES.items():
            info = tarfile.TarInfo(f"llama_cpp_python-{prepare.UPSTREAM_VERSION}/{name}")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    monkeypatch.setattr(prepare, "UPSTREAM_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return str(path)


@pytest.fixture
def folder(tmp_path: Path, patches: Path) -> str:
    for name, text in FILES.items():
        path = tmp_path / "extracted" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(tmp_path / "extracted")


def contents(target: Path) -> dict[str, str]:
    return {path.relative_to(target).as_posix(): path.read_text() for path in target.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["sdist", "folder"])
def test_source_is_patched_and_renamed(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    target = tmp_path / "build" / "upstream"
    prepare.prepare(target, request.getfixturevalue(kind))
    expected = {name: text for name, text in FILES.items() if text != "not wanted\n"}
    expected["llama_cpp/__init__.py"] = f'__version__ = "{prepare.VERSION}"\n'
    expected["vendor/llama.cpp/src/f.cpp"] = "int f;\nint g;\n"
    assert contents(target) == expected


def test_pristine_source(sdist: str, tmp_path: Path) -> None:
    prepare.prepare(tmp_path / "a", sdist, pristine=True)
    assert contents(tmp_path / "a") == {name: text for name, text in FILES.items() if text != "not wanted\n"}


def test_second_run_changes_nothing(sdist: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "upstream"
    prepare.prepare(target, sdist)
    monkeypatch.setattr(prepare, "read_source", lambda source: pytest.fail("unpacked again"))
    prepare.prepare(target, sdist)


def test_changed_patch_rewrites_only_what_differs(sdist: str, patches: Path, tmp_path: Path) -> None:
    target = tmp_path / "upstream"
    prepare.prepare(target, sdist)
    src = target / "vendor/llama.cpp/src"
    before = (src / "h.cpp").stat().st_mtime_ns
    (src / "left.over").write_text("from another version\n")
    (patches / "001.patch").write_text(PATCH.replace("int g", "int gg"))
    prepare.prepare(target, sdist)
    assert (src / "f.cpp").read_text() == "int f;\nint gg;\n"
    assert (src / "h.cpp").stat().st_mtime_ns == before
    assert not (src / "left.over").exists()


def test_failed_run_is_not_taken_for_done(sdist: str, patches: Path, tmp_path: Path) -> None:
    target = tmp_path / "upstream"
    prepare.prepare(target, sdist)
    (patches / "001.patch").write_text(PATCH.replace("int f", "int F"))
    for _ in range(2):
        with pytest.raises(prepare.PatchError, match="matches 0 places"):
            prepare.prepare(target, sdist)


def test_wrong_hash_names_file_expected_and_got(sdist: str, tmp_path: Path) -> None:
    Path(sdist).write_bytes(b"other")
    got = hashlib.sha256(b"other").hexdigest()
    with pytest.raises(prepare.SourceError) as error:
        prepare.prepare(tmp_path / "upstream", sdist)
    assert str(error.value) == f"{sdist}: wrong sha256, expected {prepare.UPSTREAM_SHA256}, got {got}"


def test_other_version_in_a_folder(folder: str, tmp_path: Path) -> None:
    Path(folder, "llama_cpp/__init__.py").write_text('__version__ = "0.3.35"\n')
    with pytest.raises(prepare.SourceError, match="does not say"):
        prepare.prepare(tmp_path / "upstream", folder)


def test_folder_of_something_else(folder: str, tmp_path: Path) -> None:
    with pytest.raises(prepare.SourceError, match="not the source of llama-cpp-python"):
        prepare.prepare(tmp_path / "upstream", folder + "/vendor")


def test_command_line_error_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "native/prepare.py"), "--upstream", str(tmp_path / "none"), "hash"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr == f"{tmp_path / 'none'}: no such file or folder (EDGE_CSP_UPSTREAM)\n"


def test_failed_download_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", "os.devnull")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(prepare.SourceError, match=r"^pip download of .+ failed: ERROR: .+ \(offline: .+\)$"):
        prepare.find_source(None, tmp_path / "download")


def test_main_project_pins_the_fork() -> None:
    pin = re.findall(r'"llama-cpp-python==([^"]+)"', (ROOT / "pyproject.toml").read_text())
    assert pin == [prepare.VERSION]


def test_patches_apply_to_the_pinned_source(pytestconfig: pytest.Config) -> None:
    """Downloads 77 MB once (pytest's cache keeps it), unless EDGE_CSP_UPSTREAM names a copy."""
    download = pytestconfig.cache.mkdir("upstream")
    source = prepare.find_source(os.environ.get("EDGE_CSP_UPSTREAM"), download)
    digest = prepare.tree_hash(prepare.patched_files(prepare.read_source(source)))
    recorded = (ROOT / "native/patches/tree.sha256").read_text().strip()
    assert digest == recorded, "patches changed: run `python native/prepare.py hash --record` and look at the diff"


def test_patches_stay_thin() -> None:
    """Call sites only: logic belongs into native/src."""
    added = 0
    for patch in sorted((ROOT / "native/patches").glob("*.patch")):
        lines = patch.read_text().splitlines()
        added += sum(line.startswith("+") and not line.startswith("+++ ") for line in lines)
    assert added <= 60
