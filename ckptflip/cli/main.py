"""The entry point: finds a command when it is asked for; turns errors into one message and an exit code."""

from __future__ import annotations

import os
import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import TextIO

import click

from ckptflip import __version__
from ckptflip.cli.options import HELP
from ckptflip.errors import CkptflipError

# In the order of the help text: look, alter, look again, protect, train, run campaigns.
COMMANDS = (
    "ls",
    "inject",
    "show",
    "undo",
    "replay",
    "import-faults",
    "diff",
    "scan",
    "seal",
    "verify",
    "repair",
    "propagation",
    "convert",
    "loaders",
    "train",
    "resume",
    "plot",
    "run",
    "status",
    "report",
    "merge",
    "export",
    "sample-size",
    "demo",
    "completion",
)
INTERRUPTED = 130

_PACKAGE = Path(__file__).parents[1]
_as_python_does = warnings.showwarning


class LazyGroup(click.Group):
    """A group whose commands live in `ckptflip.cli.<name>` and are imported when they are needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All commands, in a sensible order."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """A command by name."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"ckptflip.cli.{cmd_name.replace('-', '_')}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, with the nearest name when there is no such command."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            import difflib

            near = difflib.get_close_matches(args[0], COMMANDS, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise click.UsageError(f"No such command {args[0]!r}.{hint}", ctx)
        return super().resolve_command(ctx, args)


@click.group(cls=LazyGroup, context_settings=HELP)
@click.version_option(__version__, prog_name="ckptflip")
def cli() -> None:
    """Flip chosen bits in saved checkpoints, resume training, and measure what the flips did.

    Data goes to standard output, talk and progress to standard error. Exit codes: 0 fine, 1 error, 2 usage,
    3 a difference or corruption was found, 4 a campaign ended with failed trials, 130 interrupted.
    """


def main() -> None:
    """Run the command line and exit."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller (`>&-`)
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
    warnings.showwarning = show_warning
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run the command line.

    Args:
        arguments: what stands after the program's name.

    Returns:
        The exit code.
    """
    try:
        result = cli.main(arguments, prog_name="ckptflip", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.ClickException as why:
        why.show()
        return why.exit_code
    except CkptflipError as why:
        return _fail(str(why), why.exit_code)
    except (click.Abort, KeyboardInterrupt):
        return _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        # The reader has seen enough (`| head`). What is left must not be flushed into the closed pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError:
        return _fail("not enough memory: select fewer tensors, or ask for fewer faults", 1)
    except OSError as why:
        return _fail(f"{why.filename or 'output'}: {why.strerror or why}", 1)


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Say what ckptflip warns of in a line, like an error; warnings of others are shown as Python does."""
    from ckptflip.cli.output import say

    if issubclass(category, UserWarning) and _PACKAGE in Path(filename).parents:
        say(f"Warning: {message}")
    else:
        _as_python_does(message, category, filename, lineno, file, line)


def _fail(message: str, code: int) -> int:
    from ckptflip.cli.output import say

    say(f"Error: {message}")
    return code


if __name__ == "__main__":
    main()
