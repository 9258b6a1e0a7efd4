"""The prompt of a chat in a terminal: several lines, history, completion of commands."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent


class Editor:
    """Reads messages; Enter sends them."""

    def __init__(self, commands: Iterable[str], n_waiting: Callable[[], int]) -> None:
        """commands: without the slash. n_waiting: pictures that go with the next message."""
        self._n_waiting = n_waiting
        words = [f"/{name}" for name in commands]
        self._prompt: PromptSession[str] = PromptSession(
            history=_history(),
            key_bindings=_keys(),
            multiline=True,
            completer=WordCompleter(words, sentence=True),
            complete_while_typing=False,
            prompt_continuation="  ",
        )

    def read(self) -> str:
        """The next message. Raises EOFError at Ctrl-D, or at the second Ctrl-C at an empty prompt."""
        from edge_csp.cli.render import say

        n_interrupt = 0
        while True:
            n = self._n_waiting()
            try:
                return self._prompt.prompt(f"({n} picture{'s' * (n > 1)}) > " if n else "> ")
            except KeyboardInterrupt:
                n_interrupt = 0 if self._prompt.default_buffer.text else n_interrupt + 1
                if n_interrupt > 1:
                    raise EOFError from None
                if n_interrupt:
                    say("Ctrl-C again, Ctrl-D or /exit ends the chat")


def _keys() -> KeyBindings:
    """Enter sends, but goes on after a backslash; Alt-Enter goes on."""
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _history() -> History:
    """The history of earlier chats; in memory only where no file can be written."""
    folder = data_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "history").touch(mode=0o600)
    except OSError:
        return InMemoryHistory()
    return FileHistory(folder / "history")


def data_folder() -> Path:
    """Where the platform keeps the data of programs."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Application Support"
    else:
        base = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return base / "edge-csp"
