"""One model from start to finish: the encoder, then the language model, then the two GGUF files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from .export import export_mmproj, export_text
from .scenes import make_scenes
from .shape import Recipe
from .train import LanguageTraining
from .vision import VisionTraining, encode, resize

N_TEST_SCENES = 1_000


def train(recipe: Recipe, text: Path, mmproj: Path, work: Path) -> None:
    """Train and write both files.

    work: holds checkpoints, from which a run that was broken off goes on
    """
    torch.manual_seed(recipe.seed)
    work.mkdir(parents=True, exist_ok=True)
    size = recipe.shape.vision.image_size
    pictures, labels = make_scenes(recipe.n_scenes, recipe.seed, held_out=False)
    test = make_scenes(N_TEST_SCENES, recipe.seed, held_out=True)
    pictures = resize(pictures, size)
    vision = VisionTraining(recipe.shape.vision)
    _load(vision, work / "vision.pt")
    test = resize(test[0], size), test[1]
    vision.run(pictures, labels, test, recipe.vision_minutes, lambda: _save(vision, work / "vision.pt"))
    features = encode(vision.encoder, vision.heads, pictures)
    del pictures, test

    torch.manual_seed(recipe.seed)
    language = LanguageTraining(recipe.shape, recipe.seed)
    _load(language, work / "language.pt")
    language.run(features, labels, recipe.language_minutes, lambda: _save(language, work / "language.pt"))
    for path in (text, mmproj):
        path.parent.mkdir(parents=True, exist_ok=True)
    export_text(language.model, recipe.shape.picture_frame, text, recipe.name)
    export_mmproj(vision.encoder, language.projector, mmproj, recipe.name)


def _save(training: Any, path: Path) -> None:
    new = path.with_suffix(".new")
    torch.save(training.state_dict(), new)
    os.replace(new, path)


def _load(training: Any, path: Path) -> None:
    if path.exists():
        print(f"going on from {path}", flush=True)
        training.load_state_dict(torch.load(path, weights_only=False))
