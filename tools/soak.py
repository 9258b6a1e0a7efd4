"""Conversations of the embedded model: long ones in a small cache, and clients that send everything again.

    python -m tools.soak album [--pictures 100] [--cells 1024]
    python -m tools.soak chat [--turns 1000] [--cells 512]
    python -m tools.soak resend [--pictures 8] [--repeat 5]

`album` reads one prompt with all pictures, the last four of them with names, and asks about these four; it does so with
several shuffles, in the bounded cache and in one that holds everything. The answers expected are those that the model
gives about each picture alone. `chat` asks in turn after turn, with a new picture in every tenth. `resend` sends
messages of the OpenAI API, all of them again in the second turn, and takes the time to the first token from JSON on;
nothing is known of the pictures before the first turn.
"""

from __future__ import annotations

import argparse
import base64
import json
import random
import statistics
import time
from dataclasses import replace
from pathlib import Path

from edge_csp import Context, Picture, Pruning, Sampling, Session, VisionModel, load_picture, open_session
from edge_csp.chat import PictureReader, read_messages
from edge_csp.cli.options import DEMO, demo_files
from edge_csp.usage import Counters

GREEDY = Sampling(temperature=0)
NAMES = ("Max", "Ida", "Jon", "Lou", "Meg", "Ray", "Eve", "Pam", "Bob", "Kim", "Ann", "Zed")
N_NEWEST = 4
RESEND_COUNTERS = ("n_encoded", "n_picture_cell", "n_text_cell", "n_restart")


def rss() -> float:
    """Resident memory of this process, MiB."""
    words = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(words["VmRSS"].split()[0]) / 1024


def known_answers(model: VisionModel, pictures: list[Picture]) -> list[str]:
    """What the model says about each picture alone."""
    with Context(model, n_ctx=256) as context:
        answers = []
        for picture in pictures:
            context.clear()
            session = Session(context, sampling=GREEDY)
            answers.append("".join(session.ask("What is in picture 1?", [picture], n_predict=16)).strip())
    return answers


def album(model: VisionModel, n_picture: int, n_cell: int, n_shuffle: int) -> None:
    pool = [load_picture(path) for path in sorted((DEMO / "album").glob("*.png"))]
    answers = known_answers(model, pool)
    for bound in (n_cell, None):
        n_right = n_question = 0
        for shuffle in range(n_shuffle):
            order = random.Random(shuffle)
            shown = [order.randrange(len(pool)) for _ in range(n_picture - N_NEWEST)]
            newest = order.sample(range(len(pool)), N_NEWEST)
            names = order.sample(NAMES, N_NEWEST)
            parts: list[dict[str, object]] = [{"type": "image", "picture": pool[i]} for i in shown]
            for name, i in zip(names, newest, strict=True):
                parts += [{"type": "text", "text": f"This is {name}."}, {"type": "image", "picture": pool[i]}]
            with Context(model, n_ctx=bound or 80 * n_picture) as context:
                session = Session(context, pruning=Pruning(cells=bound), sampling=GREEDY)
                begin, before, most = time.perf_counter(), rss(), 0
                for name, i in zip(names, newest, strict=True):
                    parts.append({"type": "text", "text": f"What is in the picture of {name}?"})
                    answer = "".join(session.ask_parts(parts, n_predict=16)).strip()
                    parts, most = [], max(most, context.n_cell)
                    n_right += answer == answers[i]
                    n_question += 1
                counters = session.counters
                print(
                    f"{bound or 'all'} cells, shuffle {shuffle}: {session.n_token} tokens, {most} cells at most, "
                    f"{counters.n_eviction} evictions, {time.perf_counter() - begin:.1f} s, "
                    f"memory {before:.1f} -> {rss():.1f} MiB",
                    flush=True,
                )
        print(f"{bound or 'all'} cells: {n_right} of {n_question} answers about the newest {N_NEWEST} pictures right")


def chat(model: VisionModel, n_turn: int, n_cell: int) -> None:
    pool = [load_picture(path) for path in sorted((DEMO / "album").glob("*.png"))]
    questions = ("What is in picture {}?", "Which digit is in picture {}?", "What color is the shape in picture {}?")
    with Context(model, n_ctx=n_cell) as context:
        session = Session(context, pruning=Pruning(cells=n_cell), sampling=GREEDY)
        for turn in range(n_turn):
            n_picture = turn // 10 + 1
            new = [pool[n_picture % len(pool)]] if turn % 10 == 0 else []
            for _ in session.ask(questions[turn % len(questions)].format(n_picture), new, n_predict=16):
                pass
            if turn + 1 in (1, 10, 100) or (turn + 1) % 100 == 0:
                counters = session.counters
                print(
                    f"turn {turn + 1}: {session.n_token} tokens, {context.n_cell} cells, {counters.n_eviction} "
                    f"evictions, {counters.n_restart} restarts, memory {rss():.1f} MiB",
                    flush=True,
                )


def resend(n_picture: int, n_repeat: int) -> None:
    paths = sorted((DEMO / "album").glob("*.png"))[:n_picture]
    urls = ["data:image/png;base64," + base64.b64encode(path.read_bytes()).decode() for path in paths]
    album = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    first = [{"role": "user", "content": [*album, {"type": "text", "text": "What is in picture 2?"}]}]
    for budget in ("100%", "20%"):
        seconds: list[list[float]] = [[], []]
        for _ in range(n_repeat):
            with open_session(*demo_files(), budget=budget, n_threads=1, sampling=GREEDY) as session:
                pictures, messages, before = PictureReader(), list(first), Counters()
                for turn in range(2):
                    body, begin = json.dumps(messages), time.perf_counter()
                    session.prefill(read_messages(json.loads(body), pictures))
                    session.prune(after_token=True)
                    stream = session.generate(n_predict=16)
                    answer = next(stream)
                    seconds[turn].append(time.perf_counter() - begin)
                    answer += "".join(stream)
                    messages += [
                        {"role": "assistant", "content": answer},
                        {"role": "user", "content": "And in picture 7?"},
                    ]
                    done = session.counters
                    took = [getattr(done, name) - getattr(before, name) for name in RESEND_COUNTERS]
                    before = replace(done)
        words = ", ".join(f"{name} {n}" for name, n in zip(RESEND_COUNTERS, took, strict=True))
        one, two = (statistics.median(times) for times in seconds)
        print(
            f"{budget}: first token after {1000 * one:.1f} ms, in the second turn {1000 * two:.2f} ms "
            f"({100 * two / one:.1f} %; {1000 * min(seconds[1]):.2f} .. {1000 * max(seconds[1]):.2f}); it took {words}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    commands = parser.add_subparsers(dest="command", required=True)
    of_album = commands.add_parser("album")
    of_album.add_argument("--pictures", type=int, default=100)
    of_album.add_argument("--cells", type=int, default=1024)
    of_album.add_argument("--shuffles", type=int, default=6)
    of_chat = commands.add_parser("chat")
    of_chat.add_argument("--turns", type=int, default=1000)
    of_chat.add_argument("--cells", type=int, default=512)
    of_resend = commands.add_parser("resend")
    of_resend.add_argument("--pictures", type=int, default=8)
    of_resend.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    if options.command == "resend":
        resend(options.pictures, options.repeat)
        return
    with VisionModel(*demo_files(), n_threads=1) as model:
        if options.command == "album":
            album(model, options.pictures, options.cells, options.shuffles)
        else:
            chat(model, options.turns, options.cells)


if __name__ == "__main__":
    main()
