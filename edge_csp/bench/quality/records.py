"""JSON lines: what was asked for, then an answer a line, written as they are made. A run goes on where it was stopped.

A line with "settings" tells what records are of; every run on the file adds one. All runs on a file have the same seed
and the same models under their names; policies, budgets, protocols and albums may be added.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from edge_csp.errors import BenchError

Key = tuple[str, str, int, int, int, str, str, str, int]
KEY = ("model", "topic", "length", "n_picture", "album", "protocol", "policy", "budget", "question")
"""Fields that tell one record from all others."""
NO_TEXT = {"topic": "", "length": 0}
"""In records of albums of pictures, and of files from before there were others."""


def key_of(record: dict[str, Any]) -> Key:
    return tuple(record[name] for name in KEY)


class Records:
    """The records of a file, or of a run without one."""

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        """settings: of this run. Those in "same" have to be those of the file; of "models" the ones with the same name.

        Raises BenchError if they are not, and if the file is something else or cannot be written. A last line that was
        not written to its end is dropped.
        """
        self.path = path
        self.settings = settings
        self.records: list[dict[str, Any]] = []
        self.done: set[Key] = set()
        self._file: TextIO | None = None
        if path is None:
            return
        try:
            if path.exists():
                self._read(path)
            self._file = path.open("a", encoding="utf-8")
            self._write({"settings": settings})
        except OSError as error:
            raise BenchError(f"{path} cannot be written ({error.strerror or error})") from error
        self.done |= {key_of(record) for record in self.records}

    def _read(self, path: Path) -> None:
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                found = json.loads(line)
                if "settings" in found:
                    self._compare(found["settings"])
                else:
                    found = NO_TEXT | found
                    key_of(found)
                    self.records.append(found)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise BenchError(f"{path}, line {number} is no record of `bench quality` ({error!r})") from error
        if len(whole) < len(data):
            with path.open("r+b") as file:
                file.truncate(len(whole))

    def _compare(self, found: dict[str, Any]) -> None:
        for part in ("same", "models"):
            for name, value in self.settings[part].items():
                if name in found[part] and found[part][name] != value:
                    raise BenchError(
                        f"{self.path} is of {name} {found[part][name]}, this run of {value}: take another --out"
                    )

    def add(self, record: dict[str, Any]) -> None:
        """Raises BenchError if it cannot be written."""
        self.records.append(record)
        self._write(record)

    def _write(self, line: dict[str, Any]) -> None:
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise BenchError(f"{self.path} cannot be written ({error.strerror or error})") from error

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> Records:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
