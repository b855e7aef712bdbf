"""Asking a loader: it opens a file with one flipped bit, with its checksum repaired and with it left.

Each loader is asked in a process of its own: frameworks do not always bear each other, and some end it.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec
import numpy as np

from ckptflip.errors import CkptflipError
from ckptflip.faults.record import Record
from ckptflip.loaders.probes import Probe, Words

_LIMIT = 300
_CHECKSUM_WORDS = re.compile(
    r"crc|checksum|data ?loss|corrupt|fletcher|filter returned failure", re.IGNORECASE
)


class Verdict(msgspec.Struct, frozen=True):
    """What one loader said.

    Attributes:
        format: of the file.
        loader: the function.
        version: of its library; empty where it is not installed.
        covered: what stored checksum covers the data.
        repair: ``silent``, ``detected`` or ``refused`` with the checksum repaired; empty if nobody was asked.
        leave: the same with the checksum left.
        error: what it raised, if it did; or what is missing.
    """

    format: str
    loader: str
    version: str
    covered: str
    repair: str
    leave: str
    error: str


def ask(probe: Probe) -> Verdict:
    """Ask one loader, in a process of its own.

    Returns:
        What it said. ``silent``: it gave exactly the flipped words and no complaint. ``detected``: an error
        that speaks of a checksum or of corruption. ``refused``: another error.
    """
    missing = probe.missing()
    if missing:
        return Verdict(probe.format, probe.loader, "", probe.covered, "", "", f"{missing} is not installed")
    command = [sys.executable, "-m", "ckptflip.loaders", probe.name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT, check=False)
    except subprocess.TimeoutExpired:
        return _unanswered(probe, f"no answer within {_LIMIT} s")
    last = done.stdout.strip().splitlines()[-1:] or [""]
    try:
        return msgspec.json.decode(last[0], type=Verdict)
    except msgspec.DecodeError:
        said = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        return _unanswered(probe, said[0])


def _unanswered(probe: Probe, why: str) -> Verdict:
    return Verdict(probe.format, probe.loader, probe.version(), probe.covered, "", "", why)


def ask_here(probe: Probe) -> Verdict:
    """Ask one loader in this process."""
    from ckptflip.alter import inject

    calls = probe.load_calls()
    answers: dict[str, str] = {}
    error = ""
    with tempfile.TemporaryDirectory() as name:
        folders = {mode: Path(name) / mode for mode in ("original", "repair", "leave")}
        for folder in folders.values():
            folder.mkdir()
        path = calls.write(folders["original"])
        before = calls.load(path)
        for mode in ("repair", "leave"):
            out = folders[mode] / path.name
            record = inject(path, out=out, count=1, seed=1, forbid=("nan", "inf"), checksum=mode)
            try:
                after = calls.load(out)
            except CkptflipError:
                raise
            except Exception as why:  # whatever a framework raises is its answer
                text = " ".join(str(why).replace(name, "…").split())
                error = f"{type(why).__name__}: {_without_paths(text)[:160]}"
                answers[mode] = "detected" if _CHECKSUM_WORDS.search(text) else "refused"
            else:
                answers[mode] = (
                    "silent" if changed(before, after) == planned(record) else "other words changed"
                )
    said = (answers["repair"], answers["leave"])
    return Verdict(probe.format, probe.loader, probe.version(), probe.covered, *said, error)


def planned(record: Record) -> dict[tuple[str, int], int]:
    """What a record's faults change: masks by tensor and word."""
    masks = record.plan.before ^ record.plan.after
    return {
        (record.header.tensors[tensor].name, int(word)): int(mask)
        for tensor, rows in record.plan.by_tensor()
        for word, mask in zip(record.plan.word[rows], masks[rows], strict=True)
        if mask
    }


def changed(before: Words, after: Words) -> dict[tuple[str, int], int]:
    """What differs between two loaded checkpoints, likewise."""
    if set(before) != set(after):
        raise CkptflipError("the loader gives other tensors than before")
    return {
        (name, int(word)): int(change[word])
        for name, words in before.items()
        for change in [words.reshape(-1) ^ after[name].reshape(-1)]
        for word in np.flatnonzero(change)
    }


def _without_paths(text: str) -> str:
    """Names of folders, and of nodes in a graph, say nothing and differ from run to run."""
    text = re.sub(r"\{\{.*?\}\}\s*", "", text)
    return re.sub(r"(?:/[\w.\-]+)+/(?=[\w.\-]*)", "…/", text)
