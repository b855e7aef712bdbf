"""What a sensible user would write without this package: one process that loads, flips, trains and evaluates.

    python benchmarks/plain_campaign.py CHECKPOINT.pt CONDITIONS.json

Prints the seconds per trial as JSON. PyTorch's default number of threads, batches by slicing, no bookkeeping
beyond the accuracy. It trains what `digits-cnn` trains, every trial to its end.
"""

from __future__ import annotations

import json
import sys
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

EPOCHS, BATCH = 10, 64
BITS = {"all": (0, 31), "exponent": (23, 30), "mantissa": (0, 22), "critical": (30, 30)}


def model() -> nn.Module:
    return nn.Sequential(OrderedDict(
        conv1=nn.Conv2d(1, 16, 3, padding=1), relu1=nn.ReLU(),
        conv2=nn.Conv2d(16, 32, 3, padding=1), relu2=nn.ReLU(),
        pool=nn.MaxPool2d(2), flatten=nn.Flatten(), dropout1=nn.Dropout(0.25),
        fc1=nn.Linear(512, 64), relu3=nn.ReLU(), dropout2=nn.Dropout(0.25), fc2=nn.Linear(64, 10),
    ))  # fmt: skip


def flip(state: dict[str, torch.Tensor], bits: str, count: int, seed: int) -> None:
    """Flip bits of the weights, drawn over all of them."""
    generator = np.random.default_rng(seed)
    views = [tensor.numpy().view(np.uint32).reshape(-1) for tensor in state.values()]
    ends = np.cumsum([view.size for view in views])
    low, high = BITS.get(bits, (0, 31))
    for place in generator.integers(0, ends[-1], count):
        at = int(np.searchsorted(ends, place, side="right"))
        bit = int(generator.integers(low, high + 1))
        while bits == "all,!critical" and bit == 30:
            bit = int(generator.integers(low, high + 1))
        views[at][place - (ends[at - 1] if at else 0)] ^= np.uint32(1 << bit)


def trial(path: str, data: Any, bits: str, count: int, seed: int) -> list[float]:
    """Load, flip, train to the end; the accuracy after each epoch."""
    x, y, x_test, y_test = data
    checkpoint = torch.load(path, weights_only=True)
    flip(checkpoint["model"], bits, count, seed)
    network = model()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=5, gamma=0.5)
    network.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    scheduler.load_state_dict(checkpoint["scheduler"])
    torch.manual_seed(0)
    loss_of = nn.CrossEntropyLoss()
    found = []
    for _ in range(EPOCHS):
        network.train()
        for batch in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            loss = loss_of(network(x[batch]), y[batch])
            loss.backward()
            optimizer.step()
        scheduler.step()
        network.eval()
        with torch.no_grad():
            found.append((network(x_test).argmax(1) == y_test).double().mean().item())
    return found


def main() -> None:
    path, conditions = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    pixels, targets = load_digits(return_X_y=True)
    inputs = torch.from_numpy((pixels / 16).astype(np.float32).reshape(-1, 1, 8, 8))
    x, x_test, y, y_test = train_test_split(
        inputs, torch.from_numpy(targets), test_size=0.2, stratify=targets, random_state=0
    )
    began = time.perf_counter()
    for bits, count, seed in conditions:
        trial(path, (x, y, x_test, y_test), bits, count, seed)
    print(json.dumps({"seconds": (time.perf_counter() - began) / len(conditions)}))


if __name__ == "__main__":
    main()
