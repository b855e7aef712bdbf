"""``ckptflip run``: a campaign."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ckptflip.cli.options import HELP
from ckptflip.errors import UsageError

if TYPE_CHECKING:
    from ckptflip.campaign.events import Happened

# Seconds between two lines where no terminal shows a bar.
_PACE = 10.0


@click.command(context_settings=HELP)
@click.argument("campaign", required=False, type=click.Path(path_type=Path))
@click.option(
    "--store", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
    help="The SQLite file that holds the results; made, or gone on with.",
)  # fmt: skip
@click.option("--executor", metavar="NAME", help="local, ray, slurm or another's; instead of the spec's.")
@click.option("--workers", type=int, metavar="N", help="Trials at a time; instead of the spec's.")
@click.option("--shard", metavar="I/N", help="Run part I of N alone; `ckptflip merge` unites the stores.")
@click.option("--extend", is_flag=True, help="Accept an edited spec: more cells or trials. Nothing is lost.")
@click.option("--retry", is_flag=True, help="Try failed trials again.")
@click.option(
    "--dry-run", is_flag=True,
    help="List the cells, find the workloads, try policies on clean runs of --store; train nothing.",
)  # fmt: skip
@click.option("--example", is_flag=True, help="Print a small spec to begin with, and end.")
@click.option("--schema", is_flag=True, help="Print the JSON Schema of a spec, for editors, and end.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def command(
    campaign: Path | None, store: Path | None, executor: str | None, workers: int | None, shard: str | None,
    extend: bool, retry: bool, dry_run: bool, example: bool, schema: bool, quiet: bool,
) -> None:  # fmt: skip
    """Run the campaign that the TOML file CAMPAIGN describes, or what is missing of it.

    It may be interrupted and killed at any time: the same command goes on. STORE.clean keeps the clean runs.
    Exit code 4: the campaign is complete, and some trials failed.
    """
    from ckptflip.campaign import loading
    from ckptflip.campaign.cells import expand

    if schema or example:
        import json

        click.echo(json.dumps(loading.schema(), indent=1) if schema else loading.example(), nl=schema)
        return
    if campaign is None:
        raise UsageError("name the campaign's TOML file; --example prints one to begin with")
    spec = loading.load(campaign)
    # A recipe may lie beside its spec. Behind everything else, so that it hides no installed module.
    if (folder := str(campaign.resolve().parent)) not in sys.path:
        sys.path.append(folder)
    try:
        cells = expand(spec)
    except UsageError as why:
        raise UsageError(f"campaign {campaign}: {why}") from None
    from ckptflip.campaign import shards

    part = shards.parse(shard) if shard is not None else shards.WHOLE
    shards.check_shard(part, spec)
    if dry_run:
        _list_cells(spec, cells)
        _look(spec, cells, store)
        return
    if store is None:
        raise UsageError("name the file for the results: --store runs.db")
    from ckptflip.campaign import runner

    with _Progress(quiet=quiet) as progress, _terminable():
        try:
            summary = runner.run(
                spec,
                store,
                executor=executor,
                workers=workers,
                shard=part,
                extend=extend,
                retry=retry,
                told=progress.told,
                cells=cells,
            )
        except KeyboardInterrupt:
            progress.say("what is finished is kept; the same command goes on")
            raise
    following = f"ckptflip report {store} -o report/"
    if summary.rest:
        following = f"ckptflip merge {store} and the stores of the other shards"
    progress.say(
        f"{summary.ran} trials in {summary.seconds:.1f} s, {summary.found} were there; {summary.cells} cells"
        f"{f'; shard {part.index}/{part.of} complete' if summary.rest else ''}. Next: {following}"
    )
    click.echo(store)


def _list_cells(spec: Any, cells: Any) -> None:
    from ckptflip.cli.output import emit, many, say

    columns = ("workload", "epoch", "until", "condition", "trials")
    values = ((c.workload_label, c.epoch, c.until, c.label, c.wanted) for c in cells)
    emit((dict(zip(columns, row, strict=True)) for row in values), columns, "table")
    most = "at most " if spec.trials.stop is not None else ""
    trials = many(sum(cell.wanted for cell in cells), "trial")
    count = many(len(cells), "cell")
    say(f"{count}, {most}{trials}; dry run: nothing is trained")


def _look(spec: Any, cells: Any, store: Path | None) -> None:
    from ckptflip.campaign import dry_run
    from ckptflip.campaign.clean_stage import clean_folder
    from ckptflip.cli.output import many, say

    folder = None if store is None else clean_folder(store)
    found = dry_run.look(spec, cells, folder)
    say(f"found {many(found.workloads, 'workload')}; not started, so data may still be missing")
    say(f"metric not checked: that a workload gives {spec.metric.name!r} shows in its clean run")
    if found.tried:
        say(f"drew once for {many(found.tried, 'altered cell')} on the clean checkpoints: possible")
    if found.untried:
        where = "no --store is named" if folder is None else f"their checkpoints are not yet in {folder}"
        say(f"no tensor was looked for of {many(found.untried, 'altered cell')}: {where}")


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """End as an interrupt does when the system asks for it (SIGTERM), workers and all; a second one kills."""

    def end(*_: object) -> None:
        signal.signal(signal.SIGTERM, before)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Progress:
    """Tells how far a campaign is: a bar on a terminal, else a line now and then."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._bar: Any = None
        self._task: Any = None
        self._last = time.monotonic()

    def __enter__(self) -> _Progress:
        if not self._quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                console=Console(stderr=True), transient=True,
            )  # fmt: skip
            self._bar.start()
            self._task = self._bar.add_task("clean runs", total=None)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def told(self, happened: Happened) -> None:
        """Show what happened."""
        if happened.what != "trial":
            self.say(happened.text)
            return
        failed = f", {happened.failed} failed" if happened.failed else ""
        if self._bar is not None:
            description = f"trials{failed}"
            self._bar.update(
                self._task, completed=happened.done, total=happened.wanted, description=description
            )
        elif time.monotonic() - self._last > _PACE:
            self._last = time.monotonic()
            self.say(f"{happened.done} of {happened.wanted} trials{failed}")

    def say(self, text: str) -> None:
        """A line on standard error."""
        from ckptflip.cli.output import say

        if self._quiet:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            say(text)
