"""Runs the console examples of Markdown pages and compares what they print with what the page shows.

    python docs/examples.py README.md            say what differs; exit code 1 if anything does
    python docs/examples.py --update README.md   write the real output into the page

An example is a block fenced as ```console: lines after `$ ` are run by bash, one after the other in one
empty folder per page; the lines between are what they print (standard error included). A line `...`
stands for any lines and `…` for any word. Numbers with a decimal point, and the words of float32 numbers, may
differ by 5 %: trained weights differ in their last bits between processors. A ```python block after
`<!-- run -->` is run last, and must not fail.
"""

from __future__ import annotations

import difflib
import os
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
_BLOCK = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_PYTHON = re.compile(r"^<!-- run -->\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_WORD = re.compile(r"[0-9a-f]{8}$")
_NUMBER = re.compile(r"-?\d*\.\d+(?:e[+-]?\d+)?%?$")


class Example(NamedTuple):
    """One command of a page and the lines it is said to print."""

    command: str
    shown: list[str]


def examples(text: str) -> Iterator[Example]:
    """The examples of a page, in order."""
    for block in _BLOCK.finditer(text):
        yield from _block_examples(block.group(1))
    for block in _PYTHON.finditer(text):
        # What it prints is not shown on the page; it must run, that is all.
        yield Example(f"python - <<'END' >/dev/null\n{block.group(1)}END", [])


def _block_examples(block: str) -> Iterator[Example]:
    command, shown = "", []
    for line in block.splitlines():
        if line.startswith("$ "):
            if command:
                yield Example(command, shown)
            command, shown = line[2:], []
        elif command and not shown and command.endswith("\\"):
            command += f"\n{line}"
        else:
            shown.append(line)
    if command:
        yield Example(command, shown)


def run(command: str, folder: Path) -> list[str]:
    """What a command prints, in a folder, with this interpreter's `ckptflip` found first."""
    tools = folder.parent / "bin"
    if not tools.exists():
        tools.mkdir()
        for name, target in (("ckptflip", "-m ckptflip"), ("python", "")):
            (tools / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {target} "$@"\n')
            (tools / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "COLUMNS": "100",
    }
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.stdout.splitlines()


def same(shown: list[str], printed: list[str]) -> bool:
    """Whether a page's lines stand for the printed ones."""
    if not shown:
        return not printed
    if shown[0] == "...":
        return any(same(shown[1:], printed[i:]) for i in range(len(printed) + 1))
    return bool(printed) and _same_line(shown[0], printed[0]) and same(shown[1:], printed[1:])


def _same_line(shown: str, printed: str) -> bool:
    left, right = shown.split(), printed.split()
    return len(left) == len(right) and all(map(_same_word, left, right))


def _same_word(shown: str, printed: str) -> bool:
    if shown == printed or shown == "…":
        return True
    if _WORD.match(shown) and _WORD.match(printed):
        a, b = (struct.unpack(">f", bytes.fromhex(word))[0] for word in (shown, printed))
        return abs(a - b) <= 0.05 * max(abs(a), abs(b))
    if not (_NUMBER.match(shown) and _NUMBER.match(printed)):
        return False
    a, b = float(shown.rstrip("%")), float(printed.rstrip("%"))
    return abs(a - b) <= 0.05 * max(abs(a), abs(b))


def check(page: Path) -> list[str]:
    """Run a page's examples.

    Returns:
        What differs, as lines to print; empty when nothing does.
    """
    found: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "work"
        folder.mkdir()
        for example in examples(page.read_text("utf-8")):
            printed = run(example.command, folder)
            if not same(example.shown, printed):
                found.append(f"{page.name}: $ {example.command}")
                found += difflib.unified_diff(example.shown, printed, "shown", "printed", lineterm="", n=1)
    return found


def update(page: Path) -> None:
    """Write what the examples print into the page; lines that already stand for it are kept."""
    text = page.read_text("utf-8")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "work"
        folder.mkdir()

        def renewed(block: re.Match[str]) -> str:
            lines = []
            for example in _block_examples(block.group(1)):
                printed = run(example.command, folder)
                lines += [
                    f"$ {example.command}",
                    *(example.shown if same(example.shown, printed) else printed),
                ]
            return "\n".join(["```console", *lines, "```"])

        page.write_text(_BLOCK.sub(renewed, text), "utf-8")


def main(arguments: list[str]) -> int:
    """Check or update pages; see the module's text."""
    pages = [Path(a) for a in arguments if a != "--update"]
    if "--update" in arguments:
        for page in pages:
            update(page)
        return 0
    differences = [line for page in pages for line in check(page)]
    print("\n".join(differences) or f"{len(pages)} pages: every example prints what is shown")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
