"""Faults in the products of `abft_gemm.py`: what each check finds; alarms about sound rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from ckptflip.faults import Policy
from ckptflip.protect.gemm.checked import Checked
from ckptflip.protect.gemm.faulting import accumulator_faults, damaged, flipped
from ckptflip.protect.gemm.packing import pack, product
from ckptflip.protect.gemm.quantised import Quantised

CHECKS = {
    "exact": ("exact", "beside"),
    "mod 127": ("mod127", "beside"),
    "exact, columns": ("exact", "columns"),
    "mod 127, columns": ("mod127", "columns"),
}
# Rows of a batch in which false alarms are looked for.
BATCH = 512


class Found(NamedTuple):
    """Faults of one kind: put in, effective, found; and calls whose verdict on some row was not the truth."""

    all: int = 0
    effective: int = 0
    found: int = 0
    wrong: int = 0

    def plus(self, effective: bool, found: bool, wrong: bool) -> Found:
        """One more."""
        return Found(self.all + 1, self.effective + effective, self.found + found, self.wrong + wrong)

    def __add__(self, other: tuple[int, ...]) -> Found:
        """The faults of two places together."""
        return Found(*(a + b for a, b in zip(self, other, strict=True)))


def layer_of(n: int, k: int, random: np.random.Generator) -> Quantised:
    """A layer of random codes, with a scale for each output, a zero point and a bias."""
    weight = torch.from_numpy(random.integers(-128, 128, (n, k), np.int8))
    scales = torch.from_numpy(random.uniform(1e-3, 1e-2, n).astype(np.float32))
    bias = torch.from_numpy(random.standard_normal(n, np.float32))
    return Quantised(weight, scales, bias, 0.02, 3)


def codes(m: int, k: int, random: np.random.Generator, zeros: float = 0.0) -> torch.Tensor:
    """Random codes of 8 bits, some of them 0."""
    made = random.integers(0, 256, (m, k), np.uint8)
    if zeros:
        made[random.random((m, k)) < zeros] = 0
    return torch.from_numpy(made)


def in_weight(checked: Checked, m: int, faults: int, zeros: float, random: np.random.Generator) -> Found:
    """One bit of B in each call; columns of the checksum are part of it."""
    sound, found = checked.packed, Found()
    used = checked.packed.used
    for seed in range(faults):
        x = codes(m, sound.layer.inputs, random, zeros)
        clean = product(sound, x)[:, :used]
        checked.packed, _ = damaged(sound, Policy(), seed=seed)
        changed = (product(checked.packed, x)[:, :used] != clean).any(1)
        checked.run(x)
        checked.packed = sound
        found = found.plus(*judged(checked, changed))
    return found


def judged(checked: Checked, changed: torch.Tensor) -> tuple[bool, bool, bool]:
    """Whether a fault was effective, was found, and whether the verdict on any row was not the truth."""
    verdict = checked.verdict or bytes(len(changed))
    wrong = [bool(v) for v in verdict] != changed.tolist()
    return bool(changed.any()), any(verdict), wrong


def in_accumulators(checked: Checked, m: int, faults: int, random: np.random.Generator) -> Found:
    """One bit of C, of 32, in each call."""
    found, used = Found(), checked.packed.used
    for seed in range(faults):
        with accumulator_faults(checked, Policy(), seed=seed) as records:
            checked.run(codes(m, checked.packed.layer.inputs, random))
        plan = records[0].plan
        row, column = divmod(int(plan.word[0]), checked.packed.width)
        # Beyond 2^24, float32 may round a flip of a low bit away: then nothing has changed.
        before, after = (
            words.astype(np.uint32).view(np.int32).astype(np.float32) for words in (plan.before, plan.after)
        )
        changed = torch.zeros(m, dtype=torch.bool)
        changed[row] = bool(column < used and before[0] != after[0])
        found = found.plus(*judged(checked, changed))
    return found


def in_input(checked: Checked, m: int, faults: int, digests: bool, random: np.random.Generator) -> Found:
    """One bit of A in each call, after it was made; with digests of its rows, or without."""
    found = Found()
    for seed in range(faults):
        x = codes(m, checked.packed.layer.inputs, random)
        given = x.sum(1, dtype=torch.int32) if digests else None
        record = flipped(x, "codes", Policy(), seed=seed)
        changed = torch.zeros(m, dtype=torch.bool)
        changed[int(record.plan.word[0]) // x.shape[1]] = True
        checked.run(x, given=given)
        found = found.plus(*judged(checked, changed))
    return found


def campaign(shape: tuple[int, int, int], faults: int) -> Iterator[tuple[str, str, Found]]:
    """Faults of every kind under every check: check, kind, what was found."""
    m, n, k = shape
    for name, (scheme, placement) in CHECKS.items():
        random = np.random.default_rng([m, n, k])
        packed = pack(layer_of(n, k, random), scheme=scheme, placement=placement)
        checked = Checked(packed, on_error="count")
        yield name, "B", in_weight(checked, m, faults, 0.0, random)
        yield name, "B, half of A 0", in_weight(checked, m, faults, 0.5, random)
        yield name, "C", in_accumulators(checked, m, faults, random)
        yield name, "A", in_input(checked, m, faults, False, random)
        yield name, "A, digests", in_input(checked, m, faults, True, random)


def false_alarms(shape: tuple[int, int, int], rows: int) -> Iterator[tuple[str, int, int]]:
    """Sound rows, and those taken for faulty: check, rows, alarms. One row in eight is mostly zeros."""
    _, n, k = shape
    for name, (scheme, placement) in CHECKS.items():
        random = np.random.default_rng([n, k])
        packed = pack(layer_of(n, k, random), scheme=scheme, placement=placement)
        checked, alarms, done = Checked(packed, on_error="count"), 0, 0
        while done < rows:
            x = codes(min(BATCH, rows - done), k, random)
            x[::8] *= codes(len(x[::8]), k, random) < 16
            checked.run(x)
            alarms += sum(map(bool, checked.verdict or b""))
            done += len(x)
        yield name, done, alarms
