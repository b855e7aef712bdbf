"""Listings on standard output: as a table for people, as JSON, JSON lines or CSV for programs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import click

# A wide cell is cut in tables alone; the other forms give all of it.
_WIDEST = 60


def emit(rows: Iterable[dict[str, Any]], columns: Sequence[str], form: str) -> None:
    """Write a listing to standard output.

    Args:
        rows: one dictionary per line.
        columns: which keys to show, in order.
        form: ``table``, ``json``, ``ndjson`` or ``csv``.
    """
    if form == "table":
        _table(list(rows), columns)
    elif form == "csv":
        _csv(rows, columns)
    else:
        import json

        listed = ({c: _plain(row[c]) for c in columns} for row in rows)
        if form == "ndjson":
            for row in listed:
                click.echo(json.dumps(row))
        else:
            click.echo(json.dumps(list(listed), indent=1))


def say(message: str) -> None:
    """Talk: to standard error, with control characters of names made harmless."""
    click.echo(_printable(message), err=True)


def _table(rows: list[dict[str, Any]], columns: Sequence[str]) -> None:
    cells = [[_cell(row[c]) for c in columns] for row in rows]
    widths = [max([len(c), *(len(line[i]) for line in cells)]) for i, c in enumerate(columns)]
    right = [bool(rows) and all(isinstance(r[c], int | float) or r[c] is None for r in rows) for c in columns]
    lines = []
    for line in [list(columns), *cells]:
        padded = (
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(line, widths, right, strict=True)
        )
        lines.append("  ".join(padded).rstrip())
    click.echo("\n".join(lines))


def _cell(value: Any) -> str:
    if value is None or value == () or value == []:
        return "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    text = ",".join(str(v) for v in value) if isinstance(value, tuple | list) else str(value)
    text = _printable(text)
    return text if len(text) <= _WIDEST else f"{text[: _WIDEST - 1]}…"


def _printable(text: str) -> str:
    """The text with control characters escaped: names come from strangers' files."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _plain(value: Any) -> Any:
    """A value that JSON can hold; numbers that it cannot become text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def _csv(rows: Iterable[dict[str, Any]], columns: Sequence[str]) -> None:
    import csv
    import io

    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([_field(row[c]) for c in columns])
    click.echo(buffer.getvalue(), nl=False)


def _field(value: Any) -> Any:
    """A value for a line of CSV; as everywhere, names cannot command the terminal."""
    if isinstance(value, tuple | list):
        return _printable(",".join(map(str, value)))
    return _printable(value) if isinstance(value, str) else value


def many(count: int, noun: str, plural: str | None = None) -> str:
    """A number with its noun.

    Example:
        >>> many(1, "word"), many(2, "entry", "entries")
        ('1 word', '2 entries')
    """
    return f"{count} {noun if count == 1 else plural or noun + 's'}"
