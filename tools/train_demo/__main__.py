"""Train, export and check the demo model: ``python -m tools.train_demo --seed 1 --out edge_csp/demo``."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from edge_csp.demo.albums import DEMO_PICTURES, DEMO_POOL, DEMO_POOL_SEED, make_album
from edge_csp.demo.scenes import held_out_scenes

from . import MMPROJ_FILE, NAME, TEXT_FILE
from .check import check, show
from .pipeline import train
from .shape import Recipe

RECIPE = Recipe(NAME)
NOTE = (
    "Pictures drawn by tools/train_demo with handwritten digits the model was not trained on; every kind of question, "
    "drawn by the seed alone and not by what the model answers."
)


def write_album(seed: int, out: Path) -> None:
    """Write the embedded album: 12 held-out pictures and two questions of every kind."""
    pool, labels = held_out_scenes(DEMO_POOL, DEMO_POOL_SEED + seed)
    album = make_album(seed, labels, DEMO_PICTURES, 2)
    folder = out / "album"
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{i + 1:02d}.png" for i in range(DEMO_PICTURES)]
    for name, row in zip(names, album.pictures, strict=True):
        Image.fromarray(pool[row]).save(folder / name, optimize=True)
    messages = [
        {
            "role": message["role"],
            "content": [
                {"type": "image", "image": names[part["image"]]} if part["type"] == "image" else part
                for part in message["content"]
            ],
        }
        for message in album.messages
    ]
    questions = [{"kind": kind, "q": question, "a": answer} for kind, question, answer in album.questions]
    text = json.dumps({"messages": messages, "questions": questions, "note": NOTE}, indent=1, ensure_ascii=False)
    (folder / "album.json").write_text(text + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.train_demo", description=__doc__)
    parser.add_argument("--seed", type=int, default=RECIPE.seed)
    parser.add_argument("--out", type=Path, default=Path("edge_csp/demo"))
    parser.add_argument(
        "--work", type=Path, default=Path("build/train_demo"), help="checkpoints (default: %(default)s)"
    )
    parser.add_argument("--vision-minutes", type=float, default=RECIPE.vision_minutes)
    parser.add_argument("--language-minutes", type=float, default=RECIPE.language_minutes)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--album-only", action="store_true", help="only draw the album again")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.album_only:
        minutes = {"vision_minutes": args.vision_minutes, "language_minutes": args.language_minutes}
        recipe = replace(RECIPE, seed=args.seed, **minutes)
        train(recipe, args.out / TEXT_FILE, args.out / MMPROJ_FILE, args.work)
    write_album(args.seed, args.out)
    if args.album_only:
        return 0
    report = check(args.out / TEXT_FILE, args.out / MMPROJ_FILE, n_torch=3)
    show(report)
    (args.work / "check.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
