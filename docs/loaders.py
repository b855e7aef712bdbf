"""Writes docs/loaders.md: asks every installed loader whether it notices a flipped bit (`ckptflip loaders`).

python docs/loaders.py
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ckptflip.loaders import PROBES, Verdict, ask

PAGE = Path(__file__).parent / "loaders.md"
TITLES = ("format", "loader", "version", "stored checksum", "repaired", "left", "what it said")
HEAD = """# Does the loader notice?

Written by `python docs/loaders.py` from what `ckptflip loaders` finds: each loader's own library writes a
small checkpoint, one bit of it is flipped, and the loader opens it again, in a process of its own.
*repaired*: stored checksums were made right again (`--checksum repair`, an error in memory before the
checksum was made). *left*: they were not (`--checksum leave`, an error at rest).

`silent`: the flipped word was loaded without complaint, and no other word differed. `detected`: the loader
raised an error that speaks of a checksum or of corruption. `refused`: it raised another error.

Asked on Python 3.11. From 3.13 on, its `zipfile` checks no stored member that is read out of order. HDF5
reads so within Keras' archive, which is then `silent` in both columns.
"""


def page(verdicts: list[Verdict]) -> str:
    """The page as Markdown."""
    rows = [
        (
            v.format,
            f"`{v.loader}`",
            *(c or "–" for c in (v.version, v.covered, v.repair, v.leave)),
            _said(v.error),
        )
        for v in verdicts
    ]
    lines = ["| " + " | ".join(TITLES) + " |", "|---" * len(TITLES) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([HEAD, *lines, "", _summary(verdicts), ""])


def _said(error: str) -> str:
    return "`" + error.replace("|", "\\|").replace("`", "'") + "`" if error else ""


def _summary(verdicts: list[Verdict]) -> str:
    asked = [v for v in verdicts if v.leave]
    silent = [v for v in asked if v.leave == "silent"]
    stored = [v for v in silent if v.covered != "none"]
    said = (
        f"Of {len(asked)} loaders asked, {len(silent)} load a bit that was flipped at rest in silence; "
        f"{len(stored)} of those although the file stores a checksum over it."
    )
    noticed = [v.loader for v in asked if v.repair != "silent"]
    before = f"{', '.join(noticed)} notice" if noticed else "No loader notices"
    return f"{said} {before} an error that came before the checksum."


def main() -> None:
    """Ask all and write the page."""
    with ThreadPoolExecutor(2) as pool:
        verdicts = list(pool.map(ask, PROBES))
    for verdict in verdicts:
        print(verdict, file=sys.stderr)
    missing = [v.loader for v in verdicts if not v.leave]
    if missing:
        sys.exit(f"{', '.join(missing)} gave no answer: pip install '.[loaders]'; the page was left as it is")
    PAGE.write_text(page(verdicts), "utf-8")


if __name__ == "__main__":
    main()
