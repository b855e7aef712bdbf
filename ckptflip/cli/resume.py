"""``ckptflip resume``: go on from a clean or an altered checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

from ckptflip.cli.train import echo_row


@click.command("resume")
@click.argument("workload")
@click.argument("checkpoint", metavar="CKPT", type=click.Path(path_type=Path))
@click.option("--until", type=int, required=True, metavar="N", help="Epoch to stop after.")
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
def command(
    workload: str, checkpoint: Path, until: int, save: Path | None, track: Path | None,
    record: Path | None, label: str | None, overwrite: bool,
) -> None:  # fmt: skip
    """Go on training WORKLOAD from the checkpoint CKPT, clean or altered.

    The track's first row is the checkpoint itself, measured before any training.
    """
    from ckptflip.training import harness

    harness.resume(
        workload,
        checkpoint,
        until,
        save=save,
        track=track,
        record=record,
        label=label,
        overwrite=overwrite,
        progress=echo_row,
    )
    click.echo(harness.track_path(checkpoint, save, track))
