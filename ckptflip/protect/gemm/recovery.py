"""What is done with rows that do not hold: judged in parts, corrected, computed and packed anew, or told.

A row that float32 may have rounded is computed again in parts of at most 514 inputs, whose accumulators are
all exact: it is a fault only if a part does not hold, or their sum is not what the row said.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ckptflip.errors import DetectedError
from ckptflip.protect.gemm.packing import Packed, may_be_wide, pack, product
from ckptflip.protect.gemm.passes import FAULTY, HOLDS, INPUT, WIDE, judged, results
from ckptflip.protect.gemm.sums import CHUNK, row_sums

if TYPE_CHECKING:
    from ckptflip.protect.gemm.checked import Checked


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One call: codes (m, k), accumulators (m, width), results (m, n), and what came with them."""

    x: torch.Tensor
    rows: torch.Tensor
    out: torch.Tensor
    x_scale: float
    x_zero: int
    given: torch.Tensor | None
    made: torch.Tensor | None


def settle_rows(checked: Checked, call: Call, found: bytes) -> None:
    """Bring the rows that do not hold to a verdict, and do what the policy says.

    Raises:
        DetectedError: with `raise`; or where a fault stays after all that the policy allows was done.
    """
    verdicts = torch.frombuffer(bytearray(found), dtype=torch.uint8)
    wide = verdicts == WIDE
    if bool(wide.any()) and may_be_wide(checked.packed):
        verdicts[wide] = _in_parts(checked, call, wide)
    # Where no sound row can be so wide, being so is a fault.
    verdicts[verdicts == WIDE] = FAULTY
    checked.verdict = None if bool((verdicts == HOLDS).all()) else bytes(verdicts.tolist())
    if checked.verdict is None:
        return
    checked.seen.faulty += 1
    if checked.on_error == "count":
        bad = verdicts != HOLDS
        _write(checked, call, bad, call.rows[bad])
        return
    _refuse(checked, verdicts)
    bad = verdicts == FAULTY
    if checked.on_error == "correct" and _corrected(checked, call, bad):
        return
    _anew(checked, call, bad)


def _refuse(checked: Checked, verdicts: torch.Tensor) -> None:
    """Raise where nothing can be done here, or nothing should."""
    if bool((verdicts == INPUT).any()):
        raise DetectedError(
            f"layer {checked.name}: the input of {_named(verdicts == INPUT)} changed after it was made: run "
            "the layers before it again"
        )
    if checked.on_error == "raise":
        raise DetectedError(
            f"layer {checked.name}: {_unmatched(verdicts != HOLDS)}: run it again, and load the "
            "weights anew if it comes back (on_error='recompute' does both by itself)"
        )


def _named(bad: torch.Tensor) -> str:
    rows = bad.nonzero().flatten().tolist()
    if len(rows) == 1:
        return f"row {rows[0]}"
    return f"{len(rows)} rows ({', '.join(map(str, rows[:5]))}{', …' if len(rows) > 5 else ''})"


def _unmatched(bad: torch.Tensor) -> str:
    fits = "does not match its checksum" if int(bad.sum()) == 1 else "do not match their checksums"
    return f"{_named(bad)} of the product {fits}"


def _write(checked: Checked, call: Call, which: torch.Tensor, rows: torch.Tensor) -> None:
    """Write results of some rows, from accumulators that were checked elsewhere or are let pass."""
    made = results(checked.packed, rows, call.x_scale, call.x_zero)
    call.out[which] = made
    if call.made is not None:
        call.made[which] = made.sum(1, dtype=torch.int32)


def exact_rows(packed: Packed, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Accumulators of any size, from parts of at most 514 inputs; and whether all parts of each row hold.

    Args:
        packed: the layer.
        x: codes, uint8 of shape (m, k).

    Returns:
        int32 of shape (m, width), bool of shape (m,).
    """
    total = torch.zeros(len(x), packed.width, dtype=torch.int32)
    holds = torch.ones(len(x), dtype=torch.bool)
    for start in range(0, x.shape[1], CHUNK):
        part = torch.zeros_like(x)
        part[:, start : start + CHUNK] = x[:, start : start + CHUNK]
        rows = product(packed, part)
        holds &= judged(packed, rows, part) == HOLDS
        total += rows.to(torch.int32)
    return total, holds


def _in_parts(checked: Checked, call: Call, wide: torch.Tensor) -> torch.Tensor:
    """The verdicts of rows that float32 may have rounded; those that hold are written."""
    exact, holds = exact_rows(checked.packed, call.x[wide])
    used = checked.packed.used
    holds &= (exact[:, :used].float() == call.rows[wide][:, :used]).all(1)
    sound = wide.clone()
    sound[wide] = holds
    _write(checked, call, sound, exact[holds])
    return torch.where(holds, HOLDS, FAULTY).to(torch.uint8)


def _anew(checked: Checked, call: Call, bad: torch.Tensor) -> None:
    """Compute rows again; if they still do not hold, pack the weight again and try once more."""
    for packing in (False, True):
        if packing:
            _repack(checked)
        exact, holds = exact_rows(checked.packed, call.x[bad])
        if bool(holds.all()):
            _write(checked, call, bad, exact)
            checked.seen.recomputed += 1
            return
    raise DetectedError(
        f"layer {checked.name}: {_unmatched(bad)}, also after the weight was packed anew: load the "
        "checkpoint again"
    )


def _repack(checked: Checked) -> None:
    """Pack the layer again from its codes, if these are sound."""
    packed = checked.packed
    if not torch.equal(row_sums(packed.layer.weight), packed.sums):
        raise DetectedError(
            f"layer {checked.name}: the codes of the weight do not match their checksum: load the checkpoint "
            "again"
        )
    checked.packed = pack(packed.layer, scheme=packed.scheme, placement=packed.placement)


def _corrected(checked: Checked, call: Call, bad: torch.Tensor) -> bool:
    """Mend single accumulators where the sums of rows and of columns name them; whether all rows then hold.

    A row that is off and the one column that is off by as much meet in the faulty number. The sums of columns
    are computed here, when there is a fault, from the codes of the weight: Σ_i C_ij = (Σ_i A_i) · B_j.
    """
    packed = checked.packed
    n = packed.layer.outputs
    if may_be_wide(packed) or not torch.equal(row_sums(packed.layer.weight), packed.sums):
        return False
    rows = call.rows.double()
    wanted = packed.layer.weight.double() @ call.x.double().sum(0)
    off = (~(rows[:, :n].sum(0) == wanted)).nonzero().flatten()
    where = bad.nonzero().flatten()
    if len(off) != 1 or len(where) != 1:
        return False
    row, column = int(where[0]), int(off[0])
    others = torch.cat([rows[:row, column], rows[row + 1 :, column]]).sum()
    mended = call.rows[row : row + 1].clone()
    mended[0, column] = wanted[column] - others
    if int(judged(packed, mended, call.x[row : row + 1])[0]) != HOLDS:
        return False
    _write(checked, call, bad, mended)
    checked.seen.recomputed += 1
    return True
