"""Jobs and reports as files in a folder that driver and nodes share: nothing else passes between them."""

from __future__ import annotations

import contextlib
import os
import socket
import uuid
from hashlib import sha256
from pathlib import Path

import msgspec

from ckptflip.campaign.executors.protocol import Job, Report
from ckptflip.campaign.executors.worker_process import Setting


class Spool:
    """The files of one executor: a job, that it has begun, and its report, all of one name.

    A name is a digest of the job's key and a token of the submission, so that a late start of an attempt
    that was given up (a requeued batch) finds nothing to do, and is never taken for the one after it.
    Every file is written beside its place and renamed, so that a reader finds all of it or none.

    Example:
        >>> import tempfile
        >>> spool = Spool(Path(tempfile.mkdtemp()))
        >>> name = spool.put_job(Job("a", b"payload"))
        >>> spool.job(name).payload, spool.report(name)
        (b'payload', None)
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for part in ("jobs", "begun", "reports"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        self._names = {_digest_of(path.name): path.name for path in (folder / "jobs").iterdir()}

    def name(self, key: str) -> str | None:
        """What the files of a job's last submission are called, or None when there is none.

        Only the driver may ask: it alone puts jobs here.
        """
        return self._names.get(_digest(key))

    def put_setting(self, setting: Setting) -> bool:
        """Write what workers share; whether another call or other variables were there before."""
        before = None
        with contextlib.suppress(OSError, msgspec.DecodeError):
            before = self.setting()
        _write(self.folder / "setting.json", msgspec.json.encode(setting))
        return before is not None and msgspec.structs.replace(before, paths=setting.paths) != setting

    def setting(self) -> Setting:
        """What workers share."""
        return msgspec.json.decode((self.folder / "setting.json").read_bytes(), type=Setting)

    def put_job(self, job: Job) -> str:
        """Write a job, and forget what is there of an earlier submission; the name of its files."""
        if (before := self.name(job.key)) is not None:
            self.forget(before)
        name = f"{_digest(job.key)}.{uuid.uuid4().hex[:8]}"
        self._names[_digest(job.key)] = name
        _write(self.folder / "jobs" / name, msgspec.msgpack.encode(job))
        return name

    def job(self, name: str) -> Job | None:
        """A job, or None when there is none."""
        with contextlib.suppress(OSError, msgspec.DecodeError):
            return msgspec.msgpack.decode((self.folder / "jobs" / name).read_bytes(), type=Job)
        return None

    def begin(self, name: str) -> None:
        """Note that an attempt has begun."""
        _write(self.folder / "begun" / name, f"{socket.gethostname()} {os.getpid()}".encode())

    def begun(self, name: str) -> bool:
        """Whether an attempt has begun."""
        return (self.folder / "begun" / name).exists()

    def put_report(self, name: str, report: Report) -> None:
        """Write how an attempt ended."""
        _write(self.folder / "reports" / name, msgspec.msgpack.encode(report))

    def report(self, name: str) -> Report | None:
        """How the attempt ended, or None when it has not."""
        with contextlib.suppress(OSError, msgspec.DecodeError):
            return msgspec.msgpack.decode((self.folder / "reports" / name).read_bytes(), type=Report)
        return None

    def reported(self) -> set[str]:
        """The names of all reports there are; one look at the folder, however many."""
        return {path.name for path in (self.folder / "reports").iterdir()}

    def forget(self, name: str) -> None:
        """Remove all files of a submission."""
        if self._names.get(_digest_of(name)) == name:
            del self._names[_digest_of(name)]
        for part in ("reports", "begun", "jobs"):
            with contextlib.suppress(OSError):
                (self.folder / part / name).unlink()


def _digest(key: str) -> str:
    return sha256(key.encode()).hexdigest()[:32]


def _digest_of(name: str) -> str:
    return name.partition(".")[0]


def _write(path: Path, data: bytes) -> None:
    draft = path.parent.parent / f".draft-{uuid.uuid4().hex}"
    try:
        with draft.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()
