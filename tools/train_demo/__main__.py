"""Train, export and check the demo model: ``python -m tools.train_demo --seed 1 --out edge_csp/demo``."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from edge_csp.demo.albums import DEMO_PICTURES, DEMO_POOL, DEMO_POOL_SEED, make_album
from edge_csp.demo.scenes import held_out_scenes

from . import MMPROJ_FILE, TEXT_FILE
from .check import check, show
from .export import export
from .scenes import make_scenes
from .train import Trained, train_language
from .vision import VisionEncoder, encode, pretrain

N_SCENES = 32_000
N_TEST_SCENES = 1_000
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


def train_vision(seed: int, minutes: float, pictures: np.ndarray, labels: np.ndarray, work: Path) -> VisionEncoder:
    """Train the encoder, or take the one a broken-off run left in the work folder."""
    path = work / "vision.pt"
    if path.exists():
        print(f"vision: using {path}", flush=True)
        encoder = VisionEncoder()
        encoder.load_state_dict(torch.load(path))
        return encoder
    encoder = pretrain(pictures, labels, make_scenes(N_TEST_SCENES, seed, held_out=True), minutes)
    torch.save(encoder.state_dict(), path)
    return encoder


def train(seed: int, vision_minutes: float, language_minutes: float, work: Path, out: Path) -> None:
    """Both stages; the language stage exports to the work folder every few minutes, the result goes to ``out``."""
    torch.manual_seed(seed)
    work.mkdir(parents=True, exist_ok=True)
    pictures, labels = make_scenes(N_SCENES, seed, held_out=False)
    encoder = train_vision(seed, vision_minutes, pictures, labels, work)
    features = encode(encoder, pictures)
    del pictures

    def save(trained: Trained) -> None:
        export(trained.model, encoder, trained.projector, work)

    torch.manual_seed(seed)
    train_language(features, labels, seed, language_minutes, save)
    out.mkdir(parents=True, exist_ok=True)
    for name in (TEXT_FILE, MMPROJ_FILE):
        os.replace(work / name, out / name)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.train_demo", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("edge_csp/demo"))
    parser.add_argument(
        "--work", type=Path, default=Path("build/train_demo"), help="checkpoints (default: %(default)s)"
    )
    parser.add_argument("--vision-minutes", type=float, default=20)
    parser.add_argument("--language-minutes", type=float, default=45)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--album-only", action="store_true", help="only draw the album again")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.album_only:
        train(args.seed, args.vision_minutes, args.language_minutes, args.work, args.out)
    write_album(args.seed, args.out)
    if args.album_only:
        return 0
    report = check(args.out / TEXT_FILE, args.out / MMPROJ_FILE, n_torch=3)
    show(report)
    (args.work / "check.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
