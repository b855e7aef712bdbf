"""``ckptflip resume``: go on from a clean or an altered checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ckptflip.cli.options import HELP
from ckptflip.cli.train import echo_row, notes_shown, seal_option, workload_options


@click.command("resume", context_settings=HELP)
@click.argument("workload")
@click.argument("checkpoint", metavar="CKPT", type=click.Path(path_type=Path))
@click.option(
    "--until", type=int, required=True, metavar="N", help="Epoch to stop after; CKPT's own: only measure it."
)
@click.option(
    "--save", type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
    help="Folder for a checkpoint per epoch and track.jsonl. Without it only the track is kept.",
)  # fmt: skip
@click.option(
    "--track", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
    help="The track's file. Default: in DIR, else <checkpoint's stem>.track.jsonl beside the checkpoint.",
)  # fmt: skip
@click.option(
    "--record", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
    help="What was altered in CKPT. Default: CKPT.flips.jsonl or CKPT.flips.h5 beside it, if there is one.",
)  # fmt: skip
@click.option("--label", metavar="TEXT", help="What runs of the same kind share, for figures.")
@click.option("--overwrite", is_flag=True, help="Replace the track, and the run in DIR.")
@click.option(
    "--verify", is_flag=True, help="Hold CKPT against its seal first; exit code 3 if it is damaged."
)
@seal_option
@workload_options
def command(
    workload: str, checkpoint: Path, until: int, save: Path | None, track: Path | None,
    record: Path | None, label: str | None, overwrite: bool, verify: bool, seal: float | None,
    options: dict[str, Any],
) -> None:  # fmt: skip
    """Go on training WORKLOAD from the checkpoint CKPT, clean or altered.

    The track's first row is the checkpoint itself, measured before any training; with its own epoch as
    --until it is the only one. Give the workload the options that CKPT was trained with.
    """
    from ckptflip.training import find, harness

    with notes_shown():
        harness.resume(
            find(workload, **options),
            checkpoint,
            until,
            save=save,
            track=track,
            record=record,
            label=label,
            overwrite=overwrite,
            verify=verify,
            seal=seal,
            progress=echo_row,
        )
    click.echo(harness.track_path(checkpoint, save, track))
