"""`ckptflip completion`."""

from __future__ import annotations

import click

from ckptflip.cli.options import HELP


@click.command(context_settings=HELP)
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")))
def command(shell: str) -> None:
    """Print the script that makes SHELL complete commands and options.

    For bash: `eval "$(ckptflip completion bash)"` in ~/.bashrc; for zsh the same with zsh in ~/.zshrc; for
    fish: `ckptflip completion fish > ~/.config/fish/completions/ckptflip.fish`.
    """
    from click.shell_completion import get_completion_class

    from ckptflip.cli.main import cli

    made = get_completion_class(shell)
    assert made is not None
    click.echo(made(cli, {}, "ckptflip", "_CKPTFLIP_COMPLETE").source())
