"""`chat`: over a pipe, and in a terminal (pty)."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_csp import Sampling, open_session
from edge_csp.cli.chat import Chat, Stop, picture_paths, split_paths
from edge_csp.cli.render import Bars
from tests.cli.conftest import Cli

EVALUATED = re.compile(r"tokens evaluated\s+(\d+) for a conversation of (\d+) cells: (.*)")
READY = re.escape("\x1b[?2004h")  # the editor turns bracketed paste on
ENCODED = re.compile(r"pictures\s+(\d+) encoded, (\d+) from memory, 0 from disk")


def test_scripted_conversation(cli: Cli, model: list[str], pictures: list[Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff\xe0 no more")
    script = [
        str(pictures[0]),
        "What is in picture 1?",
        "/stats",
        f"/image {broken}",
        f'/image "{pictures[1]}" "{pictures[2].parent}/picture 3*"',
        "What is\\",
        "in picture 2?",
        "/stats",
        "/undo",
        "/imags",
        "/budget",
        "/budget 0",
        "/budget 25%",
        "What is in picture 1?",
        "/images",
        "/help",
        "/exit",
        "What is never asked?",
    ]
    result = cli("chat", *model, "--budget", "50%", "--min-cells", "0", stdin="\n".join(script))
    assert result.returncode == 0, result.stderr
    assert "\x1b" not in result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    first, second = EVALUATED.findall(result.stdout)
    assert first[0] == first[1]
    assert second[0] == second[1]
    assert "each evaluated once" in first[2]
    assert ENCODED.findall(result.stdout) == [("1", "0"), ("3", "0")]
    errors = [line for line in result.stderr.splitlines() if "error" in line]
    assert len(errors) == 3
    assert str(broken) in errors[0]
    assert "did you mean /images?" in errors[1]
    assert "budget '0' keeps nothing" in errors[2]
    assert result.stderr.count("goes with the next message") == 3
    kept = re.findall(r"^kept (\d+) of (\d+) cells", result.stderr, re.MULTILINE)
    for (n_kept, n_cell), share in zip(kept, (50, 50, 25), strict=True):
        # without the tokens of the answer
        assert any(int(n_kept) - n_answer == (int(n_cell) - n_answer) * share // 100 for n_answer in range(9))
    listed = result.stdout[result.stdout.rindex("took back") :]
    assert "1 picture 1.png" in listed
    assert "picture 2.png" not in listed


def test_six_turns_with_eight_pictures(cli: Cli, model: list[str], pictures: list[Path]) -> None:
    """Every picture is encoded once, every token evaluated once, whatever is pruned."""
    rest = iter(pictures)
    script: list[str] = []
    for n_picture in (3, 1, 0, 2, 2, 0):
        script += [f'/image "{next(rest)}"' for _ in range(n_picture)] + ["What is in picture 1?"]
    result = cli("chat", *model, "--budget", "40%", stdin="\n".join([*script, "/stats"]))
    evaluated, cells, words = EVALUATED.findall(result.stdout)[0]
    assert (re.findall(r"turns\s+(\d+)", result.stdout), ENCODED.findall(result.stdout)) == (["6"], [("8", "0")])
    assert evaluated == cells
    assert words.strip() == "each evaluated once"
    table = re.split(r"cells +kept.*\n", result.stdout)[1]
    rows = [re.split(r"\s{2,}", line.strip()) for line in table.splitlines() if line.strip()]
    assert [row[0] for row in rows] == [f"{i} picture {i}.png" for i in range(1, 9)] + ["pictures", "text", "all"]
    for column in (1, 2):
        *each, in_pictures, text, everything = (float(row[column]) for row in rows)
        assert sum(each) == pytest.approx(in_pictures)
        assert in_pictures + text == pytest.approx(everything)
    assert rows[-1][1] == cells


def test_what_goes_wrong_in_a_turn_does_not_end_the_chat(cli: Cli, model: list[str]) -> None:
    result = cli(
        "chat", *model, "-c", "256", "--policy", "full", stdin="What is this? " * 200 + "\nWhat is this?\n/stats\n"
    )
    assert result.returncode == 0
    assert "edge-csp: error: the prompt needs" in result.stderr
    assert re.search(r"turns\s+1\b", result.stdout)


def test_clear_and_initial_prompt(cli: Cli, model: list[str], pictures: list[Path]) -> None:
    ask = ["-p", "What is in picture 1?", "--image", pictures[0], "-sys", "You are brief."]
    script = f"/clear\n{pictures[0].as_uri()}\nWhat is in picture 1?\n/stats\n/policy\n//what?"
    result = cli("chat", *model, *ask, stdin=script)
    assert result.returncode == 0, result.stderr
    assert ENCODED.findall(result.stdout) == [("0", "1")]
    assert "/policy is unknown: /help tells the commands" in result.stderr
    assert result.stderr.count("kept ") == 3


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.png", "b c.png", "d.txt"):
        (tmp_path / name).touch()
    a, b = str(tmp_path / "a.png"), str(tmp_path / "b c.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert picture_paths(b) == [b]
    assert picture_paths(f"'{b}' {a}") == [b, a]
    assert picture_paths((tmp_path / "b c.png").as_uri()) == [b]
    assert split_paths(f"{tmp_path}/*.png") == [a, b]
    if sys.platform != "win32":
        assert picture_paths(a.replace("a.png", r"b\ c.png")) == [b]
        assert split_paths("~/a.png") == [a]
    for text in (
        "a cat.png?",
        str(tmp_path / "d.txt"),
        f"what is in {a}",
        "it's a .png",
        "/images",
        "",
        f"{'x' * 5000} a.png",
        "~nobody/*",
    ):
        assert picture_paths(text) == []


class Terminal:
    """A chat in a pseudo-terminal."""

    def __init__(self, arguments: list[str], environment: dict[str, str]) -> None:
        import pty

        self.fd, inner = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "edge_csp", "chat", *arguments],
            stdin=inner, stdout=inner, stderr=inner, env=environment | {"TERM": "xterm"}, start_new_session=True,
        )  # fmt: skip
        os.close(inner)
        self.shown = ""

    def expect(self, pattern: str, seconds: float = 30) -> str:
        """Wait until the terminal has shown the pattern since the last call; what it has shown until then."""
        end = time.monotonic() + seconds
        while not (match := re.search(pattern, self.shown)):
            left = end - time.monotonic()
            if left <= 0 or not select.select([self.fd], [], [], left)[0]:
                pytest.fail(f"{pattern!r} did not come: {self.shown[-2000:]!r}")
            try:
                data = os.read(self.fd, 65536).decode(errors="replace")
            except OSError:  # the other side is closed
                data = ""
            if not data:
                pytest.fail(f"the chat ended before {pattern!r}: {self.shown[-2000:]!r}")
            self.shown += data
            if "\x1b[6n" in data:  # where is the cursor?
                os.write(self.fd, b"\x1b[1;1R")
        before, self.shown = self.shown[: match.end()], self.shown[match.end() :]
        return before

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def end(self) -> int:
        """Wait for the end; the exit status."""
        deadline = time.monotonic() + 60
        while self.process.poll() is None and time.monotonic() < deadline:
            if select.select([self.fd], [], [], 0.1)[0]:
                try:
                    self.shown += os.read(self.fd, 65536).decode(errors="replace")
                except OSError:
                    break
        return self.process.wait(timeout=60)


@pytest.fixture
def terminal(model: list[str], environment: dict[str, str]) -> Iterator[Terminal]:
    """A chat whose answers end only with the context."""
    if sys.platform == "win32":
        pytest.skip("no pty here")
    endless = ["-n", "-1", "-c", "60000", "--grammar", 'root ::= "a" root']
    terminal = Terminal([*model, *endless], environment)
    yield terminal
    if terminal.process.poll() is None:
        os.killpg(terminal.process.pid, signal.SIGKILL)
        terminal.process.wait()
    os.close(terminal.fd)


def test_ctrl_c_stops_the_answer_and_the_chat_goes_on(terminal: Terminal, environment: dict[str, str]) -> None:
    terminal.expect(READY)
    for _ in range(2):
        terminal.type("Hello\r")
        terminal.expect("aaaaaaaaaa")
        os.kill(terminal.process.pid, signal.SIGINT)
        terminal.expect("stopped")
        terminal.expect(READY)
    terminal.type("one\\\rtwo\x1b\rthree\x03")  # a text in three lines, taken back
    terminal.expect(READY)
    terminal.type("/stats\r")
    assert re.search(r"turns\s+2\b", terminal.expect("each evaluated once"))
    terminal.expect(READY)
    terminal.type("\x03")
    terminal.expect("Ctrl-C again")
    terminal.expect(READY)
    terminal.type("\x03")
    assert terminal.end() == 0
    history = Path(environment["XDG_DATA_HOME"], "edge-csp", "history").read_text(encoding="utf-8")
    assert history.count("+Hello") >= 1


def test_ctrl_d_ends_the_chat(terminal: Terminal) -> None:
    terminal.expect(READY)
    terminal.type("\x04")
    assert terminal.end() == 0


def test_ctrl_c_before_the_answer(demo_files: tuple[Path, Path], pictures: list[Path]) -> None:
    """The message is not in the conversation, its pictures still wait, and nothing of them is computed twice."""
    stop, signals = Stop(), [signal.SIGINT]

    def on_progress(what: str, done: float) -> None:
        if what == "prefill" and signals:
            os.kill(os.getpid(), signals.pop())
        stop.check()

    with open_session(*demo_files, n_threads=1, sampling=Sampling(temperature=0), on_progress=on_progress) as session:
        chat = Chat(session, stop, Bars(), 8)
        chat.attach(pictures[0])
        chat.attach(pictures[1])
        chat.take("What is in picture 1?")
        assert session.messages == []
        assert len(chat.waiting) == 2
        chat.take("What is in picture 1?")
        assert chat.waiting == []
        assert [message["role"] for message in session.messages] == ["user", "assistant"]
        counters = session.counters
        assert counters.n_text_cell + counters.n_picture_cell == session.n_token
        assert (counters.n_turn, counters.n_encoded, counters.n_restart) == (1, 2, 0)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
