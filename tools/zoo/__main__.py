"""The models on which eviction rules are measured.

python -m tools.zoo                    # what there is
python -m tools.zoo fetch [NAME ...]   # weights of others, verified
python -m tools.zoo train NAME ...     # our own: hours of one core, a run that was broken off goes on
python -m tools.zoo check NAME ...     # exact answers of our own with the full cache, through llama.cpp
python -m tools.zoo albums             # pictures and questions for smol-eyes
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .albums import draw_albums
from .fetch import ZooError, fetch
from .models import MODELS, Fetched, Trained

ROOT = Path(__file__).parents[2]
TEXT, MMPROJ = "text-f16.gguf", "mmproj-f16.gguf"  # of the models trained here


def show_table(out: Path) -> None:
    for name, model in MODELS.items():
        there = any((out / name).glob("text*.gguf"))
        kind = "fetched" if isinstance(model, Fetched) else "trained"
        use = "held out" if model.held_out else "development"
        print(f"{name:10} {kind} {use:12} {'there' if there else '-':6} {model.what}")


def fetch_all(names: Sequence[str], out: Path, shared: Path) -> None:
    chosen = names or [name for name, model in MODELS.items() if isinstance(model, Fetched)]
    for name in chosen:
        model = MODELS[name]
        if not isinstance(model, Fetched):
            raise ZooError(f"{name} is not fetched but trained: python -m tools.zoo train {name}")
        fetch(name, model, out / name, shared)


def _ours(names: Sequence[str]) -> dict[str, Trained]:
    found = {}
    for name in names:
        model = MODELS[name]
        if not isinstance(model, Trained):
            raise ZooError(f"{name} is not trained here: python -m tools.zoo fetch {name}")
        found[name] = model
    return found


def train_all(names: Sequence[str], out: Path, vision_minutes: float | None, language_minutes: float | None) -> None:
    chosen = _ours(names)
    import torch

    from tools.train_demo.pipeline import train

    torch.set_num_threads(1)  # the recipes count minutes of one core
    for name, model in chosen.items():
        recipe = model.recipe
        if vision_minutes is not None:
            recipe = replace(recipe, vision_minutes=vision_minutes)
        if language_minutes is not None:
            recipe = replace(recipe, language_minutes=language_minutes)
        train(recipe, out / name / TEXT, out / name / MMPROJ, out / name / "work")
        print(f"{name}: trained; python -m tools.zoo check {name}")


def check_all(names: Sequence[str], out: Path, n_albums: int, n_torch: int) -> None:
    chosen = _ours(names)
    from tools.train_demo.check import check, show

    for name, model in chosen.items():
        print(f"{name}:")
        report = check(out / name / TEXT, out / name / MMPROJ, n_albums=n_albums, sizes=model.sizes, n_torch=n_torch)
        show(report)
        (out / name / "check.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.zoo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "zoo", help="a folder per model goes here")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    command = commands.add_parser("fetch", help="fetch the weights of others")
    command.add_argument("names", nargs="*", choices=[*MODELS, []], metavar="NAME")
    command.add_argument("--shared", type=Path, default=ROOT.parent / "shared" / "models", help="where else to look")
    command = commands.add_parser("train", help="train our own")
    command.add_argument("names", nargs="+", choices=MODELS, metavar="NAME")
    command.add_argument("--vision-minutes", type=float, help="instead of the recipe's")
    command.add_argument("--language-minutes", type=float, help="instead of the recipe's")
    command = commands.add_parser("check", help="exact answers with the full cache")
    command.add_argument("names", nargs="+", choices=MODELS, metavar="NAME")
    command.add_argument("--albums", type=int, default=12, help="per size, 22 questions each (default: %(default)s)")
    command.add_argument("--torch", type=int, default=0, metavar="N", help="compare N albums with torch")
    command = commands.add_parser("albums", help="draw pictures and questions for smol-eyes")
    command.add_argument("--albums", type=int, default=50, help="4 questions each (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        if args.command == "fetch":
            fetch_all(args.names, args.out, args.shared)
        elif args.command == "train":
            train_all(args.names, args.out, args.vision_minutes, args.language_minutes)
        elif args.command == "check":
            check_all(args.names, args.out, args.albums, args.torch)
        elif args.command == "albums":
            draw_albums(args.albums, args.out / "albums")
        else:
            show_table(args.out)
    except ZooError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
