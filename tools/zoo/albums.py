"""Albums for real language weights with eyes: three drawn pictures each, and free questions about them by their order.

In the format of `edge-csp bench quality --folder`. The digits are those that no encoder of ours has seen; answers are
right if they contain what was asked for.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from PIL import Image

from edge_csp.demo.scenes import Scene, held_out_scenes

N_PICTURE, N_QUESTION, N_POOL, SEED = 3, 4, 64, 11
ORDER = ("first", "second", "third")
INTRODUCTIONS = ("Here are some pictures.", "Look at these pictures of mine.", "These are drawings.")
QUESTIONS = (  # what an answer has to contain, and how it is asked for
    ("{color} {shape}", "Describe the {which} picture in one sentence."),
    ("{color}", "What color is the shape in the {which} picture?"),
    ("{shape}", "Which shape is in the {which} picture?"),
    ("{digit}", "Which digit is in the {which} picture?"),
    ("{color} {shape}", "What do you see in the {which} picture?"),
    ("{color} {shape}", "Write a short poem about the {which} picture."),
)


def draw_albums(n_album: int, out: Path) -> None:
    """Write a folder for every album."""
    pool, labels = held_out_scenes(N_POOL, 777 + SEED)
    rng = random.Random(SEED)
    for number in range(n_album):
        folder = out / f"{number:02d}"
        folder.mkdir(parents=True, exist_ok=True)
        rows = rng.sample(range(N_POOL), N_PICTURE)
        for i, row in enumerate(rows, start=1):
            Image.fromarray(pool[row]).save(folder / f"{i}.png")
        shown = [{"type": "image", "image": f"{i}.png"} for i in range(1, N_PICTURE + 1)]
        content = [*shown, {"type": "text", "text": rng.choice(INTRODUCTIONS)}]
        questions = [_ask(rng, [Scene(*map(int, labels[row])) for row in rows]) for _ in range(N_QUESTION)]
        album = {"judge": "contains", "messages": [{"role": "user", "content": content}], "questions": questions}
        (folder / "album.json").write_text(json.dumps(album, indent=1) + "\n", encoding="utf-8")


def _ask(rng: random.Random, scenes: list[Scene]) -> dict[str, str]:
    i = rng.randrange(len(scenes))
    answer, question = rng.choice(QUESTIONS)
    scene = scenes[i]
    right = answer.format(color=scene.color_name, shape=scene.shape_name, digit=scene.digit)
    return {"kind": "free", "q": question.format(which=ORDER[i]), "a": right}
