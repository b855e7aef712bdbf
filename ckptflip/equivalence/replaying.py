"""Placing a record's faults for `replay`: the map, the record's own checkpoint, what each word became."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from msgspec.structs import replace

from ckptflip.checkpoints import Checkpoint, opened
from ckptflip.checkpoints.target import position_of, positions_by_name
from ckptflip.equivalence.mapping import Became, as_tensor, equivalent
from ckptflip.equivalence.rules import AUTO, DTYPES, Rules, load
from ckptflip.errors import CheckpointError, UsageError
from ckptflip.faults.plan import Plan
from ckptflip.faults.record import Record


def placed(
    record: Record,
    target: Checkpoint,
    map: str | Path | Rules,
    source: str | Path | None,
    dtypes: str | None,
    told: Callable[[Became], None] | None,
) -> Plan:
    """The plan of a record on another framework's checkpoint; see `ckptflip.replay`.

    Raises:
        UsageError: the map cannot be read, or does not fit.
        RecordError: a tensor has no counterpart.
    """
    rules = rules_of(map, dtypes)
    with _own_checkpoint(record, source, target) as own:
        found = equivalent(record, target, rules, own)
    if told is not None:
        for each in found.became(record, target):
            told(each)
    return found.plan


def rules_of(map: str | Path | Rules, dtypes: str | None = None) -> Rules:
    """A map as rules: ``auto``, a file, or the rules themselves.

    Raises:
        UsageError: the file cannot be read, or `dtypes` is none of `DTYPES`.
    """
    if dtypes is not None and dtypes not in DTYPES:
        raise UsageError(f"dtypes must be {' or '.join(DTYPES)}, not {dtypes!r}")
    rules = map if isinstance(map, Rules) else AUTO if str(map) == "auto" else load(map)
    return rules if dtypes is None else replace(rules, dtypes=dtypes)


@contextmanager
def _own_checkpoint(
    record: Record, source: str | Path | None, target: Checkpoint
) -> Iterator[Checkpoint | None]:
    """The checkpoint that a record was made from: the one given, else one of its name beside the record."""
    if source is not None:
        with opened(source) as own:
            yield own
        return
    with ExitStack() as stack:
        for path in _beside(record):
            if path.resolve() == target.path.resolve():
                continue
            try:
                found = stack.enter_context(opened(path))
            except CheckpointError:
                # It only would have told more: without it, what is not clear is refused.
                continue
            if _fits(record, found):
                yield found
                return
        yield None


def _beside(record: Record) -> list[Path]:
    """Where the record's own checkpoint would lie: its names come from the record, so only the last part."""
    if record.path is None:
        return []
    names = dict.fromkeys(Path(n).name for n in (record.header.checkpoint, record.header.output))
    folder = Path(record.path).parent
    return [folder / name for name in names if name and (folder / name).exists()]


def _fits(record: Record, own: Checkpoint) -> bool:
    """Whether a checkpoint has every tensor of a record, as it was."""
    if own.format != record.header.format:
        return False
    names = positions_by_name(own.tensors)
    for entry in map(as_tensor, record.header.tensors):
        at = position_of(entry, names)
        if at is None or (own.tensors[at].shape, own.tensors[at].number) != (entry.shape, entry.number):
            return False
    return True
