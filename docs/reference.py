"""Writes docs/cli.md from the commands themselves.

python docs/reference.py           write it
python docs/reference.py --check   exit code 1 when the page is not what the commands say
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from ckptflip.cli.main import COMMANDS, cli

WIDTH = 100
PAGE = Path(__file__).parent / "cli.md"


def text() -> str:
    """The page."""
    context = _context(cli, "ckptflip")
    parts = [
        "# The command line",
        "Written by `python docs/reference.py` from the commands' own help.",
        _fenced(cli.get_help(context)),
    ]
    for name in COMMANDS:
        command = cli.get_command(context, name)
        assert command is not None
        parts += [f"## ckptflip {name}", _fenced(command.get_help(_context(command, name, context)))]
    return "\n\n".join(parts) + "\n"


def _context(command: click.Command, name: str, parent: click.Context | None = None) -> click.Context:
    return click.Context(
        command,
        info_name=name,
        parent=parent,
        terminal_width=WIDTH,
        max_content_width=WIDTH,
        **command.context_settings,
    )


def _fenced(help_text: str) -> str:
    return f"```text\n{help_text}\n```"


def main(arguments: list[str]) -> int:
    """Write or check the page."""
    if "--check" in arguments:
        if PAGE.read_text("utf-8") != text():
            print(f"{PAGE.name} is out of date: python docs/reference.py")
            return 1
        return 0
    PAGE.write_text(text(), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
