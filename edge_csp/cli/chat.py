"""`edge-csp chat`: a conversation in the terminal, or with lines from a pipe."""

from __future__ import annotations

import difflib
import glob
import os
import shlex
import signal
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse
from urllib.request import url2pathname

from edge_csp.cli.options import (
    ContextOptions,
    ModelOptions,
    PromptOptions,
    PruningOptions,
    SamplingOptions,
    clean,
    grouped,
    opened,
)
from edge_csp.errors import EdgeCspError

if TYPE_CHECKING:
    from edge_csp.cli.render import Bars
    from edge_csp.images import Picture
    from edge_csp.session import Session

_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".ico",
    ".avif", ".jp2", ".qoi", ".heic", ".heif",
)  # fmt: skip
KEYS = (
    "A path to a picture attaches it. Alt-Enter, or a backslash at the end of the line, starts a new line. Ctrl-C "
    "stops an answer; at an empty prompt, Ctrl-C twice or Ctrl-D ends the chat. //text sends a text that starts with a "
    "slash."
)


@grouped
def command(
    prompt: PromptOptions,
    model: ModelOptions,
    context: ContextOptions,
    pruning: PruningOptions,
    sampling: SamplingOptions,
) -> None:
    """Talk with a model about pictures; /help tells the commands. Lines are read from stdin where it is no terminal."""
    from edge_csp.cli.render import Bars, say

    stop, bars = Stop(), Bars()

    def on_progress(what: str, done: float) -> None:
        bars(what, done)
        stop.check()

    try:
        with opened(model, context, pruning, sampling, prompt, on_progress=on_progress) as session:
            if session.template.notice:
                say(session.template.notice)
            chat = Chat(session, stop, bars, prompt.predict)
            for path in prompt.image:
                chat.attach(path)
            if prompt.prompt and prompt.prompt != "-":
                chat.ask(clean(prompt.prompt))
            _talk(chat, _reader(chat))
    finally:
        bars.close()


