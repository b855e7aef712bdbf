"""The inside of a worker process: prepared once, it calls one function on payload after payload."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from hashlib import sha256
from importlib import import_module
from pathlib import Path

import msgspec

from ckptflip.campaign.executors.guards import Guard
from ckptflip.campaign.executors.protocol import Loss, Report

Call = Callable[[bytes], bytes]

# One thread per framework: as many trials as cores are faster than one trial on all cores, and sums in one
# order are the same sums everywhere.
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TF_NUM_INTRAOP_THREADS": "1",
    "TF_NUM_INTEROP_THREADS": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
# Modules, with commas, that workers import before their first job; what fails then fails in the job too.
WARM = "CKPTFLIP_WARM"
_MOST_LOG = 1 << 20  # bytes of a worker's log before it starts anew


class Setting(msgspec.Struct, frozen=True):
    """What all workers of an executor share.

    Attributes:
        call: ``package.module:function``.
        folder: for logs and marks.
        environment: variables to set.
        paths: the driver's ``sys.path``; folders that are missing in the worker's are added behind its own.
    """

    call: str
    folder: str
    environment: dict[str, str] = {}
    paths: list[str] = []


class Mark(msgspec.Struct, frozen=True):
    """Which process took a job, left in the folder for the driver to find when that process is gone.

    Attributes:
        pid: of the worker.
        since: when, seconds since the epoch.
        log: bytes its log had.
    """

    pid: int
    since: float
    log: int


def mark_path(folder: str | Path, key: str) -> Path:
    """Where the mark of a job lies."""
    return Path(folder, f"job-{sha256(key.encode()).hexdigest()[:24]}.mark")


def log_path(folder: str | Path, pid: int) -> Path:
    """Where a worker's log lies."""
    return Path(folder, f"worker-{pid}.log")


_guard = Guard()
_call: Call | None = None
_problem = ""
_folder = ""


def begin(setting: bytes) -> None:
    """Prepare this process; whatever goes wrong is told by each job, for a pool gives up without a worker."""
    global _call, _problem, _folder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is the driver's to decide
    chosen = msgspec.json.decode(setting, type=Setting)
    os.environ.update(ONE_THREAD | chosen.environment)  # nothing that reads these is imported yet
    _folder = chosen.folder
    _guard.start()
    with contextlib.suppress(OSError):
        log = os.open(log_path(_folder, os.getpid()), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
    faulthandler.enable(file=2)
    sys.path.extend(path for path in chosen.paths if path not in sys.path)
    try:
        _call = find_call(chosen.call)
    except BaseException as error:  # a module may do anything on import, sys.exit() too
        _problem = f"{chosen.call} cannot be imported: {type(error).__name__}: {error}"
        traceback.print_exc()
    for module in filter(None, os.environ.get(WARM, "").split(",")):
        with contextlib.suppress(Exception):
            import_module(module)


def find_call(name: str) -> Call:
    """The function that ``package.module:function`` names; imports its module.

    Example:
        >>> find_call("zlib:compress")(b"")[:1]
        b'x'
    """
    module, _, attribute = name.partition(":")
    found: Call = getattr(import_module(module), attribute)
    return found


def run(key: str, payload: bytes, memory: int | None) -> bytes:
    """Call the function on one payload: an encoded `Report`. Never raises, for exceptions need not pickle."""
    began = time.monotonic()
    _leave_mark(key)
    try:
        with _guard.within(memory):
            answer, loss = _attempt(payload)
    except BaseException as error:  # from a signal handler between the two
        answer, loss = None, Loss(state="crashed", message=f"{type(error).__name__}: {error}")
    report = Report(
        key=key,
        answer=answer,
        loss=loss,
        host=socket.gethostname(),
        pid=os.getpid(),
        seconds=time.monotonic() - began,
    )
    return msgspec.msgpack.encode(report)


def _attempt(payload: bytes) -> tuple[bytes | None, Loss | None]:
    if _call is None:
        return None, Loss(state="crashed", message=_problem)
    try:
        answer = _call(payload)
    except MemoryError as error:
        return None, Loss(state="out-of-memory", message=f"MemoryError: {error}".rstrip(": "))
    except BaseException as error:  # SystemExit too: the worker goes on
        traceback.print_exc()
        message = f"{type(error).__name__}: {error}".rstrip(": ")
        return None, Loss(state="crashed", message=f"the call raised {message}")
    if not isinstance(answer, bytes):
        return None, Loss(state="crashed", message=f"the call returned a {type(answer).__name__}, not bytes")
    return answer, None


def _leave_mark(key: str) -> None:
    # A full disk must not fail the job: without a mark only the message of a loss is poorer.
    with contextlib.suppress(OSError):
        size = os.fstat(2).st_size
        if size > _MOST_LOG and os.path.samestat(os.fstat(2), log_path(_folder, os.getpid()).stat()):
            os.ftruncate(2, 0)
            size = 0
        mark_path(_folder, key).write_bytes(msgspec.json.encode(Mark(os.getpid(), time.time(), size)))
