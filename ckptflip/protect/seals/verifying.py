"""Verifying a checkpoint by its seal: whether every byte is what it was, and which bits are not."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from msgspec import Struct

from ckptflip.checkpoints.files import Progress, locked
from ckptflip.errors import DamagedCheckpointError
from ckptflip.protect.seals import sidecar
from ckptflip.protect.seals.checking import Checked, checked
from ckptflip.protect.seals.findings import Damage, Findings
from ckptflip.protect.seals.members import paths_of
from ckptflip.protect.seals.mending import mended
from ckptflip.protect.seals.naming import Names
from ckptflip.protect.seals.sidecar import Seal
from ckptflip.protect.seals.work import workers_for

_MOST_LOCKS = 64


class Verdict(Struct, frozen=True):
    """What a seal says of a checkpoint.

    Attributes:
        checkpoint: what was verified.
        seal: by what.
        bytes: how many are sealed.
        files: in how many files.
        damage: all that is not as it was sealed.
        cells: how many cells (blocks, or parts of blocks that end with a file) are damaged.
        unnamed: why tensors are not named, where they are not.
    """

    checkpoint: Path
    seal: Path
    bytes: int
    files: int
    damage: tuple[Damage, ...]
    cells: int
    unnamed: str = ""

    @property
    def intact(self) -> bool:
        """Whether every sealed byte is what it was, nothing is missing or new, and the seal is whole too."""
        return not self.damage

    @property
    def mendable(self) -> bool:
        """Whether all sealed bytes can be given back."""
        return all(d.mendable for d in self.damage if d.what not in ("seal", "extra"))


def verify(
    checkpoint: str | Path,
    *,
    seal: str | Path | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Verdict:
    """Hold a checkpoint against its seal.

    Damage is located as far as the seal allows: every flipped bit where shares restore the block; without
    them, one or two flips in a block, or changes within four aligned bytes; else the range of bytes.

    Args:
        checkpoint: the checkpoint as it was named when it was sealed, or its seal.
        seal: its seal, where that does not lie beside it.
        workers: threads; by default one for each processor, eight at most.
        progress: told the bytes read.

    Raises:
        SealError: there is no seal, or it is cut or damaged so that nothing can be told.
        CheckpointError: the checkpoint is in use, or nothing of it is there.

    Example:
        >>> import os, tempfile, numpy as np
        >>> from ckptflip.protect.seals import seal
        >>> path = os.path.join(tempfile.mkdtemp(), "w.npy")
        >>> np.save(path, np.zeros(1000, np.float32))
        >>> sealed = seal(path)
        >>> verify(path).intact
        True
        >>> with open(path, "r+b") as file:
        ...     at = file.seek(128 + 4 * 7 + 3)
        ...     written = file.write(bytes([0x40]))
        >>> [(d.tensor, d.element, d.bit) for d in verify(path).damage]
        [('array', 7, 30)]
    """
    threads = workers_for(workers)
    path, read = opened_seal(Path(checkpoint), seal)
    with ExitStack() as held:
        for file in paths_of(read.header, path)[0][:_MOST_LOCKS]:
            if file.is_file():
                held.enter_context(locked(file, exclusive=False))
        found = checked(read, path, threads, progress)
        return verdict(found, path, findings_of(found))


def verified(checkpoint: str | Path, *, seal: str | Path | None = None) -> Path:
    """The checkpoint's path, once its seal was found to fit: to be written around a path that is loaded.

    Raises:
        DamagedCheckpointError: it is damaged; the message names the first place.
        SealError: there is no seal, or none that is whole.
    """
    found = verify(checkpoint, seal=seal)
    if not found.intact:
        raise DamagedCheckpointError(f"{summary(found)}. {advice(found)}")
    return Path(checkpoint)


def opened_seal(checkpoint: Path, seal: str | Path | None) -> tuple[Path, Seal]:
    """A checkpoint's path, without an index' ending where that was left out, and its seal.

    Raises:
        SealError: there is none that is whole.
    """
    if checkpoint.name.endswith(sidecar.SUFFIX) and seal is None:
        checkpoint = checkpoint.with_name(checkpoint.name.removesuffix(sidecar.SUFFIX))
    if not checkpoint.exists() and checkpoint.name:
        index = checkpoint.with_name(f"{checkpoint.name}.index")
        if index.exists() or sidecar.beside(index).exists():
            checkpoint = index
    return checkpoint, sidecar.read(Path(seal) if seal is not None else sidecar.beside(checkpoint))


def findings_of(found: Checked) -> Findings:
    """All damaged cells, mended in memory as far as possible."""
    findings = Findings(found)
    for cell in mended(found):
        findings.add(cell)
    return findings


def verdict(found: Checked, checkpoint: Path, findings: Findings, named_by: Path | None = None) -> Verdict:
    """The verdict of a pass.

    Args:
        found: by the pass.
        checkpoint: what was verified.
        findings: its damage.
        named_by: the checkpoint that gives the names, where that is a mended one.
    """
    extra = found.extra(checkpoint)
    broken = bool(found.bad) or not found.whole
    shown = named_by or checkpoint
    names = Names(shown, paths_of(found.seal.header, shown)[0]) if broken else None
    damage = findings.listed(names, extra)
    return Verdict(
        checkpoint,
        found.seal.path,
        found.seal.cuts.total,
        len(found.paths),
        tuple(damage),
        len(found.bad),
        names.why if names is not None else "",
    )


def summary(found: Verdict) -> str:
    """A verdict in a sentence.

    Example:
        >>> summary(Verdict(Path("a.h5"), Path("a.h5.seal"), 10, 1, (), 0))
        'a.h5 is as it was sealed: 10 bytes'
    """
    if found.intact:
        files = f" in {found.files} files" if found.files > 1 else ""
        return f"{found.checkpoint} is as it was sealed: {found.bytes} bytes{files}"
    # An element says more than the header or the checksum that may lie before it.
    first = next((d for d in found.damage if d.element is not None), found.damage[0])
    own = all(d.what == "seal" for d in found.damage)
    where = f"{found.seal} itself" if own else f"{found.checkpoint}"
    more = f" and {len(found.damage) - 1} more" if len(found.damage) > 1 else ""
    return f"{where} is damaged: {_place(first)}{more}"


def advice(found: Verdict) -> str:
    """What to do about damage."""
    kinds = {d.what for d in found.damage}
    if kinds == {"seal"}:
        return "Every byte of the checkpoint is right: seal it again with --overwrite"
    if kinds <= {"extra", "seal"}:
        return "Remove the extra files, or seal the checkpoint again if they belong to it"
    if found.mendable:
        named = "" if found.seal == sidecar.beside(found.checkpoint) else f" --seal {found.seal}"
        repair = f"ckptflip repair {found.checkpoint}{named}"
        return f"`{repair}` can mend it; if it was saved anew, seal it again"
    partly = "`ckptflip repair --partial` mends what can be"
    return f"Take it from a copy; {partly}; if it was saved anew, seal it again"


def _place(damage: Damage) -> str:
    if damage.what == "seal":
        return damage.part
    if damage.what == "flip" and damage.element is not None:
        return f"bit {damage.bit} of element {damage.element} of {damage.tensor}"
    words = {"missing": "is missing", "cut": "was cut", "longer": "is longer", "extra": "is new"}
    if damage.what in words:
        return f"{damage.file} {words[damage.what]}"
    tensor = f" ({damage.tensor})" if damage.tensor else ""
    return f"bytes {damage.start} to {damage.end} of {damage.file}{tensor}"
