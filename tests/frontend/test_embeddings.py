"""The cache on disk: what is kept, what goes, and that nothing that happens to its files is an error."""

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edge_csp.embeddings import EmbeddingCache, default_folder

SIZE = 1000
VALUE = bytes(range(250)) * 4


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.exists() else []


def used(folder: Path) -> int:
    return sum(file.stat().st_size for file in files(folder))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "made when needed" / "embeddings"


def test_values_come_back_after_a_restart(folder: Path) -> None:
    cache = EmbeddingCache(folder)
    assert cache.get("a") is None
    assert files(folder) == []
    cache.put("a", VALUE)
    cache.put("empty", b"")
    again = EmbeddingCache(folder)
    assert again.get("a") == VALUE
    assert again.get("empty") == b""
    assert again.get("b") is None
    cache.put("a", b"other")
    assert again.get("a") == b"other"
    assert len(files(folder)) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
def test_others_cannot_read_it(folder: Path) -> None:
    EmbeddingCache(folder).put("a", VALUE)
    assert folder.stat().st_mode & 0o077 == 0
    assert files(folder)[0].stat().st_mode & 0o077 == 0


def test_the_longest_unused_entries_go(folder: Path) -> None:
    limit = 16 * (SIZE + 40)
    cache = EmbeddingCache(folder, limit=limit)
    for number in range(16):
        cache.put(str(number), VALUE)
        for age, file in enumerate(sorted(files(folder), key=lambda file: file.stat().st_mtime_ns, reverse=True)):
            os.utime(file, (time.time() - 100 - age,) * 2)  # clocks of file systems are coarse
    assert used(folder) == limit
    assert cache.get("0") == VALUE  # used just now
    cache.put("16", VALUE)
    assert used(folder) <= limit
    left = {number for number in range(17) if EmbeddingCache(folder).get(str(number)) is not None}
    assert left == {0, *range(3, 17)}  # one for the new entry, one so that it is not done at every entry


@pytest.mark.parametrize("limit", [3000, 20_000, 200_000])
def test_the_limit_holds(folder: Path, limit: int) -> None:
    cache = EmbeddingCache(folder, limit=limit)
    for number in range(300):
        cache.put(str(number), VALUE[: number % 7 * 150])
        assert used(folder) <= limit
    assert used(folder) > limit * 0.5 or limit == 200_000
    assert cache.get("299") == VALUE[: 299 % 7 * 150]


def test_what_is_larger_than_the_limit_is_not_kept(folder: Path) -> None:
    cache = EmbeddingCache(folder, limit=500)
    cache.put("a", VALUE)
    assert files(folder) == []
    assert cache.get("a") is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:20],
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        lambda data: b"\0" * len(data),
        lambda data: b"ecspemb\x02" + data[8:],
    ],
    ids=["empty", "cut in the head", "cut", "longer", "a bit", "zeros", "other version"],
)
def test_damaged_entries_are_dropped_and_made_again(folder: Path, damage) -> None:
    cache = EmbeddingCache(folder)
    cache.put("a", VALUE)
    file = files(folder)[0]
    file.write_bytes(damage(file.read_bytes()))
    assert cache.get("a") is None
    assert files(folder) == []
    cache.put("a", VALUE)
    assert cache.get("a") == VALUE


def test_an_entry_under_the_name_of_another(folder: Path) -> None:
    cache = EmbeddingCache(folder)
    cache.put("a", VALUE)
    a = files(folder)[0]
    cache.put("b", b"b")
    b = next(file for file in files(folder) if file != a)
    b.write_bytes(a.read_bytes())
    assert cache.get("b") is None
    assert cache.get("a") == VALUE


def test_unfinished_files_go_in_time(folder: Path) -> None:
    cache = EmbeddingCache(folder, limit=4 * (SIZE + 40))
    cache.put("a", VALUE)
    old, new = folder / "old.tmp", folder / "new.tmp"
    for file in (old, new):
        file.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    for number in range(5):
        cache.put(str(number), VALUE)
    assert not old.exists()
    assert new.exists()