def _reader(chat: Chat) -> Callable[[], str]:
    """What reads the next message: an editor in a terminal, else lines."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        from edge_csp.cli.editor import Editor
        from edge_csp.cli.render import cache_line, say, stdout

        info = chat.session.model.info
        stdout().print(f"{info.name or info.path.name}, {cache_line(chat.session)}", markup=False)
        say("/help tells the commands")
        return Editor([*COMMANDS, "exit", "quit"], lambda: len(chat.waiting)).read
    return read_lines


def read_lines() -> str:
    """The next message from stdin; a backslash at the end of a line goes on with the next one."""
    lines: list[str] = []
    while line := sys.stdin.readline():
        text = line.rstrip("\r\n")
        if not text.endswith("\\"):
            return "\n".join([*lines, text])
        lines.append(text[:-1])
    if lines:
        return "\n".join(lines)
    raise EOFError


def _talk(chat: Chat, read: Callable[[], str]) -> None:
    """Read and do, until the end. What goes wrong in a turn is said, and the chat goes on."""
    from edge_csp.cli.render import say_error

    while True:
        try:
            text = clean(read()).strip()
        except EOFError:
            return
        try:
            if text and not chat.take(text):
                return
        except EdgeCspError as error:
            chat.bars.close()
            say_error(error)


class Stopped(Exception):
    """The user stopped a turn."""


class Stop:
    """Ctrl-C within a `with` block asks to stop at the next safe point; a second one is a KeyboardInterrupt."""

    def __init__(self) -> None:
        self.asked = False
        self._previous: Any = None

    def __enter__(self) -> Stop:
        self.asked = False
        self._previous = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._previous)
        self.asked = False

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def check(self) -> None:
        """Raise Stopped if the user asked to stop."""
        if self.asked:
            raise Stopped


class Chat:
    """The commands, and the pictures that wait for the next message."""

    def __init__(self, session: Session, stop: Stop, bars: Bars, n_predict: int) -> None:
        self.session = session
        self.stop = stop
        self.bars = bars
        self.n_predict = n_predict
        self.waiting: list[Picture] = []

    def take(self, text: str) -> bool:
        """Do what a message says; False if it ends the chat."""
        if paths := picture_paths(text):
            for path in paths:
                self.attach(path)
            return True
        if text.startswith("/") and not text.startswith("//"):
            name, _, argument = text[1:].partition(" ")
            return self.command(name, argument.strip())
        self.ask(text[1:] if text.startswith("//") else text)
        return True

    def command(self, name: str, argument: str) -> bool:
        """Do a command; False if it ends the chat. Raises EdgeCspError if there is none of that name."""
        from edge_csp.cli.render import printable

        if name in ("exit", "quit"):
            return False
        if name not in COMMANDS:
            close = difflib.get_close_matches(name, [*COMMANDS, "exit", "quit"], n=1, cutoff=0.5)
            hint = f"did you mean /{close[0]}?" if close else "/help tells the commands"
            raise EdgeCspError(f"/{printable(name)} is unknown: {hint}")
        COMMANDS[name][2](self, argument)
        return True

    def ask(self, text: str) -> None:
        """Ask, with the waiting pictures, and print the answer as it comes."""
        from edge_csp.cli.render import kept_line, say, write

        n_turn, said = self.session.counters.n_turn, False
        stream = self.session.ask(text, self.waiting, n_predict=self.n_predict)
        with self.stop, closing(stream):
            try:
                for piece in stream:
                    said = True
                    write(piece)
                    self.stop.check()
            except Stopped:
                write("\n" if said else "")
                say("stopped" if said else "stopped before the answer; the message is not in the conversation")
            else:
                write("\n")
                say(kept_line(self.session))
                if self.session.finish_reason == "full":
                    say("the context is full: /undo, /clear, or start anew with a larger (-c) or bounded (--cells) one")
                elif self.session.finish_reason == "trained":
                    say("the context that the model was trained on is full: /undo or /clear (--past-trained stop)")
            finally:
                self.bars.close()
                if self.session.counters.n_turn > n_turn:
                    self.waiting = []

    def attach(self, path: str | Path) -> None:
        """Let a picture wait for the next message."""
        from edge_csp.cli.render import notes, say
        from edge_csp.images import load_picture

        if self.session.model.mmproj_info is None:
            raise EdgeCspError(f"{self.session.model.info.path} has no mmproj: it cannot read pictures (--mmproj)")
        picture = load_picture(path)
        self.waiting.append(picture)
        notes(picture)
        say(f"{picture.name}: {picture.size[0]}x{picture.size[1]}, goes with the next message")

    def image(self, argument: str) -> None:
        paths = split_paths(argument)
        if not paths:
            raise EdgeCspError("/image needs the path of a picture")
        for path in paths:
            self.attach(path)

    def images(self, _argument: str) -> None:
        from edge_csp.cli.render import cells_table, say, stdout

        stdout().print(cells_table(self.session.cache_use()))
        for picture in self.waiting:
            say(f"{picture.name}: goes with the next message")

    def budget(self, argument: str) -> None:
        from edge_csp.budget import parse_budget
        from edge_csp.cli.render import kept_line, say

        session = self.session
        if session.context.csp is None:
            raise EdgeCspError(f"policy {session.pruning.policy.name} keeps everything: there is no budget")
        if argument:
            session.pruning = replace(session.pruning, budget=parse_budget(argument))
            say("from the next message on; what was evicted does not come back")
        budget = session.pruning.budget or "all that fits"
        print(f"budget {budget}, policy {session.pruning.policy.name}; {kept_line(session)}")

    def pin(self, argument: str) -> None:
        self._pin(argument, True)

    def unpin(self, argument: str) -> None:
        self._pin(argument, False)

    def _pin(self, argument: str, pinned: bool) -> None:
        """Pin or unpin "3" (a picture), "turn" (the last one), "turn 2" or "system"."""
        what, _, number = argument.partition(" ")
        n_turn = sum(message["role"] == "user" for message in self.session.messages)
        if what.isdecimal() and not number:
            self.session.pin_picture(int(what), pinned=pinned)
        elif what == "turn" and (number.isdecimal() or not number):
            self.session.pin_turn(int(number or n_turn), pinned=pinned)
        elif argument == "system":
            self.session.pin_turn(0, pinned=pinned)
        else:
            raise EdgeCspError("/pin needs the number of a picture, `turn`, `turn N` or `system`")
        print("stays in the cache from now on" if pinned else "may be evicted again")

    def stats(self, _argument: str) -> None:
        from edge_csp.cli.render import cells_table, rows_table, stats_rows, stdout

        out = stdout()
        out.print(rows_table(stats_rows(self.session)))
        out.print()
        out.print(cells_table(self.session.cache_use()))

    def map(self, argument: str) -> None:
        from edge_csp.cli.map import FOLDER, write_maps

        write_maps(self.session, Path(os.path.expanduser(argument.strip("\"'"))) if argument else FOLDER)

    def undo(self, _argument: str) -> None:
        if not self.session.undo():
            raise EdgeCspError("there is nothing to take back")
        print("took back the last message and its answer")

    def clear(self, _argument: str) -> None:
        from edge_csp.usage import Counters

        self.session.clear()
        self.session.counters = Counters()
        self.waiting = []
        print("a new conversation; pictures that come again need not be encoded again")

    def help(self, _argument: str) -> None:
        from edge_csp.cli.render import rows_table, stdout

        rows = [(f"/{name} {argument}".strip(), words) for name, (argument, words, _) in COMMANDS.items()]
        stdout().print(rows_table([*rows, ("/exit, /quit", "End the chat.")]))
        print(KEYS)


COMMANDS: dict[str, tuple[str, str, Callable[[Chat, str], None]]] = {
    "image": ("PATH…", "Attach pictures to the next message; quotes, ~ and * work.", Chat.image),
    "images": ("", "List the pictures: cells filled, cells kept.", Chat.images),
    "budget": ("[SIZE]", "Show or set what stays of the KV cache: 20%, 512 (cells), 64MiB.", Chat.budget),
    "pin": (
        "N|turn [N]|system",
        "Let a picture, a turn (the last one) or the system message stay.",
        Chat.pin,
    ),
    "unpin": ("N|turn [N]|system", "Let it be evicted.", Chat.unpin),
    "stats": ("", "What has been evaluated, what is kept, how fast.", Chat.stats),
    "map": ("[DIR]", "Write pictures of the patches that are kept, and show bars of the cells.", Chat.map),
    "undo": ("", "Take back the last message and its answer.", Chat.undo),
    "clear": ("", "Start a new conversation.", Chat.clear),
    "help": ("", "This list.", Chat.help),
}
"""name -> (argument, what it does, method)"""


def split_paths(text: str) -> list[str]:
    """Paths in a line, see `_words`, with wildcards."""
    paths: list[str] = []
    for path in _words(text):
        paths += [path] if os.path.exists(path) else sorted(glob.glob(path)) or [path]
    return paths


def picture_paths(text: str) -> list[str]:
    """Paths of a message that is nothing but paths of pictures; they exist, or start with a folder."""
    if not text.lower().rstrip("\"'").endswith(_SUFFIXES) or text.startswith("/image "):
        return []
    paths = _words(text)
    good = all(path.lower().endswith(_SUFFIXES) and (os.path.isfile(path) or path.count("/") > 1) for path in paths)
    return paths if good else []


def _words(text: str) -> list[str]:
    """Paths in a line: as it is, or separated by blanks; quoted, with escaped blanks, file:// addresses, ~."""
    if os.path.isfile(text):
        return [text]
    try:
        words = shlex.split(text, posix=sys.platform != "win32")
    except ValueError:  # a quote without its end
        words = text.split()
    names = [word.strip("\"'") for word in words]
    return [
        url2pathname(urlparse(name).path) if name.startswith("file://") else os.path.expanduser(name) for name in names
    ]
