"""What the tests of the PyTorch frameworks share: a small model, data, and reading its words."""

from __future__ import annotations

import numpy as np
import torch

from ckptflip.live.torch_tensors import TorchTarget

X = torch.from_numpy(np.random.default_rng(0).random((24, 6), "float32"))
Y = (X.sum(dim=1) > 3).long()


def small_model(seed=1):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))


def words_of(model, optimizer=None):
    """Every word of a model and its optimizer, by name."""
    target = TorchTarget(model, optimizer)
    return {t.name: target.read(i, np.arange(t.words)).copy() for i, t in enumerate(target.tensors)}


def differing(a, b):
    """Words that differ: (name, position) → (in a, in b)."""
    assert a.keys() == b.keys()
    return {
        (name, int(i)): (int(a[name][i]), int(b[name][i]))
        for name in a
        for i in np.flatnonzero(a[name] != b[name])
    }


def recorded(record):
    """The effective words of a record: (name, position) → (before, after)."""
    plan, entries = record.plan, record.header.tensors
    rows = zip(plan.tensor, plan.word, plan.before, plan.after, strict=True)
    return {(entries[t].name, int(w)): (int(b), int(a)) for t, w, b, a in rows if a != b}
