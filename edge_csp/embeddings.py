"""A cache of embeddings on disk: bytes under a key, with a limit on their size. It knows no model and no picture.

Every entry is a file of its own, named by the hash of its key:

    8 bytes   magic and format version
    32 bytes  sha256 over key and value
    the rest  value

Entries are written beside their place and moved there, so that readers in other processes see a whole entry or none;
what is damaged all the same (a disk that was full, a power cut) does not match its hash, is deleted, and counts as
missing. Reading marks an entry as used; where a new one has no room, the longest unused ones go.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from platformdirs import user_cache_path

__all__ = ["DEFAULT_LIMIT", "EmbeddingCache", "default_folder"]

DEFAULT_LIMIT = 2 << 30
"""Bytes."""

_MAGIC = b"ecspemb\x01"
_N_HEAD = len(_MAGIC) + hashlib.sha256().digest_size
_SUFFIX, _UNFINISHED = ".embd", ".tmp"
_UNFINISHED_AGE = 3600.0  # seconds, then nobody is writing it any more
_FRESH = 2.0  # seconds in which a file may change again without a new time of change
_log = logging.getLogger(__name__)


def default_folder() -> Path:
    """`embeddings` in EDGE_CSP_CACHE_DIR, or in the user's cache folder as the system has it."""
    given = os.environ.get("EDGE_CSP_CACHE_DIR")
    return (Path(given) if given else user_cache_path("edge-csp", appauthor=False)) / "embeddings"


class EmbeddingCache:
    """Values by key in a folder; several processes may use it at once.

    A cache that cannot be read or written is no error: it says so once and is empty from then on, or stays as it is.
    """

    def __init__(
        self, folder: Path | None = None, *, limit: int = DEFAULT_LIMIT, on_notice: Callable[[str], None] | None = None
    ) -> None:
        """folder: made when needed, for this user alone; default: default_folder(). limit: bytes of all entries
        together (several processes that write at once may pass it by a sixteenth each). on_notice: is told in one line
        when the cache cannot be used; default: a warning in the log.
        """
        self.folder = folder or default_folder()
        self.limit = limit
        self._on_notice = on_notice or _log.warning
        self._works = True
        self._room = 0  # bytes that may be written before the folder is looked at again

    def get(self, key: str) -> bytes | None:
        """The value of a key, None if it is not there."""
        path = self._path(key)
        try:
            with path.open("rb") as file:
                head, value = file.read(_N_HEAD), file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            self._give_up("read", error)
            return None
        if head != _head(key, value):
            with suppress(OSError):
                path.unlink()
            return None
        with suppress(OSError):  # it need not be ours to change
            os.utime(path)
        return value

    def put(self, key: str, value: bytes) -> None:
        """Store a value; one that is larger than the limit is not stored."""
        size = _N_HEAD + len(value)
        if not self._works or size > self.limit:
            return
        path = self._path(key)
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if size > self._room:
                self._make_room(size)
            if size <= self._room:
                self._write(path, _head(key, value) + value)
                self._room -= size
        except OSError as error:
            self._give_up("written", error)

    def file_digest(self, path: Path) -> str:
        """sha256 of a file, hex. It is computed once; then it is remembered by what tells that a file has changed.

        Raises OSError if the file cannot be read.
        """
        path = path.resolve()
        stat = path.stat()
        times = stat.st_mtime_ns, stat.st_ctime_ns
        key = f"file {path} {stat.st_dev} {stat.st_ino} {stat.st_size} {times}"
        if (known := self.get(key)) is not None:
            return known.decode()
        digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))
        with path.open("rb", buffering=0) as file:
            while n := file.readinto(buffer):
                digest.update(buffer[:n])
        if time.time() - max(times) / 1e9 > _FRESH:
            self.put(key, digest.hexdigest().encode())
        return digest.hexdigest()

    def _path(self, key: str) -> Path:
        return self.folder / (hashlib.sha256(key.encode()).hexdigest() + _SUFFIX)

    def _write(self, path: Path, data: bytes) -> None:
        number, name = tempfile.mkstemp(suffix=_UNFINISHED, dir=self.folder)
        try:
            with os.fdopen(number, "wb") as file:
                file.write(data)
            os.replace(name, path)
        except PermissionError:  # Windows, while another process reads the entry that is to be replaced
            if not path.exists():
                raise
        finally:
            with suppress(OSError):
                os.unlink(name)

    def _make_room(self, size: int) -> None:
        """Delete the longest unused entries until `size` more bytes fit, and some more, so that it is done rarely."""
        entries = []
        with os.scandir(self.folder) as files:
            for file in files:
                with suppress(OSError):
                    stat = file.stat(follow_symlinks=False)
                    if file.name.endswith(_SUFFIX):
                        entries.append((stat.st_mtime_ns, stat.st_size, file.path))
                    elif file.name.endswith(_UNFINISHED) and time.time() - stat.st_mtime > _UNFINISHED_AGE:
                        os.unlink(file.path)
        slack = self.limit // 16
        room = self.limit - sum(n for _, n, _ in entries)
        wanted = size if room >= size else min(size + slack, self.limit)
        for _, n, name in sorted(entries):
            if room >= wanted:
                break
            try:
                os.unlink(name)
            except FileNotFoundError:  # another process was faster
                pass
            except OSError:  # Windows, while another process reads it
                continue
            room += n
        self._room = min(room, max(size, slack))

    def _give_up(self, done: str, error: OSError) -> None:
        if self._works:
            reason = error.strerror or str(error)
            self._on_notice(f"the embedding cache {self.folder} cannot be {done} ({reason}): pictures are not kept")
        self._works = False


def _head(key: str, value: bytes) -> bytes:
    digest = hashlib.sha256(key.encode() + b"\0")
    digest.update(value)
    return _MAGIC + digest.digest()