WRITER = """
import sys
from pathlib import Path
from edge_csp.embeddings import EmbeddingCache
cache = EmbeddingCache(Path(sys.argv[1]), limit=200_000)
value = bytes([int(sys.argv[2])]) * 50_000
print("ready", flush=True)
sys.stdin.readline()
for _ in range(200):
    cache.put("same", value)
    found = cache.get("same")
    assert found in (b"\\1" * 50_000, b"\\2" * 50_000), None if found is None else len(found)
"""


def test_two_processes_write_the_same_entry_at_once(folder: Path) -> None:
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(folder), str(number)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for number in (1, 2)
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready" + os.linesep.encode()
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write(b"\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate(timeout=60)
    assert [writer.returncode for writer in writers] == [0, 0]
    assert len(files(folder)) == 1


def test_a_folder_that_cannot_be_used(folder: Path) -> None:
    folder.parent.mkdir()
    folder.write_bytes(b"a file")
    notices: list[str] = []
    cache = EmbeddingCache(folder, on_notice=notices.append)
    for _ in range(3):
        assert cache.get("a") is None
        cache.put("a", VALUE)
    assert len(notices) == 1
    assert str(folder) in notices[0]
    assert "Not a directory" in notices[0]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError(30, "Read-only file system")])
def test_a_disk_that_takes_nothing(folder: Path, error: OSError, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise error

    notices: list[str] = []
    cache = EmbeddingCache(folder, on_notice=notices.append)
    cache.put("a", VALUE)
    monkeypatch.setattr("edge_csp.embeddings.os.replace", fail)
    cache.put("b", VALUE)
    cache.put("c", VALUE)
    assert cache.get("a") == VALUE  # what is there can still be read
    assert cache.get("b") is None
    assert len(files(folder)) == 1  # and nothing half-written
    assert len(notices) == 1
    assert str(error.strerror) in notices[0]


def test_notices_go_to_the_log_by_default(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder.parent.mkdir()
    folder.write_bytes(b"")
    EmbeddingCache(folder).put("a", VALUE)
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_folder_of_the_system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGE_CSP_CACHE_DIR", str(tmp_path))
    assert EmbeddingCache().folder == tmp_path / "embeddings"
    monkeypatch.delenv("EDGE_CSP_CACHE_DIR")
    assert "edge-csp" in default_folder().parts
    if sys.platform == "linux":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert default_folder() == tmp_path / "edge-csp" / "embeddings"


def test_digest_of_a_file(folder: Path, tmp_path: Path) -> None:
    cache, file = EmbeddingCache(folder), tmp_path / "weights"

    def write(data: bytes) -> str:
        file.write_bytes(data)
        return hashlib.sha256(data).hexdigest()

    for data in (b"x" * 3_000_000, b"y" * 3_000_000, b""):  # written again at once, size and name alike
        digest = write(data)
        assert cache.file_digest(file) == digest
    digest = write(b"old")
    os.utime(file, (1e9, 1e9))
    assert cache.file_digest(file) == digest
    assert cache.file_digest(file) == digest
    digest = write(b"new")
    os.utime(file, (1e9, 1e9))  # as `cp -p` does
    assert cache.file_digest(file) == digest


def test_digests_are_remembered(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, file = EmbeddingCache(folder), tmp_path / "weights"
    file.write_bytes(b"abc")
    now = time.time()
    monkeypatch.setattr("edge_csp.embeddings.time.time", lambda: now + 60)
    digest = cache.file_digest(file)
    assert len(files(folder)) == 1
    monkeypatch.setattr(Path, "open", _only(folder, Path.open))
    assert EmbeddingCache(folder).file_digest(file) == digest


def _only(folder: Path, open_file):
    """Path.open that refuses all files that are not in the folder."""

    def checked(path: Path, *arguments, **settings):
        assert path.parent == folder
        return open_file(path, *arguments, **settings)

    return checked
