"""Pictures to train on: edge_csp.demo draws them, the digits are scikit-learn's ``load_digits`` (1,797 samples of 8x8).

A fixed part of the digits is held out. The package brings these along, so that albums can be drawn without
scikit-learn: ``python -m tools.train_demo.scenes`` writes the file.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from edge_csp.demo.scenes import HELD_OUT, draw_scenes

N_HELD_OUT_DIGITS = 300
_SPLIT_SEED = 1797  # the split never depends on the training seed


@dataclass(frozen=True)
class DigitSplit:
    """Indices into load_digits; ``train`` and ``held_out`` share no sample."""

    train: np.ndarray
    held_out: np.ndarray


@functools.cache
def load_digit_images() -> tuple[np.ndarray, np.ndarray]:
    """Return handwritten digits (n, 8, 8) in 0..255 uint8 and their labels (n,)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.clip(np.round(data.images * (255.0 / 16.0)), 0, 255).astype(np.uint8)
    return images, data.target.astype(np.int64)


def split_digits(n_samples: int = 1797) -> DigitSplit:
    """Split the digit samples into training and held-out ones, always the same way."""
    order = np.random.default_rng(_SPLIT_SEED).permutation(n_samples)
    return DigitSplit(train=np.sort(order[N_HELD_OUT_DIGITS:]), held_out=np.sort(order[:N_HELD_OUT_DIGITS]))


def make_scenes(n: int, seed: int, held_out: bool) -> tuple[np.ndarray, np.ndarray]:
    """Draw n random scenes; returns pictures (n, 64, 64, 3) uint8 and labels (n, 3) of color, shape, digit."""
    images, targets = load_digit_images()
    split = split_digits(len(images))
    pool = split.held_out if held_out else split.train
    return draw_scenes(np.random.default_rng([seed, int(held_out)]), n, images[pool], targets[pool])


def main() -> None:
    images, targets = load_digit_images()
    pool = split_digits(len(images)).held_out
    np.savez_compressed(HELD_OUT, images=images[pool], labels=targets[pool].astype(np.uint8))
    print(f"wrote {HELD_OUT}")


if __name__ == "__main__":
    main()
