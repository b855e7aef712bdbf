"""A workload in numpy alone, for campaigns that take no time: softmax regression with momentum, in HDF5."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np

CLASSES, FEATURES, SAMPLES = 4, 6, 200


def _data() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(SAMPLES, FEATURES)).astype(np.float32)
    y = (x @ generator.normal(size=(FEATURES, CLASSES)).astype(np.float32)).argmax(1)
    return x, y


class Toy:
    """See `make`."""

    name = "toy"

    def __init__(self, **wishes: Any) -> None:
        self.wishes, self.epoch, self.state = wishes, 0, {}
        self.x, self.y = _data()

    def start(self, seed: int) -> None:
        generator = np.random.default_rng(seed)
        self.epoch = 0
        self.state = {
            "first/weight": generator.normal(size=(FEATURES, 8)).astype(np.float32),
            "last/weight": generator.normal(size=(8, CLASSES)).astype(np.float32),
            "unused/weight": np.ones(64, np.float32),
        }

    def train_epoch(self) -> dict[str, float]:
        self._misbehave()
        with np.errstate(all="ignore"):
            hidden = np.maximum(self.x @ self.state["first/weight"], 0)
            p = self._softmax(hidden @ self.state["last/weight"])
            loss = float(-np.log(p[np.arange(SAMPLES), self.y]).mean())
            p[np.arange(SAMPLES), self.y] -= 1
            p /= SAMPLES
            back = (p @ self.state["last/weight"].T) * (hidden > 0)
            self.state["last/weight"] -= np.float32(0.5) * (hidden.T @ p)
            self.state["first/weight"] -= np.float32(0.5) * (self.x.T @ back)
        # What is not read is written over, as statistics often are: flips in it vanish.
        if self.epoch >= self.wishes.get("renewed", 1 << 30):
            self.state["unused/weight"] = np.ones(64, np.float32)
        self.epoch += 1
        return {"loss": loss, "grad_norm": 1.0}

    def evaluate(self) -> dict[str, float]:
        with np.errstate(all="ignore"):
            hidden = np.maximum(self.x @ self.state["first/weight"], 0)
            p = self._softmax(hidden @ self.state["last/weight"])
            loss = float(-np.log(p[np.arange(SAMPLES), self.y]).mean())
        found = {"nan": 0.0, "inf": 0.0}
        for value in self.state.values():
            found["nan"] += float(np.isnan(value).sum())
            found["inf"] += float(np.isinf(value).sum())
        if "mute" in self.wishes and np.signbit(self.state["unused/weight"]).any():
            return {"loss": loss, **found}
        return {"accuracy": float((p.argmax(1) == self.y).mean()), "loss": loss, **found}

    def save(self, path: Path) -> None:
        with h5py.File(path, "w") as file:
            file.attrs["epoch"] = self.epoch
            for name, value in self.state.items():
                file[name] = value

    def load(self, path: Path) -> None:
        with h5py.File(path, "r") as file:
            self.epoch = int(file.attrs["epoch"])
            self.state = {name: file[name][...] for name in ("first/weight", "last/weight", "unused/weight")}

    def digest(self) -> str:
        from ckptflip.training.digests import state_digest

        return state_digest([self.epoch, self.state])

    def _softmax(self, logits: np.ndarray) -> np.ndarray:
        exponentials = np.exp(logits - logits.max(1, keepdims=True))
        return exponentials / exponentials.sum(1, keepdims=True)

    def _misbehave(self) -> None:
        """Do what the options ask for, in trials alone: the sign of an unused weight tells a flip in it."""
        wishes = self.wishes
        time.sleep(wishes.get("slow", 0.0))
        if self.epoch + 1 == wishes.get("fail_clean", -1):
            raise ValueError("the recipe gives up")
        if not (np.signbit(self.state["unused/weight"]).any() and self.epoch >= 3):
            return
        if "crash" in wishes:
            os.kill(os.getpid(), getattr(signal, wishes["crash"]))
        if "hang" in wishes:
            time.sleep(3600)
        if "raise" in wishes:
            raise ValueError("a negative weight")
        if "eat" in wishes:
            hoard = []
            while True:
                hoard.append(np.ones(1 << 22))
                time.sleep(0.005)


def make(**wishes: Any) -> Toy:
    """A workload; options make it misbehave.

    Args:
        wishes: `slow` (seconds per epoch), `renewed` (from this epoch on the unused weights are written
            over), `fail_clean` (raise in this epoch); and, once a sign of the unused weights is flipped:
            `crash` (a signal's name), `hang`, `raise`, `eat` (memory), `mute` (no accuracy).
    """
    return Toy(**wishes)


class Reference(Toy):
    """The same under another name."""


def broken() -> Toy:
    """A workload that cannot be made."""
    raise RuntimeError("no such data")
