"""Whole processes as they are measured: time, peak memory, bytes read; and the machine they ran on."""

from __future__ import annotations

import compileall
import os
import platform
import sys
import time
from pathlib import Path
from typing import NamedTuple

import ckptflip
from ckptflip.processor import processor

GIB = 1 << 30
# For glibc's malloc; other allocators do not look at these.
KEEPING = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
    "MALLOC_TOP_PAD_": str(1 << 28),
}
_README = Path(__file__).parent.parent / "README.md"


class Spent(NamedTuple):
    """What a process took: wall time in seconds, peak memory in bytes, bytes it read (-1: not known)."""

    seconds: float
    peak: int
    read: int


def timed(command: list[str]) -> Spent:
    """Run a process to its end, its output thrown away; a failure ends the benchmark."""
    began = time.perf_counter()
    child = os.fork()
    if child == 0:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        os.execvp(command[0], command)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    seconds = time.perf_counter() - began
    read = _bytes_read(child)
    _, status, usage = os.wait4(child, 0)
    if os.waitstatus_to_exitcode(status) != 0:
        raise SystemExit(f"failed ({status}): {' '.join(command)[:300]}")
    return Spent(seconds, usage.ru_maxrss * 1024, read)


def _bytes_read(process: int) -> int:
    """What an ended process, not yet waited for, got from `read` and its kin."""
    try:
        lines = Path(f"/proc/{process}/io").read_text().splitlines()
    except OSError:
        return -1
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))


def keep_memory() -> None:
    """Start this program again with an allocator that gives no memory back, unless it is one."""
    if not KEEPING.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEPING)


def program() -> list[str]:
    """The installed command, or the module where there is none."""
    installed = Path(sys.executable).with_name("ckptflip")
    return [str(installed)] if installed.exists() else [sys.executable, "-m", "ckptflip"]


def with_bytecode() -> None:
    """An installed package comes with its bytecode; a clone that nobody has used yet does not."""
    compileall.compile_dir(Path(ckptflip.__file__).parent, quiet=1)


def machine(**versions: str) -> str:
    """The machine, Python and some libraries, in a line."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    libraries = ", ".join(f"{name} {version}" for name, version in versions.items())
    python = f"Python {platform.python_version()}"
    return f"{processor()}, {os.cpu_count()} cores, {memory:.0f} GiB; {python}, {libraries}"


def table_of(results: str, columns: int) -> str:
    """The first columns of a results table."""
    rows = [line for line in results.splitlines() if line.startswith("|")]
    return "\n".join("|".join(row.split("|")[: columns + 1]) + "|" for row in rows)


def markers(name: str) -> tuple[str, str]:
    """What stands before and after a benchmark's table in the README."""
    return f"<!-- written by benchmarks/{name}.py -->", f"<!-- end of {name} -->"


def into_readme(name: str, results: str, columns: int, page: Path = _README) -> None:
    """Put the first columns of a results table between this benchmark's markers, in the README or a page."""
    first, last = markers(name)
    text = page.read_text("utf-8")
    before, _, rest = text.partition(first)
    after = rest.partition(last)[2]
    page.write_text(f"{before}{first}\n\n{table_of(results, columns)}\n\n{last}{after}", "utf-8")
