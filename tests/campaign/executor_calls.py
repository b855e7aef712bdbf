"""Functions that tests have workers call: well-behaved, slow, and each in another way deadly."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path


def perform(payload: bytes) -> bytes:
    """Do what the payload says: a word, and arguments behind spaces."""
    word, *arguments = payload.decode().split(" ")
    return _DEEDS[word](*arguments)


def _echo(*words: str) -> bytes:
    return " ".join(words).encode()


def _sleep(seconds: str, *words: str) -> bytes:
    time.sleep(float(seconds))
    return _echo(*words)


def _raise(*words: str) -> bytes:
    raise ValueError(" ".join(words))


def _leave(code: str) -> bytes:
    sys.exit(int(code))


def _exit(code: str) -> bytes:
    os._exit(int(code))


def _crash() -> bytes:
    print("about to crash", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)
    time.sleep(60)
    return b"still here"


def _hang() -> bytes:
    ctypes.CDLL(None).sleep(600)
    return b"woke up"


def _hang_deaf() -> bytes:
    # PyDLL holds the interpreter's lock, so that no Python code of this process runs any more.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ctypes.PyDLL(None).sleep(600)
    return b"woke up"


def _eat() -> bytes:
    held = []
    while True:
        held.append(bytearray(os.urandom(1024)) * (20 << 10))
        time.sleep(0.01)


def _memory_error() -> bytes:
    raise MemoryError("too much to ask")


def _number() -> bytes:
    return 5  # type: ignore[return-value]


def _pid() -> bytes:
    return f"{os.getpid()} {os.getppid()}".encode()


def _note(path: str, seconds: str) -> bytes:
    """Write down that this was done, by whom, with a line for the beginning and one for the end."""
    for moment in ("begin", "end"):
        with Path(path).open("a") as file:
            file.write(f"{moment} {os.getpid()} {os.getppid()}\n")
        if moment == "begin":
            time.sleep(float(seconds))
    return b"noted"


def _once(path: str, *words: str) -> bytes:
    """Hang at the first call, answer at the second."""
    if not Path(path).exists():
        Path(path).write_text(str(os.getpid()))
        time.sleep(600)
    return _echo(*words)


def _variable(name: str) -> bytes:
    return os.environ.get(name, "").encode()


def _modules() -> bytes:
    return " ".join(
        sorted(name for name in ("torch", "tensorflow", "keras", "numpy") if name in sys.modules)
    ).encode()


def _threads() -> bytes:
    """The most threads that any BLAS of numpy would use."""
    import numpy  # noqa: F401
    from threadpoolctl import threadpool_info

    return str(max(pool["num_threads"] for pool in threadpool_info())).encode()


def _noise(size: str) -> bytes:
    print("n" * int(size), flush=True)
    return b"done"


_DEEDS = {
    "echo": _echo,
    "sleep": _sleep,
    "raise": _raise,
    "leave": _leave,
    "exit": _exit,
    "crash": _crash,
    "hang": _hang,
    "hang-deaf": _hang_deaf,
    "eat": _eat,
    "memory-error": _memory_error,
    "number": _number,
    "pid": _pid,
    "note": _note,
    "once": _once,
    "variable": _variable,
    "modules": _modules,
    "noise": _noise,
    "threads": _threads,
}
