"""What a driver tells while it works."""

from __future__ import annotations

from collections.abc import Callable

import msgspec


class Happened(msgspec.Struct, frozen=True, kw_only=True):
    """Something to tell a user who waits.

    Attributes:
        what: ``clean`` (a clean run is there), ``trial`` (a trial is finished), ``lost`` (an attempt is lost
            and will be made again) or ``note``.
        text: in words.
        done: trials finished so far.
        wanted: trials that are wanted, as far as is known now.
        failed: of those finished.
    """

    what: str
    text: str = ""
    done: int = 0
    wanted: int = 0
    failed: int = 0


Told = Callable[[Happened], None]
