"""Muon for weight matrices, AdamW for everything else, one schedule for both."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def cpu_seconds() -> float:
    """Time that each thread of this process has computed: schedules follow it, a busy machine only takes longer."""
    return time.process_time() / torch.get_num_threads()


class Progress:
    """How far a stage has come, over all the processes that it took."""

    save_every = 60.0  # seconds

    def __init__(self) -> None:
        self.step, self.used = 0, 0.0
        self._start = self._saved = self._seconds = 0.0

    def begin(self, minutes: float) -> None:
        """Go on in this process, to the given total."""
        self._seconds = 60 * minutes
        self._start, self._saved = cpu_seconds() - self.used, self.used

    def share(self) -> float:
        """0 at the start, 1 when the time is used up."""
        self.used = cpu_seconds() - self._start
        return self.used / self._seconds

    def advance(self) -> bool:
        """Count a step; True if it is time for a checkpoint."""
        self.step += 1
        due = self.used - self._saved > self.save_every
        if due:
            self._saved = self.used
        return due

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "used": self.used}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.used = state["step"], state["used"]


def orthogonalize(grad: Tensor, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrix of grad (rows, cols) by a quintic Newton-Schulz iteration (Jordan 2024)."""
    a, b, c = _NEWTON_SCHULZ
    x = grad / (grad.norm() + 1e-7)
    wide = x.shape[0] <= x.shape[1]
    if not wide:
        x = x.T
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.T


class Muon(torch.optim.Optimizer):
    """Momentum, then an orthogonalised update of every 2-D parameter."""

    def __init__(self, params: Iterable[Tensor], lr: float = 0.02, momentum: float = 0.95) -> None:
        super().__init__(list(params), {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.mul_(group["momentum"]).add_(p.grad)
                update = orthogonalize(p.grad.add(buffer, alpha=group["momentum"]))
                p.add_(update, alpha=-group["lr"] * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)


class MuonAdamW:
    """Both optimisers behind one ``step``; ``scale`` multiplies both learning rates."""

    def __init__(self, matrices: list[nn.Parameter], rest: list[nn.Parameter], lr_muon: float, lr_adam: float) -> None:
        self._parts = [
            (Muon(matrices, lr=lr_muon), lr_muon),
            (torch.optim.AdamW(rest, lr=lr_adam, betas=(0.9, 0.98), weight_decay=0.0), lr_adam),
        ]

    def step(self, scale: float) -> None:
        for optimizer, lr in self._parts:
            for group in optimizer.param_groups:
                group["lr"] = lr * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [optimizer.state_dict() for optimizer, _ in self._parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for (optimizer, _), part in zip(self._parts, state["parts"], strict=True):
            optimizer.load_state_dict(part)


def schedule(progress: float, warmup: float = 0.02, decay: float = 0.4) -> float:
    """Learning-rate factor at progress 0..1: warm up, hold, fall linearly over the last ``decay``."""
    if progress < warmup:
        return max(progress, 1e-4) / warmup
    return min(1.0, max(0.0, (1.0 - progress) / decay))
