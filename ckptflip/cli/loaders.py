"""`ckptflip loaders`."""

from __future__ import annotations

import click

from ckptflip.cli.options import HELP, format_option

COLUMNS = ("format", "loader", "version", "covered", "repair", "leave", "error")


@click.command(context_settings=HELP)
@click.argument("names", nargs=-1, metavar="[LOADER]...")
@format_option
def command(names: tuple[str, ...], form: str) -> None:
    """Ask the real loader of each format whether it notices a flipped bit.

    Each one writes a small checkpoint, one bit of it is flipped, and it loads the file again: once with
    stored checksums repaired (an error that came before the checksum), once with them left (an error at
    rest). `silent`: it loads the flipped word without a word. `detected`: it says that a checksum is wrong.
    `refused`: it fails with another error. Loaders that are not installed are listed and not asked.

    LOADER limits this to some loaders or formats, by name or a part of it: torch, keras, npz …
    """
    from concurrent.futures import ThreadPoolExecutor

    from msgspec import structs

    from ckptflip.cli.output import emit, say
    from ckptflip.errors import SelectionError
    from ckptflip.loaders import PROBES, ask

    chosen = [
        p for p in PROBES if not names or any(n.lower() in f"{p.name} {p.format}".lower() for n in names)
    ]
    if not chosen:
        known = ", ".join(p.name for p in PROBES)
        raise SelectionError(f"no loader is called {', '.join(names)}; there are {known}")
    say(f"asking {len(chosen)} loaders, each in a process of its own")
    # Each waits for its process; two at a time fill a small machine.
    with ThreadPoolExecutor(2) as pool:
        verdicts = list(pool.map(ask, chosen))
    emit([structs.asdict(v) for v in verdicts], COLUMNS, form)
